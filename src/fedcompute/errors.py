"""The error catalogue: every way in which input, an artifact or an operation can be refused.

A raise names a `Reason` and says with numbers what happened; the catalogue adds the HTTP status and the remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Stable codes, as they appear in responses, stored rejections and logs."""

    # Requests
    MALFORMED_REQUEST = "malformed_request"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    REQUEST_TOO_LARGE = "request_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    REQUEST_TOO_SLOW = "request_too_slow"
    BAD_SIGNATURE = "bad_signature"
    URL_EXPIRED = "url_expired"
    NOT_FOUND = "not_found"
    API_KEY_MISSING = "api_key_missing"
    API_KEY_INVALID = "api_key_invalid"
    ROLE_INSUFFICIENT = "role_insufficient"
    FOREIGN_ORIGIN = "foreign_origin"
    ASSIGNMENT_NOT_ACTIVE = "assignment_not_active"
    ATTESTATION_MALFORMED = "attestation_malformed"
    ATTESTATION_UNTRUSTED = "attestation_untrusted"
    ATTESTATION_REVOKED = "attestation_revoked"
    ATTESTATION_STALE = "attestation_stale"
    ATTESTATION_DEVICE = "attestation_device"
    ATTESTATION_PACKAGE = "attestation_package"
    ATTESTATION_UNAVAILABLE = "attestation_unavailable"
    ENROLMENT_REFUSED = "enrolment_refused"
    PROOF_NOT_TAKEN = "proof_not_taken"
    TOKEN_TAKEN = "token_taken"
    TASK_CONFLICT = "task_conflict"
    TASK_INVALID = "task_invalid"
    TASK_ENDED = "task_ended"
    # Contributions
    UPLOAD_MISSING = "upload_missing"
    UPLOAD_TRUNCATED = "upload_truncated"
    UPLOAD_TOO_LARGE = "upload_too_large"
    UPLOAD_NOT_ENCRYPTED = "upload_not_encrypted"
    UNKNOWN_KEY = "unknown_key"
    DECRYPTION_FAILED = "decryption_failed"
    WRONG_LEAF_NAMES = "wrong_leaf_names"
    WRONG_LEAF_SHAPE = "wrong_leaf_shape"
    WRONG_LEAF_TYPE = "wrong_leaf_type"
    NOT_FINITE = "not_finite"
    NORM_TOO_LARGE = "norm_too_large"
    WRONG_COUNT = "wrong_count"
    # Artifacts
    CHECKPOINT_MALFORMED = "checkpoint_malformed"
    CHECKPOINT_TOO_LARGE = "checkpoint_too_large"
    PLAN_MALFORMED = "plan_malformed"
    PLAN_UNSUPPORTED = "plan_unsupported"
    PARTIAL_SUM_MALFORMED = "partial_sum_malformed"
    PARTIAL_SUM_MISMATCH = "partial_sum_mismatch"
    STATE_MISMATCH = "state_mismatch"
    GRAPH_FAILED = "graph_failed"
    SAVED_MODEL_INVALID = "saved_model_invalid"
    MODEL_UNSUPPORTED = "model_unsupported"
    KEY_MALFORMED = "key_malformed"
    SECRET_UNREADABLE = "secret_unreadable"
    DATASET_MALFORMED = "dataset_malformed"
    METRICS_MALFORMED = "metrics_malformed"
    LEDGER_MALFORMED = "ledger_malformed"
    LEDGER_TAMPERED = "ledger_tampered"
    # Building
    CONFIG_UNREADABLE = "config_unreadable"
    CONFIG_INVALID = "config_invalid"
    OPS_NOT_SUPPORTED = "ops_not_supported"
    BUILD_FAILED = "build_failed"
    ARTIFACT_UPLOAD_FAILED = "artifact_upload_failed"
    TASK_MANAGEMENT_FAILED = "task_management_failed"
    # Devices
    URL_NOT_ALLOWED = "url_not_allowed"
    SERVER_UNREACHABLE = "server_unreachable"
    SERVER_ANSWER_INVALID = "server_answer_invalid"
    PLAN_ARGUMENT_INVALID = "plan_argument_invalid"
    PLAN_COMPUTATION_FAILED = "plan_computation_failed"
    RUN_CANCELLED = "run_cancelled"
    RUN_FAILED = "run_failed"
    EXAMPLES_FAILED = "examples_failed"
    NO_ENCRYPTION_KEY = "no_encryption_key"
    WORKER_FAILED = "worker_failed"
    TRAINING_ABORTED = "training_aborted"
    MANIFEST_INVALID = "manifest_invalid"
    ISOLATION_UNAVAILABLE = "isolation_unavailable"
    # Operation
    STORAGE_FAILED = "storage_failed"
    KEY_SERVICE_FAILED = "key_service_failed"
    CLUSTER_UNREACHABLE = "cluster_unreachable"
    KEYS_HELD_ELSEWHERE = "keys_held_elsewhere"
    BACKUP_DAMAGED = "backup_damaged"
    BACKUP_FOREIGN = "backup_foreign"
    BACKUP_TARGET_IN_USE = "backup_target_in_use"
    BLOB_STORE_UNSUITABLE = "blob_store_unsuitable"
    DATA_IN_USE = "data_in_use"
    SERVER_STOPPING = "server_stopping"
    SERVER_BUSY = "server_busy"
    BLOB_TOO_LARGE = "blob_too_large"
    SETTINGS_INVALID = "settings_invalid"
    TLS_INVALID = "tls_invalid"
    BUDGET_SPENT = "budget_spent"
    BUDGET_INVALID = "budget_invalid"
    ROUND_EXPIRED = "round_expired"
    STOP_TIME_PASSED = "stop_time_passed"
    ARTIFACTS_MISSING = "artifacts_missing"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Entry:
    """What a reason means for the caller of an HTTP route, and what a person can do about it."""

    status: int
    remedy: str


