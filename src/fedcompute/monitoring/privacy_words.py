"""A task's privacy in words and formulas, with the task's own numbers put in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedcompute.monitoring.task_privacy import TaskPrivacy
from fedcompute.privacy.adaptive import LEARNING_RATE, TARGET_QUANTILE
from fedcompute.privacy.chain import METRIC_MECHANISM, METRICS, MODEL, NO_MECHANISM, ZEROED_COUNT
from fedcompute.privacy.composition import multiplier, unamplified_square
from fedcompute.privacy.ledger import BandedEvent, Event
from fedcompute.privacy.mechanisms import mechanisms_of
from fedcompute.privacy.participation import Participation

_ADAPTIVE = ("ADAPTIVE_GAUSSIAN", "ADAPTIVE_TREE")
_TREES = ("TREE_AGGREGATION", "ADAPTIVE_TREE")

_MECHANISMS = {
    "FIXED_GAUSSIAN": "Gaussian noise, drawn anew each round, on a sum of updates clipped to a fixed norm",
    "ADAPTIVE_GAUSSIAN": "Gaussian noise, drawn anew each round, on a sum of updates clipped to a norm near the median",
    "TREE_AGGREGATION": "tree aggregation (DP-FTRL): Gaussian noise on the nodes of a binary tree over the rounds",
    "ADAPTIVE_TREE": "tree aggregation (DP-FTRL) with a clip norm that follows the median and trees that restart",
    "BANDED_MF": "banded matrix factorization (DP-FTRL): later noise takes back what earlier noise added",
    METRIC_MECHANISM: "Gaussian noise on the clipped sums of metrics; no model is released",
    NO_MECHANISM: "what is released is exact",
}

_RELEASES = {
    "FIXED_GAUSSIAN": "( Σᵢ clip(Δᵢ, {clip}) + N(0, {deviation}²) ) / {goal}",
    "ADAPTIVE_GAUSSIAN": "( Σᵢ clip(Δᵢ, {clip}) + N(0, {deviation}²) ) / {goal}   and   Σᵢ bᵢ + N(0, {bits}²)",
    "TREE_AGGREGATION": "( Sₜ + treeₜ − Sₜ₋₁ − treeₜ₋₁ ) / {goal}   with nodes N(0, {deviation}²)",
    "ADAPTIVE_TREE": (
        "( Sₜ + treeₜ − Sₜ₋₁ − treeₜ₋₁ ) / {goal}   with nodes N(0, {deviation}²),   so too Σᵢ bᵢ with N(0, {bits}²)"
    ),
    "BANDED_MF": "( Σᵢ clip(Δᵢ, {clip}) + yₜ ) / {goal}   with   c₀yₜ + c₁yₜ₋₁ + … = N(0, {deviation}²)",
    METRIC_MECHANISM: "Σᵢ clip(mᵢ, {clip}) + N(0, {deviation}²)",
}
_SYMBOLS = {
    "FIXED_GAUSSIAN": "Δᵢ the update of device i",
    "ADAPTIVE_GAUSSIAN": "Δᵢ the update of device i and bᵢ = ±½ for one below C or above",
    "TREE_AGGREGATION": "Sₜ the sum of all clipped updates up to round t",
    "ADAPTIVE_TREE": "Sₜ the sum of all clipped updates up to round t and bᵢ = ±½ for one below C or above",
    "BANDED_MF": "Δᵢ the update of device i, c the column of the matrix and y its noise",
    METRIC_MECHANISM: "mᵢ the metric sums of device i",
}


@dataclass(frozen=True)
class Quantity:
    """A line of the list of formulas; `formula` is empty where the value is given and not computed."""

    symbol: str
    meaning: str
    formula: str
    value: str


def mechanism_words(found: TaskPrivacy) -> str:
    """The mechanism in a few words."""
    return _MECHANISMS.get(found.mechanism, "a mechanism that this version does not know")


def formula_symbols(found: TaskPrivacy) -> str:
    """What the symbols of `release_formulas` stand for, to be said before them."""
    symbols = _SYMBOLS.get(found.mechanism)
    return f", with {symbols}" if symbols else ""


def release_formulas(found: TaskPrivacy) -> list[str]:
    """What a round releases as a formula, and the same with the numbers of the last round; empty without noise."""
    formula = _RELEASES.get(found.mechanism)
    last = next((one for one in reversed(found.rounds) if one.events), None)
    if formula is None or last is None:
        return []
    if found.mechanism == METRIC_MECHANISM:
        noise = found.metrics
        if noise is None or noise.clip_norm is None:
            return [formula.format(clip="C_m", deviation="(z_m·C_m)")]
        deviation = number(noise.clip_norm * noise.noise_multiplier)
        symbols, numbers = ("C_m", "(z_m·C_m)"), (number(noise.clip_norm), deviation)
        return [formula.format(clip=clip, deviation=noise_) for clip, noise_ in (symbols, numbers)]
    multiplier_ = "z_v" if found.mechanism in _ADAPTIVE else "z"
    column = "·‖c‖" if found.mechanism == "BANDED_MF" else ""
    deviation = f"({number(last.noise_multiplier)}·{number(last.clip_norm)}{column})"
    if last.deviation is not None:
        deviation = number(last.deviation)
    bits = number(last.events[1].noise_multiplier / 2) if len(last.events) > 1 else "σ_b"
    return [
        formula.format(clip="C", deviation=f"({multiplier_}·C{column})", goal="n", bits="σ_b"),
        formula.format(clip=number(last.clip_norm), deviation=deviation, goal=number(found.goal), bits=bits),
    ]


def quantities(found: TaskPrivacy) -> list[Quantity]:
    """Every quantity of the mechanism and of its accounting, each with its formula and this task's value."""
    return [*_noise(found), *_metric_noise(found), *_accounting(found)]


