"""The noise that mechanisms carry from round to round: a secret inside the server checkpoint.

Whoever reads it can take the noise out of released models. It begins on the server, is stored sealed under the server's
key, and is left out of what people get.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedcompute.crypto.secret_box import open_secret, seal_secret
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.aggregators import Process
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.learning.specification import OWN
from fedcompute.privacy.noise import NoiseSource
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import Tensors, subtree

SEALED = f"{OWN}sealed_noise"

Leaves = Mapping[str, NDArray[np.generic]]


def begin_noise(process: Process, state: Tensors, noise: NoiseSource) -> dict[str, NDArray[np.generic]]:
    """The state with a noise state that begins now; as it is for mechanisms without one.

    Formal guarantees: no draw that a checkpoint brings along, whose maker knows it, protects anybody afterwards. A
    restart is a new mechanism with a budget of its own: its first event has step 1.
    """
    new = {name: value for name, value in state.items() if not name.startswith(OWN)}
    restart = aggregator_of(process).restart
    if restart is not None and process.kind == Process.TRAINING:
        new |= {f"server/{name}": value for name, value in restart(process, subtree(state, "server"), noise).items()}
    return new


def without_noise(checkpoint: Tensors) -> dict[str, NDArray[np.generic]]:
    """A server checkpoint for people: noise leaves become zeros or are left out.

    Formal guarantees: what is returned does not depend on noise that past or future releases hide behind, other than
    through released models and metrics (spec/artifacts.md 9, consequence 5).
    """
    return {
        name: np.zeros_like(value) if _is_noise(name) else value
        for name, value in checkpoint.items()
        if not name.startswith(OWN)
    }


def carries_noise(checkpoint: Tensors) -> bool:
    """Whether a server checkpoint holds noise, or seeds of it, that hides or will hide what devices contributed."""
    return any(name.startswith(OWN) or (_is_noise(name) and value.any()) for name, value in checkpoint.items())


def seal_noise(checkpoint: Tensors, key: bytes, place: str) -> dict[str, NDArray[np.generic]]:
    """The checkpoint as it may be stored at `place`: without noise, and the noise as one sealed leaf if there is any.

    Formal guarantees: `without_noise` of the result tells nothing of the noise; the sealed leaf tells it to nobody
    without `key` and opens at its own place only (see `secret_box.seal_secret`).
    """
    secret = {name: value for name, value in checkpoint.items() if name.startswith(OWN) or _is_noise(name)}
    stored = without_noise(checkpoint)
    if secret:
        sealed = seal_secret(key, write_checkpoint(secret), place.encode())
        stored[SEALED] = np.array(sealed, object)
    return stored


def open_noise(checkpoint: Tensors, key: bytes, place: str, limit: int) -> dict[str, NDArray[np.generic]]:
    """The checkpoint that `seal_noise` was given; as it is if it holds nothing sealed. At most `limit` bytes of noise.

    Raises ArtifactInvalid: SECRET_UNREADABLE for another key or place, CHECKPOINT_* for other contents.

    Formal guarantees: the noise is the one sealed for this place, unchanged.
    """
    opened = {name: value for name, value in checkpoint.items() if name != SEALED}
    sealed = checkpoint.get(SEALED)
    if sealed is None:
        return opened
    if sealed.dtype != object or sealed.shape != ():
        raise ArtifactInvalid(Reason.STATE_MISMATCH, f"{SEALED!r} is {sealed.dtype}{list(sealed.shape)}, not a string")
    secret = read_checkpoint(open_secret(key, sealed.item(), place.encode()), CheckpointLimits(max_bytes=limit))
    return opened | secret


def _is_noise(name: str) -> bool:
    # The reference's graphs draw by the seeds that they keep; ours are zero.
    return (
        "/previous_tree_noise" in name
        or name.endswith(("/level_buffer", "/value_generator_state/seeds"))
        or "/level_buffer/" in name
    )