_DEFAULT = Entry(500, "look at the server's log for the request's id")

CATALOGUE: Mapping[Reason, Entry] = {
    Reason.MALFORMED_REQUEST: Entry(400, "send the message that the route documents, as binary protobuf"),
    Reason.UNSUPPORTED_MEDIA_TYPE: Entry(415, "set content-type: application/x-protobuf"),
    Reason.REQUEST_TOO_LARGE: Entry(413, "send less, or raise the limit in the server's settings"),
    Reason.HEADERS_TOO_LARGE: Entry(431, "send fewer and shorter headers; 64 KiB in all are taken"),
    Reason.REQUEST_TOO_SLOW: Entry(408, "send again over a better connection"),
    Reason.BAD_SIGNATURE: Entry(403, "use the signed URL exactly as it was handed out, headers included"),
    Reason.URL_EXPIRED: Entry(403, "ask the server for a fresh URL"),
    Reason.NOT_FOUND: Entry(404, "check the names and ids in the URL"),
    Reason.API_KEY_MISSING: Entry(
        401, "make one with `fedcompute api-key create`; send it as Authorization: Bearer, commands with --api-key-file"
    ),
    Reason.API_KEY_INVALID: Entry(401, "use a live key of this server; `fedcompute api-key list` shows them"),
    Reason.ROLE_INSUFFICIENT: Entry(403, "use a key with the role that the message names"),
    Reason.FOREIGN_ORIGIN: Entry(403, "send the request from a program, or with an API key"),
    Reason.ATTESTATION_MALFORMED: Entry(403, "send the certificate chain of an attested key, leaf first"),
    Reason.ATTESTATION_UNTRUSTED: Entry(403, "if you trust such devices, add their root to attestation_roots"),
    Reason.ATTESTATION_REVOKED: Entry(403, "nothing; the maker of the device withdrew its keys"),
    Reason.ATTESTATION_STALE: Entry(403, "the device answers a fresh challenge"),
    Reason.ATTESTATION_DEVICE: Entry(403, "use a device with a locked boot loader, or allow_rooted_devices for tests"),
    Reason.ATTESTATION_PACKAGE: Entry(403, "add package and signature to attestation_packages, if you trust them"),
    Reason.ATTESTATION_UNAVAILABLE: Entry(503, "check the attestation service, its URL and its key"),
    Reason.ENROLMENT_REFUSED: Entry(403, "enrol the device again with `fedcompute enrolment create`"),
    Reason.PROOF_NOT_TAKEN: Entry(403, "set authentication to both, if these devices are to be taken too"),
    Reason.TOKEN_TAKEN: Entry(403, "the device chooses a fresh random token for every proof"),
    Reason.ASSIGNMENT_NOT_ACTIVE: Entry(404, "check in again; this assignment is over"),
    Reason.TASK_CONFLICT: Entry(409, "finish or cancel the active task of this kind first"),
    Reason.TASK_ENDED: Entry(409, "look at `fedcompute task show`, correct the cause, and build the task again"),
    Reason.TASK_INVALID: Entry(400, "correct the task's fields and send it again"),
    Reason.UPLOAD_MISSING: Entry(404, "the device reported success and uploaded nothing; nothing to do"),
    Reason.UPLOAD_TRUNCATED: Entry(400, "the device uploads again in a later round"),
    Reason.UPLOAD_TOO_LARGE: Entry(413, "raise the upload limit if the model is really that large"),
    Reason.UPLOAD_NOT_ENCRYPTED: Entry(400, "turn encryption on at the device, or allow plaintext uploads"),
    Reason.UNKNOWN_KEY: Entry(400, "the device fetches fresh keys from the key service"),
    Reason.DECRYPTION_FAILED: Entry(400, "the device fetches fresh keys from the key service"),
    Reason.WRONG_LEAF_NAMES: Entry(400, "the device must run the plan of its own assignment"),
    Reason.WRONG_LEAF_SHAPE: Entry(400, "the device must run the plan of its own assignment"),
    Reason.WRONG_LEAF_TYPE: Entry(400, "the device must run the plan of its own assignment"),
    Reason.NOT_FINITE: Entry(400, "lower the client learning rate, or check the device's data"),
    Reason.NORM_TOO_LARGE: Entry(400, "the device runs a plan that does not clip; rebuild the task"),
    Reason.WRONG_COUNT: Entry(400, "the device must run the plan of its own assignment"),
    Reason.CHECKPOINT_MALFORMED: Entry(400, "write the checkpoint again; the file is damaged or no V1 checkpoint"),
    Reason.CHECKPOINT_TOO_LARGE: Entry(413, "raise the checkpoint limits if the model is really that large"),
    Reason.PLAN_MALFORMED: Entry(400, "build the plan again"),
    Reason.PLAN_UNSUPPORTED: Entry(400, "build the plan with this system's task builder"),
    Reason.PARTIAL_SUM_MALFORMED: Entry(
        500, "check the storage; the uploads that the sum held are lost or damaged too"
    ),
    Reason.PARTIAL_SUM_MISMATCH: Entry(500, "check the storage; the uploads that the sum held are lost or damaged too"),
    Reason.STATE_MISMATCH: Entry(400, "upload the initial checkpoint that was built with this plan"),
    Reason.GRAPH_FAILED: Entry(500, "read the cause in the message; build the plan again if it names one of its parts"),
    Reason.SAVED_MODEL_INVALID: Entry(400, "save the model with save_functional_model"),
    Reason.MODEL_UNSUPPORTED: Entry(400, "change the model as the message says"),
    Reason.KEY_MALFORMED: Entry(400, "publish 32-byte X25519 keys in standard base64"),
    Reason.SECRET_UNREADABLE: Entry(500, "restore the database and the blobs of one server together"),
    Reason.DATASET_MALFORMED: Entry(400, "check the path, and that the file is of the stated format"),
    Reason.METRICS_MALFORMED: Entry(400, "leave the round out, or restore its metrics file"),
    Reason.LEDGER_MALFORMED: Entry(400, "download the ledger again with `fedcompute privacy ledger`"),
    Reason.LEDGER_TAMPERED: Entry(
        400, "trust no epsilon of this population; restore the ledger from a copy that verifies"
    ),
    Reason.CONFIG_UNREADABLE: Entry(400, "correct the line that the message names"),
    Reason.CONFIG_INVALID: Entry(400, "correct the fields that the message names"),
    Reason.OPS_NOT_SUPPORTED: Entry(400, "change the model, or build with --skip_flex_ops_check"),
    Reason.BUILD_FAILED: Entry(500, "read the cause in the message; it names the failing step"),
    Reason.ARTIFACT_UPLOAD_FAILED: Entry(502, "check that the storage behind the task's URLs takes uploads"),
    Reason.TASK_MANAGEMENT_FAILED: Entry(502, "check the task management URL and that the server runs"),
    Reason.URL_NOT_ALLOWED: Entry(400, "use https://, or http://localhost: with a port"),
    Reason.SERVER_UNREACHABLE: Entry(503, "check the URL and that the server runs"),
    Reason.SERVER_ANSWER_INVALID: Entry(502, "check that the URL is that of a federated compute server"),
    Reason.PLAN_ARGUMENT_INVALID: Entry(400, "build the plan again; its parts do not fit each other"),
    Reason.PLAN_COMPUTATION_FAILED: Entry(400, "check that the examples fit the model's input specification"),
    Reason.RUN_FAILED: Entry(400, "see `fedcompute device logs`; the task stays scheduled as `device status` shows"),
    Reason.RUN_CANCELLED: Entry(409, "nothing; the device takes part again at its next turn"),
    Reason.EXAMPLES_FAILED: Entry(400, "correct the worker's on_training_example"),
    Reason.NO_ENCRYPTION_KEY: Entry(503, "check the key service's URL"),
    Reason.WORKER_FAILED: Entry(400, "read what the app's service printed: `fedcompute device logs`"),
    Reason.TRAINING_ABORTED: Entry(
        400, "a smaller model or fewer examples, or raise training_memory_bytes or training_time_limit_secs"
    ),
    Reason.MANIFEST_INVALID: Entry(400, "correct the line that the message names"),
    Reason.ISOLATION_UNAVAILABLE: Entry(
        500, "use a Linux kernel with Landlock and seccomp, or accept what is reported with `--isolation report`"
    ),
    Reason.STORAGE_FAILED: Entry(500, "check the storage's space, rights and connection"),
    Reason.KEY_SERVICE_FAILED: Entry(
        503, "check the key coordinators, the identity tokens and the key management service; what needs them waits"
    ),
    Reason.CLUSTER_UNREACHABLE: Entry(
        503, "check that the Ray cluster runs, and `ray status` on this machine; jobs wait until it answers"
    ),
    Reason.BACKUP_DAMAGED: Entry(400, "restore from another copy of the backup"),
    Reason.BACKUP_FOREIGN: Entry(400, "restore it with the release that made it"),
    Reason.BACKUP_TARGET_IN_USE: Entry(409, "name a new or empty folder, database and blob store"),
    Reason.BLOB_STORE_UNSUITABLE: Entry(
        500, "use a store with conditional writes (If-None-Match), such as S3, GCS, Azure, MinIO or a directory"
    ),
    Reason.KEYS_HELD_ELSEWHERE: Entry(409, "rotate the keys at the external key service"),
    Reason.DATA_IN_USE: Entry(409, "stop the other server, or choose another data directory"),
    Reason.SERVER_STOPPING: Entry(503, "send again when the server is back"),
    # Not 503: to devices that would be a rate limit, which they do not understand.
    Reason.SERVER_BUSY: Entry(500, "send again a little later; a larger machine or a higher limit helps for good"),
    Reason.BLOB_TOO_LARGE: Entry(413, "send less, or raise the limit in the server's settings"),
    Reason.TLS_INVALID: Entry(500, "give a PEM certificate chain and the unencrypted private key that belongs to it"),
    Reason.SETTINGS_INVALID: Entry(500, "correct the setting that the message names"),
    Reason.BUDGET_INVALID: Entry(400, "send epsilon > 0, delta between 0 and 1, and CLAIMED or NO_AMPLIFICATION"),
    Reason.BUDGET_SPENT: Entry(409, "the population's privacy budget is spent; nothing more is released"),
    Reason.ROUND_EXPIRED: Entry(409, "let more devices check in, lower the report goal, or raise --round-expiry"),
    Reason.STOP_TIME_PASSED: Entry(409, "build the task again with a later do_not_create_iteration_after"),
    Reason.ARTIFACTS_MISSING: Entry(409, "build the task again; its artifacts were never uploaded"),
    Reason.INTERNAL: _DEFAULT,
}


