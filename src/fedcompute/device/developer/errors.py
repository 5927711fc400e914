"""What a developer's code raises, and what it or an app gets raised (spec/device.md 7.1, 7.10)."""

from enum import IntEnum


class IsolatedServiceException(Exception):
    """A hook's own way to fail. `code`: 1 to 127, the developer's; 0 says nothing. The app never sees it."""

    def __init__(self, code: int = 0, message: str = "") -> None:
        super().__init__(message or f"error {code} of the service")
        self.code = code


class IllegalState(RuntimeError):
    """A facility that the operation does not have, or that cannot answer now."""


class ErrorCode(IntEnum):
    """Why a call to the platform failed; the numbers are Android's."""

    ISOLATED_SERVICE_FAILED = 1
    PERSONALIZATION_DISABLED = 2
    ISOLATED_SERVICE_LOADING_FAILED = 3
    ISOLATED_SERVICE_MANIFEST_PARSING_FAILED = 4
    ISOLATED_SERVICE_TIMEOUT = 5
    SCHEDULE_TRAINING_FAILED = 6
    INVALID_TRAINING_MANIFEST = 7
    INFERENCE_MODEL_NOT_FOUND = 8
    INFERENCE_FAILED = 9


class OnDevicePersonalizationException(Exception):
    """A call to the platform that failed, with its code."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{message} [{code.name.lower()}]")
        self.code = code


class Status(IntEnum):
    """How an operation ended inside the device (spec 7.10); what a refused facility answers with."""

    SUCCESS = 0
    INTERNAL = 100
    NAME_NOT_FOUND = 101
    CLASS_NOT_FOUND = 102
    SERVICE_FAILED = 103
    PERSONALIZATION_DISABLED = 104
    KEY_NOT_FOUND = 105
    MANIFEST_PARSING_FAILED = 106
    MANIFEST_MISCONFIGURED = 107
    LOADING_FAILED = 108
    SERVICE_TIMEOUT = 109
    FEDERATED_COMPUTE_MANIFEST_INVALID = 110
    CALLER_NOT_ALLOWED = 115
    PERMISSION_DENIED = 117
    LOCAL_DATA_READ_ONLY = 118
    TIMESTAMPS_INVALID = 120
    DATA_ACCESS = 126
    LOCAL_WRITE = 127
    NOT_ENOUGH_DATA = 129