def claim_name(found: TaskPrivacy) -> str:
    """The claimed assumption in two words."""
    match found.report.assumption.participation:
        case Participation.POISSON:
            return "one participation" if found.report.trees else "Poisson sampling"
        case Participation.FIXED_SIZE:
            return "sampling of fixed size"
        case Participation.MIN_SEPARATION:
            return "minimum separation"
    return "no amplification"


def sampled(found: TaskPrivacy) -> bool:
    """Whether the claim takes rounds for random samples of the population."""
    sampling = (Participation.POISSON, Participation.FIXED_SIZE)
    return found.report.assumption.participation in sampling and not found.report.trees


def assumption_words(found: TaskPrivacy) -> str:
    """Whom the claimed epsilon holds for."""
    assumption, report = found.report.assumption, found.report
    goal, population = f"{assumption.report_goal:,}", f"{assumption.population:,}"
    match assumption.participation:
        case Participation.POISSON if report.trees:
            return "Every device takes part in one round of the whole task at most (the reference's claim for trees)."
        case Participation.POISSON:
            return (
                f"In every round each of {population} devices takes part with probability {goal} / {population}, "
                "independently of all others and of all other rounds (Poisson sampling)."
            )
        case Participation.FIXED_SIZE:
            return f"Every round is a fresh random sample of exactly {goal} of {population} devices."
        case Participation.MIN_SEPARATION:
            return separation_words(found)
    return "None: a device may take part in every round, and choose when."


def separation_words(found: TaskPrivacy) -> str:
    """What minimum separation lets a device do."""
    separation, times = found.report.assumption.minimum_separation, found.report.participations
    if separation <= 1:
        return "Devices come when they like, in every round at worst: no minimum separation is set."
    return (
        f"Devices come when they like, but any two times at least {separation:,} rounds apart: at most {times:,} of "
        f"{found.report.rounds:,} rounds."
    )


def over_selection_words(found: TaskPrivacy) -> str:
    """What it means that rounds may hold another number of devices than the report goal."""
    goal, counts = found.goal, [one.contributions for one in found.rounds]
    fewest, most = min(counts, default=0), max(counts, default=0)
    held = f"{fewest:,}" if fewest == most else f"between {fewest:,} and {most:,}"
    assigned = found.facts.most_devices
    may = f" Up to {assigned:,} devices may be assigned to a round." if assigned and assigned > goal else ""
    if not has_model(found):
        return (
            f"This task releases no model: nothing is divided by its report goal {goal:,}. The rounds held {held}."
            f"{may} A device that is assigned beyond the goal and still reports is in the metrics of the round."
        )
    rate = ""
    if sampled(found):
        counted = found.report.assumption.report_goal
        rate = (
            f" The sampling rate of the accountant uses {counted:,}, the larger of the goal and the largest round. "
            "Taking the devices that report first favours fast ones, and no random sample does."
        )
    return (
        f"Sums are divided by the report goal {goal:,}, a public number, never by the number of contributions; the "
        f"rounds held {held}.{may} So one device moves a released mean by at most C / n, whoever else takes part, and "
        f"the denominator tells nothing about who came.{rate}"
    )


