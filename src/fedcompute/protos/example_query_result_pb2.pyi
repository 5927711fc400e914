from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExampleQueryResult(_message.Message):
    __slots__ = ("vector_data",)
    class Int32Values(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, value: _Optional[_Iterable[int]] = ...) -> None: ...
    class Int64Values(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, value: _Optional[_Iterable[int]] = ...) -> None: ...
    class BoolValues(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[bool]
        def __init__(self, value: _Optional[_Iterable[bool]] = ...) -> None: ...
    class FloatValues(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, value: _Optional[_Iterable[float]] = ...) -> None: ...
    class DoubleValues(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, value: _Optional[_Iterable[float]] = ...) -> None: ...
    class StringValues(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, value: _Optional[_Iterable[str]] = ...) -> None: ...
    class BytesValues(_message.Message):
        __slots__ = ("value",)
        VALUE_FIELD_NUMBER: _ClassVar[int]
        value: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, value: _Optional[_Iterable[bytes]] = ...) -> None: ...
    class VectorData(_message.Message):
        __slots__ = ("vectors",)
        class Values(_message.Message):
            __slots__ = ("int32_values", "int64_values", "bool_values", "float_values", "double_values", "string_values", "bytes_values")
            INT32_VALUES_FIELD_NUMBER: _ClassVar[int]
            INT64_VALUES_FIELD_NUMBER: _ClassVar[int]
            BOOL_VALUES_FIELD_NUMBER: _ClassVar[int]
            FLOAT_VALUES_FIELD_NUMBER: _ClassVar[int]
            DOUBLE_VALUES_FIELD_NUMBER: _ClassVar[int]
            STRING_VALUES_FIELD_NUMBER: _ClassVar[int]
            BYTES_VALUES_FIELD_NUMBER: _ClassVar[int]
            int32_values: ExampleQueryResult.Int32Values
            int64_values: ExampleQueryResult.Int64Values
            bool_values: ExampleQueryResult.BoolValues
            float_values: ExampleQueryResult.FloatValues
            double_values: ExampleQueryResult.DoubleValues
            string_values: ExampleQueryResult.StringValues
            bytes_values: ExampleQueryResult.BytesValues
            def __init__(self, int32_values: _Optional[_Union[ExampleQueryResult.Int32Values, _Mapping]] = ..., int64_values: _Optional[_Union[ExampleQueryResult.Int64Values, _Mapping]] = ..., bool_values: _Optional[_Union[ExampleQueryResult.BoolValues, _Mapping]] = ..., float_values: _Optional[_Union[ExampleQueryResult.FloatValues, _Mapping]] = ..., double_values: _Optional[_Union[ExampleQueryResult.DoubleValues, _Mapping]] = ..., string_values: _Optional[_Union[ExampleQueryResult.StringValues, _Mapping]] = ..., bytes_values: _Optional[_Union[ExampleQueryResult.BytesValues, _Mapping]] = ...) -> None: ...
        class VectorsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: ExampleQueryResult.VectorData.Values
            def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ExampleQueryResult.VectorData.Values, _Mapping]] = ...) -> None: ...
        VECTORS_FIELD_NUMBER: _ClassVar[int]
        vectors: _containers.MessageMap[str, ExampleQueryResult.VectorData.Values]
        def __init__(self, vectors: _Optional[_Mapping[str, ExampleQueryResult.VectorData.Values]] = ...) -> None: ...
    VECTOR_DATA_FIELD_NUMBER: _ClassVar[int]
    vector_data: ExampleQueryResult.VectorData
    def __init__(self, vector_data: _Optional[_Union[ExampleQueryResult.VectorData, _Mapping]] = ...) -> None: ...