class FedComputeError(Exception):
    """Base of every typed error.

    `reason` is the stable code, `detail` what happened with its numbers, `remedy` what to do (the catalogue's
    unless the raise knows better), `status` the HTTP status of a route that answers with it. A detail never holds
    a secret, a key, a token or a signed URL.
    """

    def __init__(self, reason: Reason, detail: str, *, remedy: str | None = None) -> None:
        entry = CATALOGUE.get(reason, _DEFAULT)
        self.reason = reason
        self.detail = detail
        self.remedy = remedy if remedy is not None else entry.remedy
        self.status = entry.status
        super().__init__(f"{detail} [{reason.value}]")


class RequestRejected(FedComputeError):
    """An HTTP request that the server refuses; nothing has changed."""


class UploadRejected(FedComputeError):
    """One device's contribution that does not count; its round goes on without it."""


class ArtifactInvalid(FedComputeError):
    """A plan, checkpoint, partial sum, key file or model that cannot be used."""


class ConfigInvalid(FedComputeError):
    """A task configuration that cannot be read or breaks a rule."""


class BuildFailed(FedComputeError):
    """A task that could not be built or registered."""


class DeviceRunFailed(FedComputeError):
    """A device run that ended without a contribution."""


class OperationFailed(FedComputeError):
    """Storage, settings or another part of the machine that does not do its work."""
