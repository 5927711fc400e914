"""What stands between a coordinator's answer and a key: identity tokens, and the decryption of shares.

Both are programs or files of the operator's choice, so that no cloud's library is needed here (spec/server.md 7.2).
"""

import base64
import binascii
import json
import os
import shlex
import subprocess
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcompute.crypto.keyset import KEYSET_BYTES_LIMIT
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.server.security.operator_secret import VARIABLE

TIMEOUT_S = 60.0
PLAIN, FILE, AES, COMMAND = "plain", "file:", "aes:", "command:"
_TOKEN_LIMIT = 16 * 1024
_NONCE_BYTES = 12
_OUTPUT_LIMIT = 2 * KEYSET_BYTES_LIMIT


def identity_token(source: str, audience: str) -> str:
    """A token from `file:PATH`, or from `command:PROGRAM ARGUMENTS`, which finds AUDIENCE in its environment.

    Asked for anew each time, so that whatever renews it need not tell us. Raises OperationFailed(KEY_SERVICE_FAILED).

    Formal guarantees: no token reaches a log or an error of ours; the operator secret reaches no program.
    """
    if source.startswith(COMMAND):
        data = _run(source.removeprefix(COMMAND), b"", {"AUDIENCE": audience})
    else:
        data = _read(Path(source.removeprefix(FILE)), "identity token")
    token = data.strip()
    if not token or len(token) > _TOKEN_LIMIT or not all(33 <= byte <= 126 for byte in token):
        raise _failed("the identity token is empty, too long, or no word of ASCII")
    return token.decode("ascii")


def decrypt_share(kms: str, key_uri: str, ciphertext: bytes) -> bytes:
    """A coordinator's share in clear.

    `kms` is `plain` (it is so already), `aes:PATH` (a file with a base64 AES key; nonce, ciphertext and tag of GCM
    without associated data, as Tink's RAW AEAD writes them), or `command:PROGRAM ARGUMENTS`: it reads
    {"key_uri", "ciphertext": base64} and prints the base64 of the plaintext. Raises ArtifactInvalid(KEY_MALFORMED) for
    a share that the key definitely does not open, and OperationFailed(KEY_SERVICE_FAILED) where asking failed.

    Formal guarantees: `aes` returns authenticated plaintext only; `plain` adds nothing and is for one machine; a
    command's are the program's.
    """
    if kms == PLAIN:
        return ciphertext
    if kms.startswith(AES):
        return _open_aes(Path(kms.removeprefix(AES)), ciphertext)
    request = json.dumps({"key_uri": key_uri, "ciphertext": base64.b64encode(ciphertext).decode()}).encode()
    answer = _run(kms.removeprefix(COMMAND), request, {})
    try:
        return base64.b64decode(answer.strip(), validate=True)
    except binascii.Error:
        raise _failed("the key management program printed no base64") from None


def _open_aes(path: Path, ciphertext: bytes) -> bytes:
    try:
        cipher = AESGCM(base64.b64decode(_read(path, "AES key").strip(), validate=True))
    except ValueError:
        raise _failed(f"{path.name!r} holds no base64 AES key") from None
    try:
        return cipher.decrypt(ciphertext[:_NONCE_BYTES], ciphertext[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        raise ArtifactInvalid(
            Reason.KEY_MALFORMED, f"a share of {len(ciphertext)} bytes does not open under {path.name!r}"
        ) from None


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_TOKEN_LIMIT + 1)
    except OSError as error:
        raise _failed(f"the {what} in {path.name!r} cannot be read: {error.strerror}") from None


def _run(command: str, text: bytes, more: dict[str, str]) -> bytes:
    try:
        arguments = shlex.split(command)
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | more
        done = subprocess.run(
            arguments, input=text, stdout=subprocess.PIPE, env=environment, timeout=TIMEOUT_S, check=False
        )
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        # Without its cause: arguments may be secrets.
        raise _failed(f"a program did not run: {type(error).__name__}") from None
    if done.returncode != 0 or len(done.stdout) > _OUTPUT_LIMIT:
        raise _failed(f"a program ended with code {done.returncode} and {len(done.stdout)} bytes")
    return done.stdout


def _failed(detail: str) -> OperationFailed:
    return OperationFailed(Reason.KEY_SERVICE_FAILED, detail)
