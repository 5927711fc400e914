from fedcompute.protos import tensorflow_pb2 as _tensorflow_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorShapeProto(_message.Message):
    __slots__ = ("dim_sizes",)
    DIM_SIZES_FIELD_NUMBER: _ClassVar[int]
    dim_sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dim_sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorSpecProto(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _tensorflow_pb2.DataType
    shape: TensorShapeProto
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_tensorflow_pb2.DataType, str]] = ..., shape: _Optional[_Union[TensorShapeProto, _Mapping]] = ...) -> None: ...

class TensorProto(_message.Message):
    __slots__ = ("dtype", "shape", "sparsity_encoding", "content", "float_val", "double_val", "int_val", "int64_val", "string_val", "name")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_ENCODING_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FLOAT_VAL_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VAL_FIELD_NUMBER: _ClassVar[int]
    INT_VAL_FIELD_NUMBER: _ClassVar[int]
    INT64_VAL_FIELD_NUMBER: _ClassVar[int]
    STRING_VAL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensorflow_pb2.DataType
    shape: TensorShapeProto
    sparsity_encoding: bytes
    content: bytes
    float_val: _containers.RepeatedScalarFieldContainer[float]
    double_val: _containers.RepeatedScalarFieldContainer[float]
    int_val: _containers.RepeatedScalarFieldContainer[int]
    int64_val: _containers.RepeatedScalarFieldContainer[int]
    string_val: _containers.RepeatedScalarFieldContainer[bytes]
    name: str
    def __init__(self, dtype: _Optional[_Union[_tensorflow_pb2.DataType, str]] = ..., shape: _Optional[_Union[TensorShapeProto, _Mapping]] = ..., sparsity_encoding: _Optional[bytes] = ..., content: _Optional[bytes] = ..., float_val: _Optional[_Iterable[float]] = ..., double_val: _Optional[_Iterable[float]] = ..., int_val: _Optional[_Iterable[int]] = ..., int64_val: _Optional[_Iterable[int]] = ..., string_val: _Optional[_Iterable[bytes]] = ..., name: _Optional[str] = ...) -> None: ...

class Configuration(_message.Message):
    __slots__ = ("intrinsic_configs",)
    class IntrinsicConfig(_message.Message):
        __slots__ = ("intrinsic_uri", "intrinsic_args", "output_tensors", "inner_intrinsics")
        class IntrinsicArg(_message.Message):
            __slots__ = ("input_tensor", "parameter")
            INPUT_TENSOR_FIELD_NUMBER: _ClassVar[int]
            PARAMETER_FIELD_NUMBER: _ClassVar[int]
            input_tensor: TensorSpecProto
            parameter: TensorProto
            def __init__(self, input_tensor: _Optional[_Union[TensorSpecProto, _Mapping]] = ..., parameter: _Optional[_Union[TensorProto, _Mapping]] = ...) -> None: ...
        INTRINSIC_URI_FIELD_NUMBER: _ClassVar[int]
        INTRINSIC_ARGS_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_TENSORS_FIELD_NUMBER: _ClassVar[int]
        INNER_INTRINSICS_FIELD_NUMBER: _ClassVar[int]
        intrinsic_uri: str
        intrinsic_args: _containers.RepeatedCompositeFieldContainer[Configuration.IntrinsicConfig.IntrinsicArg]
        output_tensors: _containers.RepeatedCompositeFieldContainer[TensorSpecProto]
        inner_intrinsics: _containers.RepeatedCompositeFieldContainer[Configuration.IntrinsicConfig]
        def __init__(self, intrinsic_uri: _Optional[str] = ..., intrinsic_args: _Optional[_Iterable[_Union[Configuration.IntrinsicConfig.IntrinsicArg, _Mapping]]] = ..., output_tensors: _Optional[_Iterable[_Union[TensorSpecProto, _Mapping]]] = ..., inner_intrinsics: _Optional[_Iterable[_Union[Configuration.IntrinsicConfig, _Mapping]]] = ...) -> None: ...
    INTRINSIC_CONFIGS_FIELD_NUMBER: _ClassVar[int]
    intrinsic_configs: _containers.RepeatedCompositeFieldContainer[Configuration.IntrinsicConfig]
    def __init__(self, intrinsic_configs: _Optional[_Iterable[_Union[Configuration.IntrinsicConfig, _Mapping]]] = ...) -> None: ...

class CheckpointAggregatorState(_message.Message):
    __slots__ = ("aggregators",)
    AGGREGATORS_FIELD_NUMBER: _ClassVar[int]
    aggregators: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, aggregators: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AggVectorAggregatorState(_message.Message):
    __slots__ = ("num_inputs", "vector_data")
    NUM_INPUTS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_DATA_FIELD_NUMBER: _ClassVar[int]
    num_inputs: int
    vector_data: bytes
    def __init__(self, num_inputs: _Optional[int] = ..., vector_data: _Optional[bytes] = ...) -> None: ...

class FederatedMeanAggregatorState(_message.Message):
    __slots__ = ("num_inputs", "weights_sum", "weighted_values_sum")
    NUM_INPUTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHTED_VALUES_SUM_FIELD_NUMBER: _ClassVar[int]
    num_inputs: int
    weights_sum: bytes
    weighted_values_sum: bytes
    def __init__(self, num_inputs: _Optional[int] = ..., weights_sum: _Optional[bytes] = ..., weighted_values_sum: _Optional[bytes] = ...) -> None: ...
