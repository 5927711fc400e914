"""Writes the table of settings into docs/operations.md, or checks that it is fresh.

python tools/generate_settings.py          # write the part between the markers
python tools/generate_settings.py --check  # exit 1 if it differs
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fedcompute.server.configuration import kind_of, setting_fields
from fedcompute.server.setting import About, about

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
BEGIN, END = "<!-- settings: tools/generate_settings.py writes this part -->", "<!-- end of settings -->"


def table() -> str:
    """One Markdown table for each panel, in the order of the fields."""
    parts = []
    for panel in dict.fromkeys(about(one).panel for one in setting_fields()):
        parts += [f"### {panel}", "", "| setting | default | meaning |", "|---|---|---|"]
        parts += [_row(one) for one in setting_fields() if about(one).panel == panel]
        parts.append("")
    return "\n".join(parts)


def _row(one: "dataclasses.Field[Any]") -> str:
    told = about(one)
    default = told.shown or ("-" if one.default in (None, "", ()) else f"`{kind_of(one.name).show(one.default)}`")
    return f"| `{one.name}` | {default} | {told.help}{_rules(told)} |".replace("<", "&lt;")


def _rules(told: About) -> str:
    rules = []
    if told.choices:
        rules.append("one of " + ", ".join(f"`{one}`" for one in told.choices))
    if told.minimum is not None and told.maximum is not None:
        rules.append(f"{told.minimum:.10g} to {told.maximum:.10g}")
    return f" ({'; '.join(rules)})" if rules else ""


def fresh(page: str) -> str:
    """The page with the table of this release between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    page = PAGE.read_text()
    if BEGIN not in page or END not in page:
        sys.exit(f"{PAGE.name} has no place for the settings")
    if parser.parse_args().check:
        sys.exit(None if fresh(page) == page else f"{PAGE.name} is stale: run python tools/generate_settings.py")
    PAGE.write_text(fresh(page))


if __name__ == "__main__":
    main()
