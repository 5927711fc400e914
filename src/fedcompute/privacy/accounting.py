"""Epsilon from noise and noise from epsilon, through dp-accounting (imported on first use: it costs a second)."""

import math
from functools import lru_cache
from typing import Any

# No honest setting lies below this.
_SMALLEST_NOISE = 1e-3
# The library's default interval of privacy loss, and the noise below which it is widened: losses grow with 1 / noise^2,
# and so would time and memory (3 GB at 0.05).
LOSS_INTERVAL = 1e-4
_FINE_NOISE = 0.1


@lru_cache(maxsize=256)
def poisson_epsilon(noise_multiplier: float, rounds: int, sampling_probability: float, delta: float) -> float:
    """Epsilon at `delta` of `rounds` Gaussian releases, each over a Poisson sample of the population.

    The reference's claim (spec/task-builder.md 3.3): PLD accountant, add-or-remove-one. Infinite without noise.

    Formal guarantees: an upper bound on epsilon under the stated sampling. Devices that come when they like are not a
    Poisson sample; see `gaussian_epsilon` for what holds without that assumption.
    """
    if rounds == 0:
        return 0.0
    if noise_multiplier < _SMALLEST_NOISE:
        return math.inf
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=loss_interval(noise_multiplier))
    accountant.compose(_poisson_event(dp_accounting, noise_multiplier, rounds, sampling_probability))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def calibrate_noise(target_epsilon: float, rounds: int, sampling_probability: float, delta: float) -> float:
    """The smallest noise multiplier (to 1e-6, on the safe side) whose `poisson_epsilon` is at most the target.

    Formal guarantees: `poisson_epsilon` of the result is at most `target_epsilon`.
    """
    import dp_accounting
    from dp_accounting import pld

    return float(
        dp_accounting.calibrate_dp_mechanism(
            pld.PLDAccountant,
            lambda noise: _poisson_event(dp_accounting, noise, rounds, sampling_probability),
            target_epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0, 1),
        )
    )


@lru_cache(maxsize=256)
def tree_epsilon(noise_multiplier: float, step_counts: tuple[int, ...], delta: float) -> float:
    """Epsilon at `delta` of tree aggregation, one tree per entry of `step_counts` with so many rounds.

    RDP accountant with the replace-special relation, as the reference (spec/task-builder.md 3.3). Infinite without
    noise.

    Formal guarantees: an upper bound if a device takes part at most once in all trees together: the deepest tree
    decides. `sensitivity.squared_tree_sensitivity` is for devices that come again. Source: arXiv 2103.00039, theorem
    D.2.
    """
    if not any(step_counts):
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(noise_multiplier, step_counts))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def calibrate_tree_noise(target_epsilon: float, rounds: int, delta: float) -> float:
    """The smallest noise multiplier (to 1e-6, on the safe side) whose `tree_epsilon` over `rounds` meets the target.

    Formal guarantees: `tree_epsilon` of the result, for one tree of `rounds`, is at most `target_epsilon`.
    """
    import dp_accounting
    from dp_accounting import rdp

    return float(
        dp_accounting.calibrate_dp_mechanism(
            lambda: rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL),
            lambda noise: dp_accounting.SingleEpochTreeAggregationDpEvent(noise, (rounds,)),
            target_epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0, 1),
        )
    )


@lru_cache(maxsize=256)
def fixed_size_epsilon(noise_multiplier: float, rounds: int, sample_size: int, population: int, delta: float) -> float:
    """Epsilon at `delta` of `rounds` Gaussian releases, each over exactly `sample_size` of `population` devices.

    RDP accountant, replace-one relation (spec/task-builder.md 3.3). Infinite without noise.

    Formal guarantees: adjacency replace-one device, both populations of the same known size; every round's sample is
    fresh and uniform, without replacement. `noise_multiplier` is relative to the clip norm, but one device that is
    replaced moves a sum of clipped contributions by up to twice the clip norm, and the library's multiplier is
    relative to the sensitivity under its own relation: it gets half of ours. An upper bound (arXiv 1808.00087,
    theorem 27).
    """
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    from dp_accounting.rdp import rdp_privacy_accountant

    # As the accountant would, whose time goes into the moments of a round.
    orders, moments = _fixed_size_moments(noise_multiplier, sample_size, population)
    return float(rdp_privacy_accountant.compute_epsilon(orders, rounds * moments, delta)[0])


@lru_cache(maxsize=64)
def _fixed_size_moments(noise_multiplier: float, sample_size: int, population: int) -> tuple[Any, Any]:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=_replace_one())
    accountant.compose(fixed_size_event(noise_multiplier, 1, sample_size, population))
    return accountant.orders, accountant.rdp


def fixed_size_event(noise_multiplier: float, rounds: int, sample_size: int, population: int) -> Any:
    """The library's event for `fixed_size_epsilon`, to be composed under replace-one.

    Formal guarantees: see `fixed_size_epsilon`; the halved multiplier is in the event.
    """
    import dp_accounting

    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(population, sample_size, gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, rounds)


@lru_cache(maxsize=256)
def calibrate_fixed_size_noise(
    target_epsilon: float, rounds: int, sample_size: int, population: int, delta: float
) -> float:
    """The smallest noise multiplier (to 1e-6, on the safe side) whose `fixed_size_epsilon` meets the target.

    Formal guarantees: `fixed_size_epsilon` of the result is at most `target_epsilon`.
    """
    import dp_accounting
    from dp_accounting import rdp

    return float(
        dp_accounting.calibrate_dp_mechanism(
            lambda: rdp.RdpAccountant(neighboring_relation=_replace_one()),
            lambda noise: fixed_size_event(noise, rounds, sample_size, population),
            target_epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0, 1),
        )
    )


@lru_cache(maxsize=256)
def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon at `delta` of one Gaussian release, without any sampling. Infinite without noise.

    With `ledger.composed_noise_multiplier` it gives the honest figure for a device that took part in every round.

    Formal guarantees: exact up to the library's root finding (Balle and Wang, arXiv 1805.06530, theorem 8).
    """
    if noise_multiplier == 0:
        return math.inf
    if math.isinf(noise_multiplier):
        return 0.0
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(noise_multiplier, delta))


@lru_cache(maxsize=256)
def calibrate_gaussian_noise(target_epsilon: float, delta: float) -> float:
    """The noise multiplier of the one Gaussian release whose `gaussian_epsilon` is the target, on the safe side.

    Formal guarantees: `gaussian_epsilon` of the result is at most `target_epsilon`, and at least that less 1e-6.
    """
    import dp_accounting

    noise = float(dp_accounting.get_sigma_gaussian(target_epsilon, delta))
    step = 1e-12
    while gaussian_epsilon(noise, delta) > target_epsilon:
        noise *= 1 + step
        step *= 2
    return noise


def loss_interval(noise_multiplier: float) -> float:
    """The interval of privacy loss to account in: the library's own from noise 0.1 on, and wider below.

    Formal guarantees: losses are rounded up to the interval, so that a wider one only makes a bound looser.
    """
    return LOSS_INTERVAL * max(1.0, (_FINE_NOISE / noise_multiplier) ** 2)


def _replace_one() -> Any:
    import dp_accounting

    return dp_accounting.NeighboringRelation.REPLACE_ONE


def _poisson_event(dp_accounting: Any, noise_multiplier: float, rounds: int, sampling_probability: float) -> Any:
    sampled = dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(sampled, rounds)
