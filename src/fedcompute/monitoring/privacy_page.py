"""A task's privacy as one HTML page for a reviewer: complete in itself, the same for the same ledger."""

import shlex
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompute import __version__
from fedcompute.monitoring import privacy_words
from fedcompute.monitoring.privacy_plot import plot
from fedcompute.monitoring.privacy_recipe import recipe
from fedcompute.monitoring.task_privacy import RoundSpending, TaskPrivacy
from fedcompute.privacy.composition import TaskReleases, assuming
from fedcompute.privacy.participation import Participation

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

_PAGES = Path(__file__).parent / "pages" / "templates"
# A longer task's table shows the first round, the last and some between.
_ALL_ROUNDS, _SOME_ROUNDS = 50, 25
_SHORT_HASH = 12


def privacy_page(found: TaskPrivacy) -> str:
    """The page as HTML text: no script, no request to any host, every string of the ledger escaped."""
    report, assumption = found.report, found.report.assumption
    whole = assumption.participation is Participation.NO_AMPLIFICATION
    claim = TaskReleases(found.releases.rounds, assumption)
    return _template().render(
        found=found,
        report=report,
        assumption=assumption,
        claim=privacy_words.claim_name(found),
        whole=whole,
        replaced=assumption.participation is Participation.FIXED_SIZE,
        words=privacy_words,
        number=privacy_words.number,
        formulas=privacy_words.release_formulas(found),
        quantities=privacy_words.quantities(found),
        plot=plot(found.series, privacy_words.claim_name(found), whole),
        rounds=shown_rounds(found.rounds),
        short=_SHORT_HASH,
        recipe=recipe([claim], report.delta),
        plain_recipe=None if whole else recipe([assuming(claim, Participation.NO_AMPLIFICATION)], report.delta),
        others=[one for one in found.tasks if one.task_id != found.task_id],
        population=shlex.quote(found.population),
        versions={"fedcompute": __version__, "dp-accounting": metadata.version("dp-accounting")},
    )


def shown_rounds(rounds: Sequence[RoundSpending]) -> list[RoundSpending]:
    """All rounds, or of many some evenly spaced, the first and the last among them."""
    if len(rounds) <= _ALL_ROUNDS:
        return list(rounds)
    return [rounds[round(index * (len(rounds) - 1) / (_SOME_ROUNDS - 1))] for index in range(_SOME_ROUNDS)]


def _subscripts(text: str) -> "Markup":
    """Escaped text with `_x` as a subscript."""
    from markupsafe import Markup

    first, *others = text.split("_")
    parts = [Markup("<sub>{}</sub>{}").format(other[:1], other[1:]) for other in others]
    return Markup("{}").format(first) + Markup("").join(parts)


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment: Any = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["subscripts"] = _subscripts
    return environment.get_template("privacy_report.html")  # type: ignore[no-any-return]
