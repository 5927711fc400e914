from fedcompute.protos import tensorflow_pb2 as _tensorflow_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Type(_message.Message):
    __slots__ = ("function", "struct", "sequence", "tensor")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    STRUCT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    function: FunctionType
    struct: StructType
    sequence: SequenceType
    tensor: TensorType
    def __init__(self, function: _Optional[_Union[FunctionType, _Mapping]] = ..., struct: _Optional[_Union[StructType, _Mapping]] = ..., sequence: _Optional[_Union[SequenceType, _Mapping]] = ..., tensor: _Optional[_Union[TensorType, _Mapping]] = ...) -> None: ...

class FunctionType(_message.Message):
    __slots__ = ("parameter", "result")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    parameter: Type
    result: Type
    def __init__(self, parameter: _Optional[_Union[Type, _Mapping]] = ..., result: _Optional[_Union[Type, _Mapping]] = ...) -> None: ...

class StructType(_message.Message):
    __slots__ = ("element",)
    class Element(_message.Message):
        __slots__ = ("name", "value")
        NAME_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        name: str
        value: Type
        def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Type, _Mapping]] = ...) -> None: ...
    ELEMENT_FIELD_NUMBER: _ClassVar[int]
    element: _containers.RepeatedCompositeFieldContainer[StructType.Element]
    def __init__(self, element: _Optional[_Iterable[_Union[StructType.Element, _Mapping]]] = ...) -> None: ...

class SequenceType(_message.Message):
    __slots__ = ("element",)
    ELEMENT_FIELD_NUMBER: _ClassVar[int]
    element: Type
    def __init__(self, element: _Optional[_Union[Type, _Mapping]] = ...) -> None: ...

class TensorType(_message.Message):
    __slots__ = ("dtype", "dims", "unknown_rank")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_RANK_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensorflow_pb2.DataType
    dims: _containers.RepeatedScalarFieldContainer[int]
    unknown_rank: bool
    def __init__(self, dtype: _Optional[_Union[_tensorflow_pb2.DataType, str]] = ..., dims: _Optional[_Iterable[int]] = ..., unknown_rank: bool = ...) -> None: ...
