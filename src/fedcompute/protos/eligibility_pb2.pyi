from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MinimumSeparationPolicy(_message.Message):
    __slots__ = ("current_index", "minimum_separation")
    CURRENT_INDEX_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_SEPARATION_FIELD_NUMBER: _ClassVar[int]
    current_index: int
    minimum_separation: int
    def __init__(self, current_index: _Optional[int] = ..., minimum_separation: _Optional[int] = ...) -> None: ...

class DataAvailabilityPolicy(_message.Message):
    __slots__ = ("min_example_count",)
    MIN_EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    min_example_count: int
    def __init__(self, min_example_count: _Optional[int] = ...) -> None: ...

class EligibilityPolicyEvalSpec(_message.Message):
    __slots__ = ("id", "min_sep_policy", "data_availability_policy")
    ID_FIELD_NUMBER: _ClassVar[int]
    MIN_SEP_POLICY_FIELD_NUMBER: _ClassVar[int]
    DATA_AVAILABILITY_POLICY_FIELD_NUMBER: _ClassVar[int]
    id: str
    min_sep_policy: MinimumSeparationPolicy
    data_availability_policy: DataAvailabilityPolicy
    def __init__(self, id: _Optional[str] = ..., min_sep_policy: _Optional[_Union[MinimumSeparationPolicy, _Mapping]] = ..., data_availability_policy: _Optional[_Union[DataAvailabilityPolicy, _Mapping]] = ...) -> None: ...

class EligibilityTaskInfo(_message.Message):
    __slots__ = ("eligibility_policies",)
    ELIGIBILITY_POLICIES_FIELD_NUMBER: _ClassVar[int]
    eligibility_policies: _containers.RepeatedCompositeFieldContainer[EligibilityPolicyEvalSpec]
    def __init__(self, eligibility_policies: _Optional[_Iterable[_Union[EligibilityPolicyEvalSpec, _Mapping]]] = ...) -> None: ...
