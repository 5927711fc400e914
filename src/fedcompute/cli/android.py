"""What points a test phone at a server: adb commands (spec/device.md 8.2, 8.5). The guide is docs/android.md."""

import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit

from fedcompute.errors import OperationFailed, Reason

SAMPLE_PACKAGE = "com.example.odpsample"

_LOG_TAGS = ("ondevicepersonalization", "federatedcompute", "OdpSample")
_OVERRIDE = "debug.ondevicepersonalization.override_fc_server_url"


def adb_commands(base_url: str, key_url: str, *, encryption: bool) -> list[str]:
    """The commands, in the order to run them in, for the sample app and a server that phones know as `base_url`.

    `encryption`: whether phones are to encrypt. Raises OperationFailed(SETTINGS_INVALID) for a URL that phones refuse.
    """
    port = _forwarded_port(base_url)
    flags = {
        "global_kill_switch": "false",
        "federated_compute_kill_switch": "false",
        "enable_ondevicepersonalization_apis": "true",
        "enable_personalization_status_override": "true",
        "personalization_status_override_value": "true",
        # By default these name the platform's own tests and samples only.
        "caller_app_allow_list": SAMPLE_PACKAGE,
        "isolated_service_allow_list": SAMPLE_PACKAGE,
        "fcp_enable_client_error_logging": "true",
        "odp_enable_client_error_logging": "true",
        "example_store_service_timeout_sec": "30",
        "fcp_encryption_key_download_url": key_url,
        "fcp_enable_encryption": "true" if encryption else "false",
    }
    properties = {
        **{f"log.tag.{tag}": "VERBOSE" for tag in _LOG_TAGS},
        f"{_OVERRIDE}_package": SAMPLE_PACKAGE,
        _OVERRIDE: base_url,
    }
    return [
        *([f"adb reverse tcp:{port} tcp:{port}"] if port is not None else []),
        _shell("device_config", "set_sync_disabled_for_tests", "persistent"),
        *(_shell("device_config", "put", "on_device_personalization", *flag) for flag in flags.items()),
        *(_shell("setprop", *one) for one in properties.items()),
    ]


def phone_lines(commands: Sequence[str]) -> str:
    """The commands as further lines of the server's announcement; empty without any."""
    head = f"for a test phone with the sample app; for yours put its package for {SAMPLE_PACKAGE} (docs/android.md):"
    return "".join(f"\n{line}" for line in (head, *commands)) if commands else ""


def _forwarded_port(base_url: str) -> int | None:
    """The port that the phone's own localhost must lead to this machine, None where the URL names another host."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not base_url.startswith(("https://", "http://localhost:")) or (parts.scheme != "https" and port is None):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            "phones refuse the public URL of this server: they take https://, and http://localhost:PORT",
            remedy="set --public-url to an https:// URL with a certificate that the phone trusts, or leave it out and "
            "connect the phone by USB",
        )
    return (port or 443) if parts.hostname == "localhost" else None


def _shell(*words: str) -> str:
    command = shlex.join(words)
    # The phone's shell reads what this machine's has read already.
    return f"adb shell {command if command == ' '.join(words) else shlex.quote(command)}"
