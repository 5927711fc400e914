"""`fedcompute privacy` at the prompt."""

import json
import math

import dp_accounting
import pytest
from dp_accounting import pld

from fedcompute.privacy.composition import TaskReleases, epsilon, unamplified_epsilon
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.ledger_document import ledger_document
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.planned import planned_rounds

SETTING = ["--rounds", 100, "--report-goal", 100, "--devices", 100_000]
WEAK = ["--noise-multiplier", 0.35, "--rounds", 10, "--report-goal", 10, "--devices", 1000]


def asked(fedcompute, *arguments):
    result = fedcompute("privacy", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_calibrated_noise_spends_at_most_its_target(fedcompute):
    noise = asked(fedcompute, "noise", "--target-epsilon", 2, *SETTING)["noise_multiplier"]
    spent = asked(fedcompute, "epsilon", "--noise-multiplier", noise, *SETTING)
    assert 1.99 < spent["sampled_epsilon"] <= 2
    assert spent["epsilon"] > spent["sampled_epsilon"]


def test_a_minimum_separation_lowers_the_epsilon_that_assumes_no_sampling(fedcompute):
    often = asked(fedcompute, "epsilon", "--noise-multiplier", 1, *SETTING)
    rarely = asked(fedcompute, "epsilon", "--noise-multiplier", 1, *SETTING, "--minimum-separation", 10)
    assert rarely["participations"] == 10
    assert rarely["epsilon"] < often["epsilon"]
    assert rarely["unamplified_epsilon"] == often["unamplified_epsilon"] == often["epsilon"]


def test_no_noise_is_null_for_programs_and_inf_for_people(fedcompute):
    assert asked(fedcompute, "epsilon", "--noise-multiplier", 0, *SETTING)["epsilon"] is None
    assert "epsilon inf" in fedcompute("privacy", "epsilon", "--noise-multiplier", 0, *SETTING).output


def test_the_default_is_the_references_claim_as_dp_accounting_has_it(fedcompute):
    found = asked(fedcompute, "epsilon", "--noise-multiplier", 1, *SETTING)
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(1e-3, dp_accounting.GaussianDpEvent(1.0)), 100)
    assert found["claimed_epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert found["unamplified_epsilon"] == pytest.approx(dp_accounting.get_epsilon_gaussian(0.1, 1e-5), rel=1e-9)


@pytest.mark.parametrize(
    ("mechanism", "participation"),
    [
        ("fixed_gaussian", "fixed_size"),
        ("fixed_gaussian", "no_amplification"),
        ("adaptive_gaussian", "min_separation"),
        ("tree_aggregation", "poisson"),
        ("tree_aggregation", "no_amplification"),
        ("adaptive_tree", "min_separation"),
        ("banded_mf", "min_separation"),
        ("banded_mf", "no_amplification"),
    ],
)
def test_every_mechanism_under_every_assumption_is_what_the_accountants_say(fedcompute, mechanism, participation):
    found = asked(
        fedcompute, "epsilon", "--noise-multiplier", 4, *SETTING, "--mechanism", mechanism, "--participation",
        participation, "--minimum-separation", 5, "--metrics-noise-multiplier", 30, "--delta", 1e-6,
    )  # fmt: skip
    releases = planned_rounds(mechanism, 4.0, 100, report_goal=100, bands=5, metrics_noise_multiplier=30.0)
    task = TaskReleases(releases, Assumption(Participation[participation.upper()], 100_000, 100, 5))
    assert found["claimed_epsilon"] == pytest.approx(epsilon([task], 1e-6), rel=1e-9)
    assert found["unamplified_epsilon"] == pytest.approx(unamplified_epsilon([task], 1e-6), rel=1e-9)
    assert found["participation"] == participation
    assert (found["sampled_epsilon"] is None) == (participation in ("min_separation", "no_amplification"))


def test_an_unset_participation_is_the_one_of_the_task_builder(fedcompute):
    def chosen(mechanism):
        arguments = ["--noise-multiplier", 4, *SETTING, "--mechanism", mechanism, "--minimum-separation", 10]
        return asked(fedcompute, "epsilon", *arguments)

    assert chosen("fixed_gaussian")["participation"] == "poisson"
    assert chosen("banded_mf")["participation"] == "min_separation"
    assert chosen("banded_mf")["bands"] == 10


@pytest.mark.parametrize(("command", "number"), [("epsilon", "--noise-multiplier"), ("noise", "--target-epsilon")])
@pytest.mark.parametrize("mechanism", ["fixed_gaussian", "tree_aggregation", "banded_mf"])
def test_epsilon_without_amplification_is_always_said_and_warned_of_where_it_is_far(
    fedcompute, command, number, mechanism
):
    output = fedcompute(
        "privacy", command, number, 2, *SETTING, "--mechanism", mechanism, "--minimum-separation", 10
    ).output
    assert "without amplification" in output
    assert "warning: epsilon is" in output


def test_nothing_is_warned_of_where_nothing_is_assumed(fedcompute):
    arguments = ["epsilon", "--noise-multiplier", 20, *SETTING, "--participation", "no_amplification"]
    assert "warning" not in fedcompute("privacy", *arguments).output
    assert asked(fedcompute, *arguments)["warning"] is None


def test_with_weak_noise_proven_bounds_come_before_the_exact_value(fedcompute):
    exact = asked(fedcompute, "epsilon", *WEAK)
    assert exact["lower_bound"] < exact["claimed_epsilon"] < exact["upper_bound"]
    lines = fedcompute("privacy", "epsilon", *WEAK).output.splitlines()
    assert "proven" in lines[1]
    assert f"epsilon {exact['claimed_epsilon']:.6g} " in lines[2]


def test_quick_stops_at_the_bounds(fedcompute):
    exact, quick = asked(fedcompute, "epsilon", *WEAK), asked(fedcompute, "epsilon", *WEAK, "--quick")
    assert quick["claimed_epsilon"] is None
    assert quick.keys() == exact.keys()
    assert (quick["lower_bound"], quick["upper_bound"]) == (exact["lower_bound"], exact["upper_bound"])
    output = fedcompute("privacy", "epsilon", *WEAK, "--quick").output
    assert "proven" in output
    assert f"{exact['claimed_epsilon']:.6g}" not in output
    closed = asked(fedcompute, "epsilon", *WEAK, "--quick", "--participation", "no_amplification")
    assert closed["claimed_epsilon"] == closed["unamplified_epsilon"]


def test_noise_that_is_calibrated_by_bounds_is_on_the_safe_side_and_close(fedcompute):
    setting = ["--rounds", 10, "--report-goal", 10, "--devices", 1000]
    quick = asked(fedcompute, "noise", "--target-epsilon", 3, *setting, "--quick")
    assert quick["upper_bound"] <= 3
    exact = asked(fedcompute, "epsilon", "--noise-multiplier", quick["noise_multiplier"], *setting)
    assert 2.99 < exact["claimed_epsilon"] <= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--delta", 0],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--delta", 1],
        ["epsilon", "--noise-multiplier", "inf", *SETTING],
        ["epsilon", "--noise-multiplier", 1e6, *SETTING],
        ["epsilon", "--noise-multiplier", 1e6, *SETTING, "--mechanism", "tree_aggregation"],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--metrics-noise-multiplier", 1e6],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--metrics-noise-multiplier", "inf"],
        ["noise", "--target-epsilon", 0, *SETTING],
        ["noise", "--target-epsilon", "nan", *SETTING],
        ["epsilon", "--noise-multiplier", 1, "--rounds", 1, "--report-goal", 11, "--devices", 10],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--mechanism", "banded_mf", "--participation", "poisson"],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--mechanism", "adaptive_tree", "--participation", "fixed_size"],
        ["epsilon", "--noise-multiplier", 10, *SETTING, "--mechanism", "adaptive_gaussian"],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--bands", 3],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--mechanism", "banded_mf", "--bands", 101],
        ["epsilon", "--noise-multiplier", 1, "--rounds", 9, "--report-goal", 5, "--devices", 20,
         "--minimum-separation", 5],
        ["noise", "--target-epsilon", 1, *SETTING, "--metrics-noise-multiplier", 0.5, "--participation",
         "no_amplification"],
        ["noise", "--target-epsilon", 1, *SETTING, "--metrics-noise-multiplier", 0.5, "--participation",
         "no_amplification", "--quick"],
        ["noise", "--target-epsilon", 0.5, *SETTING, "--mechanism", "adaptive_gaussian", "--participation",
         "no_amplification"],
        ["report"],
        ["report", "--ledger", "/nowhere/at/all.json"],
        ["report", "--ledger", "/nowhere/at/all.json", "--delta", 1],
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(fedcompute, arguments):
    result = fedcompute("privacy", *arguments)
    assert result.exit_code == 1
    assert "settings_invalid" in result.stderr or "storage_failed" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["epsilon", "noise", "report", "verify", "ledger", "budget", "audit"])
