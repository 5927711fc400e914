"""A chart as data: what is drawn, in which units, and the same numbers as a table."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

# A line of more points than a screen has columns shows nothing more.
MOST_POINTS = 1000

Value = int | float | str | datetime | None


@dataclass(frozen=True)
class Series:
    """One line, or one layer of bars: `x` and `y` of the same length; a None in `y` is a gap.

    `colour` is a place in the theme's palette; None: by the series' place in its chart. `dashed` marks what a line is
    compared with; `marks` shows its points.
    """

    name: str
    x: Sequence[Value]
    y: Sequence[int | float | None]
    dashed: bool = False
    marks: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """What a page draws. `x_is` says what the horizontal axis measures; times are UTC.

    `empty` is what a person reads where there is nothing to draw; `note` stands below the chart.
    """

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    x_is: Literal["number", "time", "category"] = "number"
    kind: Literal["line", "bar"] = "line"
    stacked: bool = False
    logarithmic: bool = False
    # The share of a whole: the axis goes from 0 to 1.
    share: bool = False
    empty: str = "Nothing to draw yet."
    note: str = ""

    def document(self) -> dict[str, Any]:
        """The chart as the script of the pages takes it; valid JSON, numbers that are not finite are null."""
        return {
            "title": self.title,
            "x_title": self.x_title,
            "y_title": self.y_title,
            "x_is": self.x_is,
            "kind": self.kind,
            "stacked": self.stacked,
            "logarithmic": self.logarithmic,
            "share": self.share,
            "empty": self.empty,
            "note": self.note,
            "series": [
                {
                    "name": one.name,
                    "x": [_plain(value) for value in one.x],
                    "y": [_finite(value) for value in one.y],
                    "dashed": one.dashed,
                    "marks": one.marks,
                    "colour": one.colour,
                }
                for one in self.series
                if one.x
            ],
        }

    def table(self) -> str:
        """The chart's numbers as CSV: a line per series and point."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("series", self.x_title, self.y_title))
        for one in self.series:
            writer.writerows(
                (one.name, _plain(x), "" if (value := _finite(y)) is None else value)
                for x, y in zip(one.x, one.y, strict=True)
            )
        return text.getvalue()


def _plain(value: Value) -> int | float | str | None:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def _finite(value: int | float | None) -> int | float | None:
    return value if value is not None and math.isfinite(value) else None
