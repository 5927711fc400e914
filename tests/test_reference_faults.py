"""docs/reference-faults.md names tests that exist, and leaves out no number."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "../shared/spec/lessons.md"
ROW = re.compile(r"^\| (?P<number>[A-G]\d+) \|(?P<rest>.*)\|$", re.MULTILINE)
NAMED = re.compile(r"`(?P<path>tests/[\w/]+\.py)::(?P<name>\w+)`")


def rows():
    text = (ROOT / "docs" / "reference-faults.md").read_text()
    return [(found["number"], found["rest"].split("|")) for found in ROW.finditer(text)]


@cache
def names_in(path):
    return {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def lessons():
    """The numbers of the specification: its lists, each under a heading with its letter."""
    letter, numbers = "", []
    for line in LESSONS.read_text().splitlines():
        if heading := re.match(r"## ([A-Z])\.", line):
            letter = heading[1]
        elif letter and (item := re.match(r"(\d+)\. ", line)):
            numbers.append(f"{letter}{item[1]}")
    return numbers


def test_every_test_that_is_named_exists():
    named = [(found["path"], found["name"]) for _, cells in rows() for found in NAMED.finditer(cells[-1])]
    assert len(named) > 100
    missing = [f"{path}::{name}" for path, name in named if not (ROOT / path).is_file() or name not in names_in(path)]
    assert missing == []


def test_every_row_names_a_test_or_says_that_it_is_open():
    for number, cells in rows():
        assert len(cells) == 3, number
        fault, ours, tests = (cell.strip() for cell in cells)
        assert fault, number
        assert ours, number
        assert ", ".join(f"`{one['path']}::{one['name']}`" for one in NAMED.finditer(tests)) == tests, number
        assert tests or ours.startswith("**open**"), number


def test_no_number_of_the_specification_is_left_out():
    if not LESSONS.is_file():
        pytest.skip("the specification is not beside this checkout")
    assert [number for number, _ in rows()] == lessons()
    assert len(lessons()) == 76