def has_model(found: TaskPrivacy) -> bool:
    """Whether the task's rounds release a model."""
    return found.mechanism != METRIC_MECHANISM and found.kind != "EVALUATION"


def released_words(released: str) -> str:
    """What an entry of the ledger stands for."""
    return {
        MODEL: "model, exact",
        METRICS: "metrics of the round, exact sums",
        ZEROED_COUNT: "number of updates that were replaced by zeros",
    }.get(released, released)


def headline(value: float) -> str:
    """A number for the top of the page: four digits."""
    return number(float(f"{value:.4g}"))


def odds(epsilon: float) -> float:
    """The factor by which an outcome may become more likely, in three digits."""
    return float(f"{math.exp(epsilon):.3g}")


def number(value: float | None) -> str:
    """A number for people: six digits at most, thousands separated, an infinity by its sign."""
    if value is None:
        return "—"
    if math.isinf(value):
        return "∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    text = f"{value:,.6g}"
    mantissa, _, exponent = text.partition("e")
    if not exponent:
        return text
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"


def _noise(found: TaskPrivacy) -> Iterator[Quantity]:
    rounds = [one for one in found.rounds if one.mechanism == found.mechanism and one.noise_multiplier is not None]
    if found.mechanism in (NO_MECHANISM, METRIC_MECHANISM) or not rounds:
        return
    last, clips = rounds[-1], [one.clip_norm for one in rounds if one.clip_norm is not None]
    clip = number(clips[-1]) if clips else "—"
    weakest = min(one.noise_multiplier or 0.0 for one in rounds)
    z, goal = number(weakest), number(found.goal)
    if found.mechanism in _ADAPTIVE and len(set(clips)) > 1:
        rule = f"C ← C·exp(−{LEARNING_RATE:g}·(b̃ − {TARGET_QUANTILE:g}))"
        yield Quantity(
            "C", "clip norm (L2 of a whole update), first and last round", rule, f"{number(clips[0])} … {clip}"
        )
    else:
        yield Quantity("C", "clip norm: largest L2 norm of one device's whole update", "", clip)
    together = "noise multiplier, of sum and bits together" if found.mechanism in _ADAPTIVE else "noise multiplier"
    yield Quantity("z", f"{together}, of the round with least noise", "", z)
    yield Quantity("n", "report goal, the fixed denominator (devices)", "", goal)
    if found.mechanism in _ADAPTIVE:
        yield from _split(found, last.events)
    deviation = None if last.deviation is None else number(last.deviation)
    if found.mechanism == "BANDED_MF":
        bands = next((one.bands for one in last.events if isinstance(one, BandedEvent)), 1)
        norm = found.facts.column_norm
        yield Quantity("b", "bands of the matrix", "", number(bands))
        yield Quantity(
            "‖c‖", "L2 norm of the matrix's column", "√(Σ cⱼ²)", "in the plan" if norm is None else number(norm)
        )
        formula = "z · C · ‖c‖" if norm is None else f"z · C · ‖c‖ = {z} · {clip} · {number(norm)}"
        yield Quantity(
            "σ", "deviation of the noise that is drawn in a round, per weight", formula, deviation or "z·C·‖c‖"
        )
    else:
        of = "each node of the tree" if found.mechanism in _TREES else "the sum"
        which = "z_v" if found.mechanism in _ADAPTIVE else "z"
        drawn = number(last.events[0].noise_multiplier) if last.events else z
        yield Quantity(
            "σ", f"deviation of the noise on {of}, per weight", f"{which} · C = {drawn} · {clip}", deviation or "—"
        )
        if last.deviation is not None and found.mechanism not in _TREES:
            ratio = number(last.deviation / found.goal) if found.goal else "—"
            yield Quantity("σ / n", "the same on the released mean", f"{deviation} / {goal}", ratio)
    if found.mechanism in _TREES:
        yield from _trees(found)