def test_every_command_explains_itself_with_an_example(fedcompute, command):
    result = fedcompute("privacy", command, "--help")
    assert result.exit_code == 0
    assert f"fedcompute privacy {command}" in result.output


@pytest.fixture
def ledger_file(write_ledger, tmp_path):
    """A ledger of population digits as a file: task 1 trained for 3 rounds, task 2 evaluated twice."""
    task = {
        "task_id": 1, "rounds": [[GaussianEvent(1.0)]] * 3, "participation": Participation.POISSON, "devices": 1000,
        "separation": 2,
    }  # fmt: skip
    found = write_ledger(task, {"task_id": 2, "kind": "EVALUATION", "rounds": [[]] * 2})
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(ledger_document(found.population, found.entries, None, found.tasks)))
    return path


def test_a_report_of_a_downloaded_ledger_needs_no_server(fedcompute, ledger_file, tmp_path):
    page = tmp_path / "pages" / "report.html"
    result = fedcompute("privacy", "report", "--ledger", ledger_file, "--html", page)
    assert result.exit_code == 0, result.output
    assert "digits, task 1 (training, completed): FIXED_GAUSSIAN" in result.output
    assert "chain whole" in result.output
    found = asked(fedcompute, "report", "--ledger", ledger_file)
    task = TaskReleases([[GaussianEvent(1.0)]] * 3, Assumption(Participation.POISSON, 1000, 10, 2))
    assert found["epsilon"] == pytest.approx(epsilon([task], 1e-5), rel=1e-9)
    assert found["unamplified_epsilon"] == pytest.approx(unamplified_epsilon([task], 1e-5), rel=1e-9)
    assert found["releases"] == 3
    assert found["head"] in page.read_text()
    assert f"{found['epsilon']:,.6g}" in page.read_text()


