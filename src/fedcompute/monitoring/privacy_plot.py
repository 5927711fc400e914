"""Epsilon by round as the geometry of a small picture: two curves, axes and their marks, in units of an SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedcompute.privacy.report import Spent

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 150, 30, 42
# With more points than this, marks would hide the curve.
_MARKED = 40
# Curves further apart than this share no linear axis.
_LOGARITHMIC = 10.0
_MARKS = 5


@dataclass(frozen=True)
class Mark:
    """A mark of an axis at a place."""

    place: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A curve: its points, and where and what its label is."""

    name: str
    points: tuple[tuple[float, float], ...]
    label_y: float
    label: str
    marked: bool

    @property
    def path(self) -> str:
        """The points as an SVG polyline takes them."""
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)


@dataclass(frozen=True)
class Plot:
    """A picture of `width` x `height`; the axes meet at (`left`, `bottom`)."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    logarithmic: bool
    curves: tuple[Curve, ...]
    columns: tuple[Mark, ...]
    rows: tuple[Mark, ...]


def plot(series: Sequence[Spent], claim: str, claim_is_whole: bool) -> Plot | None:
    """The picture of both epsilons of `series`; None where there is nothing finite to draw.

    `claim`: a name for the curve under the claim; `claim_is_whole`: the other curve would be the same.
    """
    finite = [one for one in series if math.isfinite(one.epsilon) and math.isfinite(one.unamplified_epsilon)]
    positive = [value for one in finite for value in (one.epsilon, one.unamplified_epsilon) if value > 0]
    if not positive:
        return None
    last = finite[-1]
    logarithmic = last.unamplified_epsilon > _LOGARITHMIC * max(last.epsilon, 1e-300)
    low, high, marks = _logarithmic(positive) if logarithmic else _linear(max(positive))
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    first, end = finite[0].rounds, max(last.rounds, finite[0].rounds + 1)

    def x(rounds: float) -> float:
        return _LEFT + (rounds - first) / (end - first) * (right - _LEFT)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if logarithmic else (value - low) / (high - low)
        return bottom - share * (bottom - _TOP)

    named = [(claim, [(one.rounds, one.epsilon) for one in finite])]
    if not claim_is_whole:
        named.append(("without amplification", [(one.rounds, one.unamplified_epsilon) for one in finite]))
    places = _apart([y(values[-1][1]) if values[-1][1] > 0 else bottom for _, values in named])
    return Plot(
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        logarithmic=logarithmic,
        curves=tuple(
            Curve(
                name=name,
                points=tuple((x(rounds), y(value)) for rounds, value in values if value > 0 or not logarithmic),
                label_y=place,
                label=f"{values[-1][1]:,.4g}",
                marked=len(values) <= _MARKED,
            )
            for (name, values), place in zip(named, places, strict=True)
        ),
        columns=tuple(Mark(x(rounds), f"{rounds:,}") for rounds in _rounds(first, last.rounds)),
        rows=tuple(Mark(y(value), f"{value:,.6g}") for value in marks),
    )


def _linear(highest: float) -> tuple[float, float, list[float]]:
    step = _round_step(highest / _MARKS)
    count = math.ceil(highest / step - 1e-9)
    return 0.0, count * step, [step * index for index in range(count + 1)]


def _logarithmic(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, highest = math.floor(math.log10(min(values))), math.log10(max(values))
    high = highest + 0.04 * (highest - low)
    step = max(1, math.ceil((high - low) / 8))
    return float(low), high, [10.0**power for power in range(low, math.floor(high) + 1, step)]


def _rounds(first: int, last: int) -> list[int]:
    if last - first < 2 * _MARKS:
        return list(range(first, last + 1))
    step = max(1, int(_round_step((last - first) / _MARKS)))
    marks = [first, *(number for number in range(step, last, step) if number - first >= step / 2)]
    return [number for number in marks if last - number >= step / 2] + [last]


def _round_step(size: float) -> float:
    """The next number at or above `size` of the form 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _apart(places: list[float]) -> list[float]:
    """Moves two labels apart that would cover each other; the second curve is the higher one."""
    if len(places) == 2 and places[0] - places[1] < 32:
        middle = min(max(sum(places) / 2, _TOP + 16), HEIGHT - _BOTTOM - 16)
        return [middle + 16, middle - 16]
    return places