def _split(found: TaskPrivacy, events: tuple[Event, ...]) -> Iterator[Quantity]:
    if len(events) < 2:
        return
    value, bits = events[0].noise_multiplier, events[1].noise_multiplier
    yield Quantity("σ_b", "deviation of the noise on the number of updates below C", "n / 20", number(bits / 2))
    yield Quantity("z_v", "noise multiplier of the sum", "1 / √(z⁻² − (2σ_b)⁻²)", number(value))


def _trees(found: TaskPrivacy) -> Iterator[Quantity]:
    trees = [one for one in mechanisms_of(found.releases.rounds).correlated if not one.bands]
    rounds = [one.rounds for one in trees for _ in range(one.repeats)]
    if not rounds:
        return
    longest = max(rounds)
    yield Quantity("trees", "trees of noise; each begins anew at a restart", "1 + restarts", number(len(rounds)))
    yield Quantity("T₁", "rounds of the longest tree", "", number(longest))
    heights = f"⌊log₂ {longest}⌋ + 1"
    yield Quantity("h", "its heights: nodes that one participation is in", heights, number(longest.bit_length()))
    clips = [one.clip_norm for one in found.rounds if one.clip_norm is not None]
    if clips:
        limit = number(100 * clips[0])
        yield Quantity("L∞", "an update with a larger element counts as zeros", f"100 · {number(clips[0])}", limit)


def _metric_noise(found: TaskPrivacy) -> Iterator[Quantity]:
    if (noise := found.metrics) is None:
        return
    clip, z = number(noise.clip_norm), number(noise.noise_multiplier)
    yield Quantity("C_m", "clip norm of one device's metric sums together", "", clip)
    yield Quantity("z_m", f"noise multiplier of the metric sums, in {noise.rounds:,} rounds", "", z)
    if noise.clip_norm is not None:
        formula = f"z_m · C_m = {z} · {clip}"
        yield Quantity("σ_m", "deviation of their noise", formula, number(noise.clip_norm * noise.noise_multiplier))


def _accounting(found: TaskPrivacy) -> Iterator[Quantity]:
    report, assumption = found.report, found.report.assumption
    if not report.rounds:
        return
    rounds, separation = number(report.rounds), assumption.minimum_separation
    yield Quantity("T", "rounds that are charged for", "", rounds)
    if sampled(found):
        goal, population = number(assumption.report_goal), number(assumption.population)
        yield Quantity("P", "devices that rounds are assumed to be drawn from", "", population)
        rate = number(assumption.report_goal / assumption.population)
        yield Quantity("q", "sampling rate", f"n / P = {goal} / {population}", rate)
    mechanisms = mechanisms_of(found.releases.rounds)
    if separation > 1:
        formula = f"⌈T / s⌉ = ⌈{rounds} / {separation:,}⌉"
        yield Quantity("s", "minimum separation of a device's rounds", "", number(separation))
        yield Quantity("k", "rounds that such a device is in at most", formula, number(report.participations))
        square = unamplified_square(mechanisms, separation)
        yield Quantity(
            "z_s", "what it sees, as one Gaussian release", _together(found, "k"), number(multiplier(square))
        )
    square = unamplified_square(mechanisms, 1)
    if not math.isinf(square):
        what = "what a device in every round sees, as one Gaussian release"
        yield Quantity("z_T", what, _together(found, "T"), number(multiplier(square)))
    yield Quantity("δ", "probability for which nothing is promised", "", number(report.delta))


def _together(found: TaskPrivacy, times: str) -> str:
    alike = len({one.noise_multiplier for one in found.rounds if one.events}) == 1
    if found.mechanism in _TREES or found.mechanism == "BANDED_MF":
        return "σ / L2 sensitivity"
    if alike and (found.metrics is None or found.mechanism == METRIC_MECHANISM):
        return f"{'z' if found.metrics is None else 'z_m'} / √{times}"
    return f"1 / √(Σ zₜ⁻²), over {times} rounds"
