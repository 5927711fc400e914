"""The flags of a device, by the names that Android's `device_config` has for them (spec/device.md 6.8, 8.2, 8.4).

Defaults are Android's, except that nothing is switched off, every app may call and every service may run, and keys come
from the server's own key service.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from fedcompute.device.state.database import Transaction
from fedcompute.errors import OperationFailed, Reason

TEXT_LIMIT = 10_000
_PREFIX = "flag."
_GIGABYTE = 1 << 30

Value = bool | int | float | str
_V = TypeVar("_V", bool, int, float, str)


@dataclass(frozen=True)
class Flag:
    """What a flag says of itself; the type of its default is the type of its values.

    `no_effect`: why setting it changes nothing here, empty where it does. `ours`: whether Android has no such flag.
    """

    name: str
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    no_effect: str = ""
    ours: bool = False

    @property
    def kind(self) -> str:
        """`boolean`, `integer`, `number` or `text`."""
        return _KINDS[type(self.default)]

    def read(self, text: str) -> Value:
        """The value that a text stands for. Raises OperationFailed (SETTINGS_INVALID) for one that is none."""
        value = self._parse(text.strip())
        why = "" if value is not None else f"is no {self.kind}"
        if isinstance(value, str):
            if len(value) > TEXT_LIMIT or not value.isprintable():
                why = f"is no line of at most {TEXT_LIMIT} characters"
            elif self.choices and value not in self.choices:
                why = f"is none of {', '.join(self.choices)}"
        elif value is not None and type(value) is not bool:
            if self.minimum is not None and value < self.minimum:
                why = f"is below {self.minimum:.10g}"
            elif self.maximum is not None and value > self.maximum:
                why = f"is above {self.maximum:.10g}"
        if value is None or why:
            raise OperationFailed(Reason.SETTINGS_INVALID, f"{self.name}: {text[:80]!r} {why}", remedy=self.help)
        return value

    def show(self, value: Value) -> str:
        """The text that `read` reads to `value`."""
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _parse(self, text: str) -> Value | None:
        try:
            match self.kind:
                case "boolean":
                    return {"true": True, "false": False}.get(text.lower())
                case "integer":
                    value = int(text)
                    return value if abs(value) < 1 << 53 else None
                case "number":
                    number = float(text)
                    return number if math.isfinite(number) else None
        except ValueError:
            return None
        return text


_KINDS: Mapping[type, str] = {bool: "boolean", int: "integer", float: "number", str: "text"}

_LOGGED = "what goes wrong is always in the device's log"
_FRAMEWORK = "a switch of Android's job framework"
_ONE_DEADLINE = "isolated_service_deadline_seconds holds for every operation, as on Android"
_NO_REPORTS = "counts of errors stay on the device"
_TRUE_FALSE = ("auto", "true", "false")

_ALL = (
    # Federated computation, spec 6.8.
    Flag("federated_compute_kill_switch", False, "stops federated tasks: none runs and none is scheduled"),
    Flag("fcp_encryption_key_download_url", "", "URL of the encryption keys; empty: the server's own key service"),
    Flag("enable_background_encryption_key_fetch", True, "fetch encryption keys once a day"),
    Flag("fcp_enable_encryption", True, "encrypt updates"),
    Flag("http_request_retry_limit", 3, "attempts of a request in all", 1, 20),
    Flag("default_scheduling_period_secs", 300, "a new task runs within this time", 1),
    Flag("min_scheduling_interval_secs_for_federated_computation", 60, "shortest interval of recurrent tasks", 1),
    Flag("max_scheduling_interval_secs_for_federated_computation", 518_400, "longest interval of recurrent tasks", 1),
    Flag("max_scheduling_period_secs", 172_800, "longest delay that a server can ask for", 1),
    Flag("transient_error_retry_delay_secs", 900, "delay after a failure for which nobody names another", 1),
    Flag("transient_error_retry_delay_jitter_percent", 0.2, "share by which that delay varies, 0.2 for 20 %", 0, 0.99),
    Flag("tf_error_reschedule_seconds", 86_400, "delay after a failed training that the server took note of", 0),
    Flag("reschedule_limit", 6, "counted failures that a one-time task survives", 0),
    Flag("recurrent_reschedule_limit", 100, "counted failures in a row that a recurrent task survives", 0),
    Flag("task_limit_per_package", 50, "tasks of one package", 0),
    Flag("training_min_battery_level", 30, "percent of battery below which no run starts", 0, 100),
    Flag("training_thermal_to_throttle", 2, "thermal status, 0 to 6, from which on no run starts", 0, 7),
    Flag("training_condition_check_period_throttle_period_mills", 1000, "a start so soon after one is not checked", 0),
    Flag("memory_size_limit", 50_000_000, "free bytes for temporary files below which no run starts", 0),
    Flag("checkpoint_file_size_limit", 50_000_000, "bytes of a checkpoint", 1),
    Flag("enable_eligibility_task", True, "obey the eligibility policies of assignments"),
    Flag("task_history_ttl_millis", 604_800_000, "for how long contributions are remembered", 0),
    Flag("example_store_service_timeout_sec", 10, "how long a run waits for its examples", 1),
    Flag(
        "example_iterator_next_timeout_sec", 2, "how long a run waits for one example",
        no_effect="examples come all at once; Android does not read it either",
    ),
    Flag("fcp_enable_client_error_logging", False, "log errors of runs", no_effect=_LOGGED),
    Flag("fcp_enable_background_jobs_logging", False, "log background jobs", no_effect=_LOGGED),
    Flag("fcp_background_job_logging_sampling_rate", 10, "percent of jobs logged", no_effect=_LOGGED),
    Flag("fcp_job_scheduling_logging_enabled", False, "log schedules", no_effect=_LOGGED),
    Flag("fcp_job_scheduling_logging_sampling_rate", 10, "percent of schedules logged", no_effect=_LOGGED),
    Flag("fcp_module_job_policy", "", "policy of jobs", no_effect=_FRAMEWORK),
    Flag("fcp_spe_pilot_job_enabled", False, "try another scheduler", no_effect=_FRAMEWORK),
    # Overrides for tests, spec 8.2.
    Flag("override_fc_server_url_package", "", "package whose tasks go to override_fc_server_url"),
    Flag("override_fc_server_url", "", "server of that package's tasks; schedule again after a change"),
    Flag("override_download_url_package", "", "package that downloads from override_download_url"),
    Flag("override_download_url", "", "where that package downloads from"),
    # Personalization, spec 8.4.
    Flag("global_kill_switch", False, "stops every operation, task and background job but the wipe of withdrawn data"),
    Flag("enable_personalization_status_override", False, "take consent from personalization_status_override_value"),
    Flag("personalization_status_override_value", False, "both consents, where they are overridden"),
    Flag("isolated_service_deadline_seconds", 30, "how long an operation of a service may take", 1),
    *(
        Flag(f"{flow}_flow_deadline_seconds", 30, f"how long the {flow} flow may take", no_effect=_ONE_DEADLINE)
        for flow in ("app_request", "render", "web_view", "web_trigger", "example_store", "download")
    ),
    Flag("caller_app_allow_list", "*", "apps that may call: package or package:CERTIFICATE, commas between, * for all"),
    Flag("isolated_service_allow_list", "*", "services that may run, likewise; what others have stored is removed"),
    Flag("output_data_allow_list", "", "who may return values: app;service, each package[:CERTIFICATE], with commas"),
    Flag("trusted_partner_apps_list", "", "partner apps", no_effect="nothing here depends on partners"),
    Flag(
        "platform_data_for_training_allowlist", "", "services that see the list of apps in training",
        no_effect="platform_data_for_execute_allowlist holds for training too, as on Android",
    ),
    Flag("platform_data_for_execute_allowlist", "", "services that see the list of apps"),
    Flag(
        "log_isolated_service_error_code_non_aggregated_allowlist", "", "services whose codes are reported one by one",
        no_effect=_NO_REPORTS,
    ),
    Flag(
        "shared_isolated_process_feature_enabled", True, "run services in one process",
        no_effect="every operation has a process of its own",
    ),
    Flag(
        "user_control_cache_duration_millis", 86_400_000, "for how long a consent is remembered",
        no_effect="consent is stored on the device and read at every use",
    ),
    Flag("reset_data_delay_seconds", 86_400, "how long after consent is revoked the user's data goes", 0, 108_000),
    Flag(
        "reset_data_deadline_seconds", 108_000, "when that data goes whatever the device does",
        no_effect="the wipe waits for no condition, so it comes with the delay",
    ),
    Flag(
        "app_install_history_ttl", 2_592_000_000, "milliseconds that a removed app stays in the list of apps",
        no_effect="services see the apps that are installed",
    ),
    Flag("noise_for_execute_best_value", 0.1, "probability that a best value is replaced by a random one", 0, 1),
    Flag("max_int_values_limit", 100, "largest best value that an app can ask for", 0, (1 << 31) - 1),
    Flag(
        "isolated_service_debugging_enabled", False, "show an app the codes of its service",
        no_effect="`fedcompute device logs` shows them to the developer",
    ),
    Flag("odp_enable_client_error_logging", False, "log errors of operations", no_effect=_LOGGED),
    Flag(
        "Odp__enable_plugin_process_runner", False, "another way to start services",
        no_effect="there is one way, an isolated process",
    ),
    Flag(
        "Odp__enable_is_feature_enabled", False, "answer whether a feature is on",
        no_effect="no feature is registered, on Android neither",
    ),
    Flag("Odp__enable_aggregated_error_reporting", False, "report counts of errors", no_effect=_NO_REPORTS),
    Flag("Odp__encryption_key_download_url", "", "URL of the keys for such reports", no_effect=_NO_REPORTS),
    Flag("Odp__encryption_key_max_age_seconds", 1_209_600, "lifetime of such keys", no_effect=_NO_REPORTS),
    Flag(
        "adservices_ipc_call_timeout_in_millis", 5000, "how long a question about consent may take",
        no_effect="consent is stored on the device",
    ),
    # Ours: what Android has as a constant, or decides by itself.
    Flag("task_ttl_secs", 604_800, "a task not scheduled again for so long is removed; 0: never", 0, ours=True),
    Flag("training_time_limit_secs", 600, "how long a run may take", 1, 86_400, ours=True),
    Flag("http_request_retry_delay_millis", 200, "pause before a second attempt; it doubles", 0, 60_000, ours=True),
    Flag("training_memory_bytes", 4 * _GIGABYTE, "private memory of a training", _GIGABYTE, ours=True),
    Flag("isolated_service_memory_bytes", _GIGABYTE, "private memory of a service", 64 << 20, ours=True),
    Flag("local_data_bytes_limit", 100_000_000, "bytes that a service may store in its local data", 0, ours=True),
    Flag("condition_idle", "auto", "whether the device is idle; auto: asks it", choices=_TRUE_FALSE, ours=True),
    Flag("condition_unmetered", "auto", "whether the network costs nothing", choices=_TRUE_FALSE, ours=True),
    Flag(
        "condition_battery_percent", "auto", "level of a battery that is not charging, 0 to 100, or auto",
        choices=("auto", *map(str, range(101))), ours=True,
    ),
    Flag(
        "condition_thermal_status", "auto", "0, no heat, to 6, shutting down, or auto",
        choices=("auto", *map(str, range(7))), ours=True,
    ),
)  # fmt: skip

FLAGS: Mapping[str, Flag] = MappingProxyType({flag.name: flag for flag in _ALL})
"""Every flag by name, in the order in which people read them."""


@dataclass(frozen=True)
class Flags:
    """All flags at one moment: defaults, and what was changed of them. A flag of another type is a TypeError."""

    changed: Mapping[str, Value] = field(default_factory=dict)

    def boolean(self, name: str) -> bool:
        return self._value(name, bool)

    def integer(self, name: str) -> int:
        return self._value(name, int)

    def number(self, name: str) -> float:
        return self._value(name, float)

    def text(self, name: str) -> str:
        return self._value(name, str)

    def _value(self, name: str, kind: type[_V]) -> _V:
        value = self.changed.get(name, FLAGS[name].default)
        if type(value) is not kind:
            raise TypeError(f"{name} is of the type {FLAGS[name].kind}")
        return value


@dataclass(frozen=True)
class FlagState:
    """A flag, its value now, and whether somebody has set it."""

    flag: Flag
    value: Value
    is_set: bool


def flags(tx: Transaction) -> Flags:
    """The flags as they are now. Raises OperationFailed (SETTINGS_INVALID) if a stored value is none."""
    rows = tx.execute("SELECT name, value FROM setting WHERE name GLOB ?", (_PREFIX + "*",))
    stored = {name.removeprefix(_PREFIX): bytes(value).decode() for name, value in rows}
    # A flag of another release is left alone.
    return Flags({name: FLAGS[name].read(text) for name, text in stored.items() if name in FLAGS})


def put_flag(tx: Transaction, name: str, text: str) -> None:
    """Sets a flag. Raises OperationFailed (SETTINGS_INVALID) for a name or value that is none."""
    flag = _flag(name)
    tx.execute(
        "INSERT INTO setting VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (_PREFIX + name, flag.show(flag.read(text)).encode()),
    )


def delete_flag(tx: Transaction, name: str) -> bool:
    """Gives a flag its default again; whether it was set. Raises OperationFailed (SETTINGS_INVALID) for no flag."""
    return tx.execute("DELETE FROM setting WHERE name = ?", (_PREFIX + _flag(name).name,)).rowcount > 0


def find_flag(tx: Transaction, name: str) -> FlagState:
    """One flag. Raises OperationFailed (SETTINGS_INVALID) for no flag."""
    flag, changed = _flag(name), flags(tx).changed
    return FlagState(flag, changed.get(name, flag.default), name in changed)


def list_flags(tx: Transaction) -> tuple[FlagState, ...]:
    """Every flag, in the order of `FLAGS`."""
    changed = flags(tx).changed
    return tuple(FlagState(flag, changed.get(name, flag.default), name in changed) for name, flag in FLAGS.items())


def _flag(name: str) -> Flag:
    flag = FLAGS.get(name)
    if flag is None:
        near = difflib.get_close_matches(name, FLAGS, 1, 0.6)
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"there is no flag {name[:80]!r}",
            remedy=f"did you mean {near[0]}?" if near else "`fedcompute device config list` shows every flag",
        )
    return flag
