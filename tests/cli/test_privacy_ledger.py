"""`fedcompute privacy ledger`, `verify` and `budget` against a server, and against hands in its database."""

import json
import sqlite3

import pytest

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.chain import Release
from fedcompute.storage.database import Database
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import append_releases, standing_of

DELTA = 1e-6


@pytest.fixture
def ledger(server, request, database_path):
    """A population of the test's own with three rounds in its ledger; its name."""
    from datetime import UTC, datetime

    population = f"audited-{abs(hash(request.node.name))}"
    database = Database.open(f"sqlite:///{database_path}")
    for number in (1, 2, 3):
        key = IterationKey(population, 1, number)
        with database.write() as tx:
            entries = [release(key, "model"), release(key, "metrics")]
            append_releases(tx, key, entries, standing_of(tx, population), datetime.now(UTC))
    database.close()
    return population


@pytest.fixture
def database_path(server):
    return server.data_dir / "fedcompute.db"


@pytest.fixture
def tamper(database_path):
    """Runs SQL on the server's database, behind its back."""

    def run(sql, *arguments):
        connection = sqlite3.connect(database_path)
        with connection:
            assert connection.execute(sql, arguments).rowcount > 0
        connection.close()

    return run


def release(key, what):
    model = what == "model"
    claim = {
        "participation": "NO_AMPLIFICATION",
        "estimated_population": 100,
        "minimum_separation": 0,
        "report_goal": 10,
        "delta": DELTA,
    }
    return Release(
        population=key.population,
        task_id=key.task_id,
        iteration_id=key.iteration_id,
        released=what,
        mechanism="FIXED_GAUSSIAN" if model else "NONE",
        event={"class": "GaussianDpEvent", "noise_multiplier": 3.0} if model else None,
        claim=claim if model else None,
        clip_norm=0.5 if model else None,
        report_goal=10,
        contributions=10,
        cumulative_epsilon=gaussian_epsilon(3.0 / key.iteration_id**0.5, DELTA),
        delta=DELTA,
    )


def verified(fedcompute, server, population, *more):
    result = fedcompute("privacy", "verify", "--population", population, "--server", server.url, "--json", *more)
    return result.exit_code, json.loads(result.stdout)


def test_a_whole_ledger_verifies_from_the_server_and_from_a_file(fedcompute, server, ledger, tmp_path):
    code, found = verified(fedcompute, server, ledger)
    assert (code, found["entries"], found["problems"]) == (0, 6, [])
    assert found["cumulative_epsilon"] == pytest.approx(gaussian_epsilon(3 / 3**0.5, DELTA))
    downloaded = fedcompute("privacy", "ledger", "--population", ledger, "--server", server.url)
    (tmp_path / "ledger.json").write_text(downloaded.stdout)
    told = fedcompute("privacy", "verify", tmp_path / "ledger.json", "--head", found["head"])
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["chain", "ok"], ["events", "ok"], ["epsilon", "ok"]]
    assert lines[4].split() == ["head", found["head"]]


@pytest.mark.parametrize(
    ("sql", "finding"),
    [
        (
            "UPDATE privacy_ledger SET contributions = 9 WHERE population_name = ? AND sequence = 3",
            "entry 3 was changed",
        ),
        (
            "UPDATE privacy_ledger SET cumulative_epsilon = 0.01 WHERE population_name = ? AND sequence IN (3, 4)",
            "entry 3 says epsilon",
        ),
        ("DELETE FROM privacy_ledger WHERE population_name = ? AND sequence = 3", "entry 3 is missing"),
        ("UPDATE privacy_ledger SET sequence = 7 WHERE population_name = ? AND sequence = 3", "entry 3 is missing"),
        (
            "INSERT INTO privacy_ledger SELECT population_name, 7, 2, iteration_id, released, mechanism, event, claim, "
            "clip_norm, report_goal, contributions, cumulative_epsilon, delta, created_time, previous_hash, hash "
            "FROM privacy_ledger WHERE population_name = ? AND sequence = 6",
            "entry 7 was changed",
        ),
        ("UPDATE privacy_ledger SET event = '{}' WHERE population_name = ? AND sequence = 5", "cannot be read"),
    ],
)
def test_hands_in_the_database_are_named(fedcompute, server, ledger, tamper, sql, finding):
    tamper(sql, ledger)
    code, found = verified(fedcompute, server, ledger)
    assert code == 1
    assert any(finding in problem for problem in found["problems"]), found["problems"]
    told = fedcompute("privacy", "verify", "--population", ledger, "--server", server.url)
    assert told.exit_code == 1
    assert "WRONG" in told.stdout
    assert "ledger_tampered" in told.stderr


def test_a_cut_end_is_seen_by_a_noted_head_only(fedcompute, server, ledger, tamper):
    head = verified(fedcompute, server, ledger)[1]["head"]
    tamper("DELETE FROM privacy_ledger WHERE population_name = ? AND sequence > 4", ledger)
    assert verified(fedcompute, server, ledger)[0] == 0
    code, found = verified(fedcompute, server, ledger, "--head", head)
    assert code == 1
    assert "noted head" in found["problems"][0]


