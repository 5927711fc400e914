"""What happens on a device; a developer imports all that an app's service needs from here (docs/devices.md)."""

from fedcompute.device.developer.connection import RequestToken
from fedcompute.device.developer.errors import (
    ErrorCode,
    IllegalState,
    IsolatedServiceException,
    OnDevicePersonalizationException,
)
from fedcompute.device.developer.event_urls import EventUrlProvider
from fedcompute.device.developer.examples import example_query_result, training_example
from fedcompute.device.developer.inference import (
    InferenceInput,
    InferenceOutput,
    InferenceParams,
    ModelManager,
    ModelType,
)
from fedcompute.device.developer.key_values import KeyValueStore, MutableKeyValueStore
from fedcompute.device.developer.log_records import EventLogRecord, LogReader, RequestLogRecord
from fedcompute.device.developer.scheduling import (
    FederatedComputeInput,
    FederatedComputeScheduler,
    FederatedComputeScheduleRequest,
    FederatedComputeScheduleResponse,
    Params,
    SchedulingMode,
    TrainingInterval,
)
from fedcompute.device.developer.service import IsolatedService
from fedcompute.device.developer.user_data import AppInfo, UserData
from fedcompute.device.developer.worker import (
    DownloadCompletedInput,
    DownloadCompletedOutput,
    EventInput,
    EventOutput,
    ExecuteInput,
    ExecuteOutput,
    IsolatedWorker,
    RenderingConfig,
    RenderInput,
    RenderOutput,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
    WebTriggerInput,
    WebTriggerOutput,
)

__all__ = [
    "AppInfo",
    "DownloadCompletedInput",
    "DownloadCompletedOutput",
    "ErrorCode",
    "EventInput",
    "EventLogRecord",
    "EventOutput",
    "EventUrlProvider",
    "ExecuteInput",
    "ExecuteOutput",
    "FederatedComputeInput",
    "FederatedComputeScheduleRequest",
    "FederatedComputeScheduleResponse",
    "FederatedComputeScheduler",
    "IllegalState",
    "InferenceInput",
    "InferenceOutput",
    "InferenceParams",
    "IsolatedService",
    "IsolatedServiceException",
    "IsolatedWorker",
    "KeyValueStore",
    "LogReader",
    "ModelManager",
    "ModelType",
    "MutableKeyValueStore",
    "OnDevicePersonalizationException",
    "Params",
    "RenderInput",
    "RenderOutput",
    "RenderingConfig",
    "RequestLogRecord",
    "RequestToken",
    "SchedulingMode",
    "TrainingExampleInput",
    "TrainingExampleOutput",
    "TrainingExampleRecord",
    "TrainingInterval",
    "UserData",
    "WebTriggerInput",
    "WebTriggerOutput",
    "example_query_result",
    "training_example",
]
