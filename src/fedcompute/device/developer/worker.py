"""What a developer writes: a worker with a hook for each operation (spec/device.md 7.1).

Inputs and outputs travel between processes, so they are plain data; an output that breaks a limit stated here fails
its operation and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedcompute.device.developer.key_values import KeyValueStore
from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord, Row, check_columns

DEFAULT_BEST_VALUE = -1
_MAX_BEST_VALUE = (1 << 31) - 1


@dataclass(frozen=True)
class ExecuteInput:
    """What an app asks for: its own package, and parameters of its choice."""

    app_package_name: str
    app_params: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_columns(self.app_params)


@dataclass(frozen=True)
class RenderingConfig:
    """What is to be shown: keys of remote data, which `on_render` gets."""

    keys: Sequence[str] = ()


@dataclass(frozen=True)
class ExecuteOutput:
    """What the device does with the answer.

    `request_log_record` is kept, with the events that belong to it; `rendering_config` lets the app show something
    without seeing it; `output_data` stays on the device; `best_value`: 0 or more, reaches the app, noised, only where
    it is allowed.
    """

    request_log_record: RequestLogRecord | None = None
    rendering_config: RenderingConfig | None = None
    event_log_records: Sequence[EventLogRecord] = ()
    output_data: bytes | None = field(default=None, repr=False)
    best_value: int = DEFAULT_BEST_VALUE

    def __post_init__(self) -> None:
        if not DEFAULT_BEST_VALUE <= self.best_value <= _MAX_BEST_VALUE:
            raise ValueError(f"best_value is {self.best_value}, not 0 to {_MAX_BEST_VALUE}")


@dataclass(frozen=True)
class DownloadCompletedInput:
    """What has just been downloaded; it is not remote data yet."""

    downloaded_contents: KeyValueStore


@dataclass(frozen=True)
class DownloadCompletedOutput:
    """`retained_keys`: all keys that remote data shall have from now on, new and old. None at all empties it."""

    retained_keys: Sequence[str] = ()


@dataclass(frozen=True)
class RenderInput:
    """How much room there is, in pixels, and what `on_execute` chose."""

    width: int
    height: int
    rendering_config: RenderingConfig


@dataclass(frozen=True)
class RenderOutput:
    """`content`: HTML; or `template_id`: the key of remote data that holds HTML in which `$name` stands for a value of
    `template_params`.
    """

    content: str | None = None
    template_id: str | None = None
    template_params: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class EventInput:
    """An event URL was opened: the record of the request that was shown, if it left one, and the URL's parameters."""

    request_log_record: RequestLogRecord | None = None
    parameters: Row = field(default_factory=dict)


@dataclass(frozen=True)
class EventOutput:
    """What to keep of the event; the same type for the same row is kept once."""

    event_log_record: EventLogRecord | None = None


@dataclass(frozen=True)
class TrainingExampleInput:
    """Which examples are wanted. `task_name` is the task id; `resumption_token` is that of the last example that a
    successful run of this task used, None at first; `collection_name` is the selector's collection, if it names one.
    """

    population_name: str
    task_name: str
    resumption_token: bytes | None = None
    collection_name: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingExampleRecord:
    """One serialized `tf.train.Example`, and the token with which the next query resumes behind it."""

    # Not in what logs may quote.
    training_example: bytes = field(repr=False)
    resumption_token: bytes | None = None


@dataclass(frozen=True)
class TrainingExampleOutput:
    """The records in training order; none at all means that there is not enough data."""

    training_example_records: Sequence[TrainingExampleRecord] = ()


@dataclass(frozen=True)
class WebTriggerInput:
    """A web page asked for it: where the user was, by which app, and what the page sent."""

    destination_url: str
    app_package_name: str
    data: bytes = b""


@dataclass(frozen=True)
class WebTriggerOutput:
    """What to keep of it, as of an `ExecuteOutput`."""

    request_log_record: RequestLogRecord | None = None
    event_log_records: Sequence[EventLogRecord] = ()


class IsolatedWorker:
    """Base of a developer's worker. Hooks not overridden give empty outputs.

    A hook answers by returning, or by being a coroutine function. An exception fails its operation, nothing else;
    `IsolatedServiceException` gives it a code of the developer's own.
    """

    def on_execute(self, request: ExecuteInput) -> ExecuteOutput:
        """An app asks for a decision."""
        return ExecuteOutput()

    def on_download_completed(self, request: DownloadCompletedInput) -> DownloadCompletedOutput:
        """A download is there: what of it, and of the data before it, is kept. The default keeps nothing."""
        return DownloadCompletedOutput()

    def on_render(self, request: RenderInput) -> RenderOutput:
        """HTML for what `on_execute` chose."""
        return RenderOutput()

    def on_event(self, request: EventInput) -> EventOutput:
        """An event URL in rendered content was opened."""
        return EventOutput()

    def on_training_examples(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        """The platform's own name for the hook; override this one or `on_training_example`."""
        return self.on_training_example(request)

    def on_training_example(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        """The training data of `request.population_name`."""
        return TrainingExampleOutput()

    def on_web_trigger(self, request: WebTriggerInput) -> WebTriggerOutput:
        """A web page asks for a record to be kept."""
        return WebTriggerOutput()