def test_a_report_may_be_asked_for_other_devices_than_are_claimed(fedcompute, ledger_file):
    claimed = asked(fedcompute, "report", "--ledger", ledger_file)
    fewer = asked(fedcompute, "report", "--ledger", ledger_file, "--devices", 100, "--delta", 1e-5)
    assert fewer["epsilon"] > claimed["epsilon"]
    assert fewer["asked"] == ["100 devices instead of the task's 1,000"]


def test_a_changed_ledger_is_reported_as_such(fedcompute, ledger_file):
    document = json.loads(ledger_file.read_text())
    document["entries"][2]["contributions"] = 9
    ledger_file.write_text(json.dumps(document))
    assert (
        "1 findings, the first: entry 3 was changed" in fedcompute("privacy", "report", "--ledger", ledger_file).output
    )
    assert len(asked(fedcompute, "report", "--ledger", ledger_file)["problems"]) == 1


@pytest.mark.parametrize(
    "arguments", [["--task-id", 7], ["--population", "letters"], ["--devices", 3], ["--html", "/dev/null/page.html"]]
)
def test_a_report_that_cannot_be_made_says_why(fedcompute, ledger_file, arguments):
    result = fedcompute("privacy", "report", "--ledger", ledger_file, *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert not isinstance(result.exception, (TypeError, ValueError, KeyError))


def test_a_file_that_is_no_ledger_is_refused(fedcompute, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text("[]")
    assert "ledger_malformed" in fedcompute("privacy", "report", "--ledger", path).stderr


def test_more_noise_never_spends_more(fedcompute):
    spent = [
        asked(fedcompute, "epsilon", "--noise-multiplier", noise, *SETTING, "--participation", "min_separation")
        for noise in (0, 1e-3, 0.5, 1, 30)
    ]
    values = [math.inf if one["claimed_epsilon"] is None else one["claimed_epsilon"] for one in spent]
    assert values == sorted(values, reverse=True)