def test_a_ledger_of_another_population_is_refused(fedcompute, server, ledger, tmp_path):
    (tmp_path / "ledger.json").write_text(
        fedcompute("privacy", "ledger", "--population", ledger, "--server", server.url).stdout
    )
    result = fedcompute("privacy", "verify", tmp_path / "ledger.json", "--population", "other")
    assert (result.exit_code, "ledger_malformed" in result.stderr) == (1, True)
    assert fedcompute("privacy", "verify").exit_code == 1
    assert fedcompute("privacy", "verify", tmp_path / "none.json").exit_code == 1


HOSTILE = {
    "huge round": ('"iteration_id": 3', '"iteration_id": 4611686018427387904'),
    "huge number": ('"noise_multiplier": 3.0', '"noise_multiplier": ' + 4000 * "9"),
    "no number": ('"noise_multiplier": 3.0', '"noise_multiplier": NaN'),
    "infinity": ('"clip_norm": 0.5', '"clip_norm": Infinity'),
    "twice": ('"contributions": 10', '"contributions": 10, "contributions": 11'),
    "nested": ('"noise_multiplier": 3.0', '"noise_multiplier": ' + 20_000 * "[" + 20_000 * "]"),
    "wrong type": ('"clip_norm": 0.5', '"clip_norm": {}'),
    "control": ('"FIXED_GAUSSIAN"', '"\\u001b[2J"'),
    "many": ('"entries": [', '"entries": [' + 20_000_000 * "[],"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_ends_in_one_plain_error(fedcompute, server, ledger, tmp_path, kind):
    text = fedcompute("privacy", "ledger", "--population", ledger, "--server", server.url).stdout
    before, after = HOSTILE[kind]
    assert before in text
    (tmp_path / "ledger.json").write_text(text.replace(before, after, 1))
    result = fedcompute("privacy", "verify", tmp_path / "ledger.json")
    assert (result.exit_code, "ledger_malformed" in result.stderr) == (1, True), result.output
    assert len(result.stderr) < 1000


def asked(fedcompute, server, population, *more):
    result = fedcompute("privacy", "budget", "--population", population, "--server", server.url, *more)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_budget_is_set_shown_with_what_is_left_and_removed(fedcompute, server, ledger):
    assert "has no budget" in asked(fedcompute, server, ledger)
    set_it = ("--epsilon", 9, "--delta", DELTA, "--assumption", "no_amplification")
    shown = json.loads(asked(fedcompute, server, ledger, *set_it, "--json"))
    spent = gaussian_epsilon(3 / 3**0.5, DELTA)
    assert shown["budget"] == {"epsilon": 9, "delta": DELTA, "assumption": "NO_AMPLIFICATION"}
    assert (shown["spent"], shown["left"]) == (pytest.approx(spent), pytest.approx(9 - spent))
    assert f"{9 - spent:.6g}" in asked(fedcompute, server, ledger)
    assert "has no budget" in asked(fedcompute, server, ledger, "--remove")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epsilon", 1],
        ["--delta", 1e-6],
        ["--epsilon", 0, "--delta", 1e-6],
        ["--epsilon", "nan", "--delta", 1e-6],
        ["--epsilon", 1, "--delta", 1e-6, "--assumption", "POISSON"],
        ["--epsilon", 1, "--delta", 1e-6, "--remove"],
        ["--remove"],
    ],
)
def test_budgets_that_make_no_sense_are_refused(fedcompute, server, arguments):
    result = fedcompute("privacy", "budget", "--population", "nobody", "--server", server.url, *arguments)
    assert result.exit_code == 1
    assert result.stderr


def test_a_task_that_spent_its_budget_says_so_wherever_it_is_shown():
    from rich.console import Console

    from fedcompute.cli.task_view import summary, task_table, task_view

    task = {
        "population": "digits", "task_id": 1, "kind": "TRAINING", "status": "COMPLETED", "reason": "budget_spent",
        "total_iteration": 9, "min_aggregation_size": 2, "max_aggregation_size": 3, "traffic_weight": 1,
        "created": "2026-03-01T12:00:00+00:00",
    }  # fmt: skip
    failure = {"code": "budget_spent", "message": "privacy budget spent: 9 of 8", "remedy": "nothing more is released"}
    view = {
        "task": task, "failure": failure, "iterations": [], "assignments": {}, "rejections": {}, "metrics": [],
        "ledger": [],
    }  # fmt: skip
    console = Console(width=200, record=True)
    console.print(task_table([task]))
    console.print(task_view(view))
    shown = console.export_text()
    assert shown.count("completed (budget spent)") == 2
    assert "ended early: privacy budget spent: 9 of 8" in shown
    assert summary(view)["reason"] == "budget_spent"
