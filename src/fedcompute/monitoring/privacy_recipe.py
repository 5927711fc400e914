"""An epsilon as lines of Python that call dp-accounting directly, for readers who believe no program of ours."""

import math
from collections.abc import Iterator, Sequence

from fedcompute.privacy.accounting import LOSS_INTERVAL, loss_interval
from fedcompute.privacy.composition import Parts, TaskReleases, multiplier, parts_of

# Nobody types more than this; a task of many different rounds has no short recipe.
_MOST_EVENTS = 12


def recipe(tasks: Sequence[TaskReleases], delta: float) -> str | None:
    """Lines of Python whose last one is `composition.epsilon(tasks, delta)`; None without noise or for too many lines.

    Formal guarantees: the accountant, its neighbouring relation and its events are those of `composition.epsilon`.
    """
    parts = parts_of(tasks)
    events = len(parts.poisson) + len(parts.fixed_size) + len(parts.one_epoch) + bool(parts.square)
    if math.isinf(parts.square) or not 0 < events <= _MOST_EVENTS:
        return None
    return "\n".join(_lines(parts, delta))


def _lines(parts: Parts, delta: float) -> Iterator[str]:
    one_epoch = math.fsum(one.square for one in parts.one_epoch)
    if parts.fixed_size:
        yield from _replace_one(parts, parts.square + one_epoch)
    elif len(parts.one_epoch) == 1 and not parts.poisson and parts.square == 0:
        yield from _single_epoch(parts)
    elif not parts.poisson:
        yield "import dp_accounting as dp"
        yield f"dp.get_epsilon_gaussian({multiplier(parts.square + one_epoch)!r}, {delta!r})"
        return
    else:
        yield from _sampled(parts, parts.square + one_epoch)
    yield f"accountant.get_epsilon({delta!r})"


def _sampled(parts: Parts, square: float) -> Iterator[str]:
    multipliers = [one.noise_multiplier for one in parts.poisson]
    interval = loss_interval(min([*multipliers, multiplier(square)] if square else multipliers))
    yield "import dp_accounting as dp"
    yield "from dp_accounting import pld"
    wide = "" if interval == LOSS_INTERVAL else f"value_discretization_interval={interval!r}"
    yield f"accountant = pld.PLDAccountant({wide})"
    for one in parts.poisson:
        gaussian = f"dp.GaussianDpEvent({one.noise_multiplier!r})"
        event = f"dp.PoissonSampledDpEvent({one.sampling_probability!r}, {gaussian})"
        yield f"accountant.compose({event}, {one.rounds})"
    if square:
        yield f"accountant.compose(dp.GaussianDpEvent({multiplier(square)!r}))"


def _single_epoch(parts: Parts) -> Iterator[str]:
    (one,) = parts.one_epoch
    yield "import dp_accounting as dp"
    yield "from dp_accounting import rdp"
    yield "accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)"
    yield f"accountant.compose(dp.SingleEpochTreeAggregationDpEvent({one.noise_multiplier!r}, ({one.rounds},)))"
    if one.metrics:
        yield f"accountant.compose(dp.GaussianDpEvent({multiplier(one.metrics)!r}))"


def _replace_one(parts: Parts, square: float) -> Iterator[str]:
    square += math.fsum(one.rounds * one.noise_multiplier**-2 for one in parts.poisson)
    yield "import dp_accounting as dp"
    yield "from dp_accounting import rdp"
    yield "accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)"
    for one in parts.fixed_size:
        gaussian = f"dp.GaussianDpEvent({one.noise_multiplier!r} / 2)"
        event = f"dp.SampledWithoutReplacementDpEvent({one.population}, {one.sample_size}, {gaussian})"
        yield f"accountant.compose({event}, {one.rounds})"
    if square:
        yield f"accountant.compose(dp.GaussianDpEvent({multiplier(square)!r} / 2))"
