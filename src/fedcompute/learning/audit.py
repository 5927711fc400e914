"""An audit of a learning process in one run: canaries among real devices, and an auditor who sees the models.

Canaries are contributions like any other: judged, clipped, summed on the lattice, noised and applied by the code that
serves devices. Nothing here stands in for a part of the server.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.learning.aggregators import BELOW_ESTIMATE, COUNT, DELTA, WEIGHT, update_leaves
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, read_contribution
from fedcompute.learning.noise_state import begin_noise
from fedcompute.learning.process import Process, client_checkpoint, round_update
from fedcompute.learning.specification import initial_state
from fedcompute.privacy.adaptive import BIT
from fedcompute.privacy.audit import (
    epsilon_lower_bound,
    gaussian_lower_bound,
    largest_lower_bound,
    planned_guesses,
)
from fedcompute.privacy.clipping import clip_by_global_norm, global_norm
from fedcompute.privacy.composition import TaskReleases, epsilon
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto

Weights = Sequence[NDArray[np.floating]]
Devices = Callable[[Weights], Iterable[Weights]]
"""A round of honest devices: trainable weights -> one update (initial minus final) per device, in model order."""

# Of the sum over clip norms: what rounding weights to float32 leaves where there is no noise.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class AuditResult:
    """What one run showed.

    `correct` of `guesses` guesses about `canaries` were right. `separation`: how far the scores of canaries in and out
    lie apart under the noise that is claimed, in standard deviations. `claimed_epsilon`: what the run's events add up
    to for a device in as many rounds as a canary; infinite without noise. `epsilon` holds for any mechanism and
    `gaussian_epsilon` if the releases together are a Gaussian one, both lower bounds at `delta` with `confidence`;
    `largest_epsilon` is the most that so many canaries could show. `weights`: the last released model.
    """

    rounds: int
    canaries: int
    guesses: int
    correct: int
    separation: float
    delta: float
    confidence: float
    claimed_epsilon: float
    epsilon: float
    gaussian_epsilon: float
    largest_epsilon: float
    weights: tuple[NDArray[np.floating], ...]

    @property
    def refuted(self) -> bool:
        """Whether the run contradicts the claim, with `confidence`, whatever the noise looks like."""
        return self.epsilon > self.claimed_epsilon


@dataclass(frozen=True)
class WeakenedNoise:
    """DANGEROUS: draws that are too small by `factor`, to see that an audit catches a broken mechanism.

    Formal guarantees: none; a process that uses it breaks its claim.
    """

    source: NoiseSource
    factor: float

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        return self.source.gaussian(deviation * self.factor, count)


def audit(
    process: Process,
    weights: Weights,
    devices: Devices,
    *,
    rounds: int,
    canaries: int,
    delta: float,
    separation: int = 1,
    confidence: float = 0.95,
    noise: NoiseSource | None = None,
    included: NDArray[np.bool_] | None = None,
) -> AuditResult:
    """Trains `process` for `rounds` with `devices` and canaries, and lets an auditor guess which canaries took part.

    `weights`: the initial model; `noise`: SystemNoise if left out; `included`: the canaries' coins, bool [canaries],
    from the operating system if left out. Each canary has a block of weights of its own and, if its coin says so,
    sends an update of the whole clip norm there, in every round or in each `separation`-th. The auditor knows
    everything but coins and noise: the process, the canaries, the other devices' updates, and each released model. It
    weighs the rounds by the noise that the mechanism shows when it runs without devices, and guesses "included" for
    the highest scores, "left out" for the lowest, as many as `planned_guesses` says.

    Raises ValueError for a process that bounds no update or whose server optimizer is not SGD (the auditor reads the
    sum off the model's step), for fewer than 2 canaries or more than weights, and for no round.

    Formal guarantees: unit device, add-or-remove-one; a canary is one device with all of its rounds, so that the claim
    is epsilon with this separation and without amplification by sampling. If the process has the claimed epsilon,
    `epsilon` exceeds it with probability at most 1 - `confidence`, whatever the auditor's skill (see
    `privacy.audit.epsilon_lower_bound`): its knowledge of the others is what differential privacy grants anyone. The
    released models are audited; metric sums and the count of contributions are not.
    """
    size = sum(np.size(leaf) for leaf in weights)
    if not 2 <= canaries <= size:
        raise ValueError(f"{canaries} canaries; 2 to {size} have a block of weights each")
    if min(rounds, separation) < 1:
        raise ValueError(f"{rounds} rounds, a canary in each {separation}-th")
    if included is None:
        included = np.array([secrets.randbits(1) for _ in range(canaries)], bool)
    present = np.arange(rounds) % separation == 0
    weigher = _Weigher.of(process, weights, present)
    guesses = planned_guesses(canaries, weigher.separation, delta, confidence)
    noise = SystemNoise() if noise is None else noise
    state: Tensors = begin_noise(process, initial_state(process, weights, []), noise)
    blocks = _Blocks(canaries, size // canaries, [np.shape(leaf) for leaf in weights])
    scores = np.zeros(canaries)
    events: list[tuple[Event, ...]] = []
    for weight, takes_part in zip(weigher.weights, present, strict=True):
        told = client_checkpoint(process, state)
        clip_norm = _clip_norm(process, told)
        total = empty_sum(process, b"", clip_norm)
        for update in devices(_model(process, state)):
            total = _joined(process, total, told, update, clip_norm)
        known = {name: leaf * total.steps[name] for name, leaf in total.lattice.items()}
        for canary in np.flatnonzero(included & takes_part):
            total = _joined(process, total, told, blocks.update(int(canary), clip_norm), clip_norm)
        result = round_update(process, state, total, noise)
        released = _released_sum(process, state, result.state)
        others = _flat([known[name] for name in update_leaves(process, DELTA)])
        scores += weight * blocks.project(released - others) / clip_norm
        state = result.state
        events.append(result.events)
    order = np.argsort(scores, kind="stable")
    each = guesses // 2
    correct = int(included[order[-each:]].sum() + (~included[order[:each]]).sum())
    return AuditResult(
        rounds=rounds,
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        separation=weigher.separation,
        delta=delta,
        confidence=confidence,
        claimed_epsilon=_claimed_epsilon(process, events, separation, delta),
        epsilon=epsilon_lower_bound(guesses, correct, delta, canaries, confidence),
        gaussian_epsilon=gaussian_lower_bound(guesses, correct, delta, canaries, confidence),
        largest_epsilon=largest_lower_bound(canaries, delta, confidence),
        weights=tuple(_model(process, state)),
    )


@dataclass(frozen=True)
class _Blocks:
    """Each canary's own run of `length` weights, counted through all leaves of the model."""

    canaries: int
    length: int
    shapes: Sequence[tuple[int, ...]]

    def update(self, canary: int, norm: float) -> list[NDArray[np.float32]]:
        sizes = [math.prod(shape) for shape in self.shapes]
        flat = np.zeros(sum(sizes), np.float32)
        flat[canary * self.length : (canary + 1) * self.length] = norm / math.sqrt(self.length)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def project(self, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inner product with each canary's unit direction, [canaries]."""
        rows = flat[: self.canaries * self.length].reshape(self.canaries, self.length)
        return np.asarray(rows.sum(axis=1) / math.sqrt(self.length))


@dataclass(frozen=True)
class _Weigher:
    """How the auditor adds up rounds: an included canary scores 1 on average, another 0, both `1 / separation` off."""

    weights: NDArray[np.float64]
    separation: float

    @classmethod
    def of(cls, process: Process, weights: Weights, present: NDArray[np.bool_]) -> "_Weigher":
        """Least squares under the noise that the mechanism adds, as seen in a run without any device.

        `present`: the rounds of a canary.
        """
        noise = SeededNoise(0)  # of the auditor's own run, which protects nobody
        state: Tensors = begin_noise(process, initial_state(process, weights, []), noise)
        seen = []
        for _ in present:
            clip_norm = _clip_norm(process, client_checkpoint(process, state))
            result = round_update(process, state, empty_sum(process, b"", clip_norm), noise)
            seen.append(_released_sum(process, state, result.state) / clip_norm)
            state = result.state
        covariance = np.stack(seen) @ np.stack(seen).T / len(seen[0])
        scale = np.trace(covariance) / len(present)
        if scale < _ROUNDING**2:
            return cls(present / present.sum(), math.inf)
        signal = np.linalg.solve(covariance + 1e-9 * scale * np.eye(len(present)), present.astype(np.float64))
        power = float(signal @ present)
        return cls(signal / power, math.sqrt(power))


def _clip_norm(process: Process, told: Tensors) -> float:
    clip_norm = clip_norm_told(process, told)
    if clip_norm is None:
        raise ValueError("the process bounds no update: there is no claim to audit")
    return clip_norm


def _model(process: Process, state: Tensors) -> list[NDArray[np.floating]]:
    return [state[leaf.name] for leaf in process.trainable]


def _flat(leaves: Iterable[NDArray[np.floating]]) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


def _released_sum(process: Process, before: Tensors, after: Tensors) -> NDArray[np.float64]:
    """The noised sum of updates that moved one model to the next, flat, in model units."""
    if process.WhichOneof("server_optimizer") != "sgd":
        raise ValueError("the auditor reads sums off steps of SGD, not of another server optimizer")
    step = _flat(_model(process, before)) - _flat(_model(process, after))
    return step * (_report_goal(process) / process.sgd.learning_rate)


def _report_goal(process: Process) -> int:
    return int(getattr(process, str(process.WhichOneof("aggregator"))).report_goal)


def _claimed_epsilon(process: Process, events: Sequence[Sequence[Event]], separation: int, delta: float) -> float:
    """Population and report goal play no part: nothing is amplified."""
    assumption = Assumption(Participation.MIN_SEPARATION, _report_goal(process), _report_goal(process), separation)
    return epsilon([TaskReleases(events, assumption)], delta)


def _joined(process: Process, total: PartialSum, told: Tensors, delta: Weights, clip_norm: float) -> PartialSum:
    return add(total, read_contribution(process, _update(process, told, delta, clip_norm), clip_norm))


def _update(process: Process, told: Tensors, delta: Weights, clip_norm: float) -> dict[str, NDArray[np.generic]]:
    """A device's update file: `delta` clipped, metrics at zero, and what its process asks for besides."""
    names = update_leaves(process, DELTA)
    leaves: Mapping[str, NDArray[np.floating]] = dict(zip(names, delta, strict=True))
    clipped = clip_by_global_norm(leaves, clip_norm)
    estimates = [float(value) for name, value in told.items() if name.endswith("/current_estimate")]
    scalars = {
        COUNT: 1.0,
        WEIGHT: 1.0,
        BELOW_ESTIMATE: BIT if all(global_norm(leaves) <= estimate for estimate in estimates) else -BIT,
    }
    update: dict[str, NDArray[np.generic]] = {}
    for leaf in process.updates:
        spec = spec_from_proto(leaf.spec)
        value = clipped[spec.name] if spec.name in clipped else np.full(spec.shape, scalars.get(leaf.role, 0.0))
        update[spec.name] = value.astype(spec.dtype)
    return update
