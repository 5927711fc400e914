"""`fedcompute privacy audit` at the prompt. Verdicts: see tests/learning/test_audit.py."""

import json

import pytest

from fedcompute.cli.privacy_audit import Mechanism

QUICK = ["--canaries", 300, "--rounds", 2]
# Of a mechanism as claimed; the theorem's rate for an accusation all the same.
NEARLY_CERTAIN = ["--confidence", 1 - 1e-6]

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def asked(fedcompute, *arguments):
    result = fedcompute("privacy", "audit", *QUICK, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.parametrize("mechanism", Mechanism)
def test_every_mechanism_can_be_audited(fedcompute, mechanism):
    found = asked(fedcompute, "--mechanism", mechanism, "--minimum-separation", 2, *NEARLY_CERTAIN)
    assert found["epsilon_lower_bound"] <= found["claimed_epsilon"]
    assert not found["refuted"]
    assert found["accuracy"] > 0.3


def test_noise_that_is_weakened_in_secret_is_refuted(fedcompute):
    # Without any noise at all, a wrong guess is out of the question.
    assert asked(fedcompute, "--weaken", 0)["refuted"]
    assert "REFUTED" in fedcompute("privacy", "audit", *QUICK, "--weaken", 0).output


def test_a_task_without_noise_claims_nothing_and_shows_a_lot(fedcompute):
    found = asked(fedcompute, "--noise-multiplier", 0)
    assert found["claimed_epsilon"] is None
    assert found["epsilon_lower_bound"] > 0.5 * found["largest_lower_bound"] > 0
    assert "Nothing is claimed" in fedcompute("privacy", "audit", *QUICK, "--noise-multiplier", 0).output


def test_people_read_claim_and_bounds(fedcompute):
    output = fedcompute("privacy", "audit", *QUICK, *NEARLY_CERTAIN).output
    assert "claimed epsilon" in output
    assert "Not refuted" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--delta", 0],
        ["--delta", "nan"],
        ["--confidence", 1],
        ["--noise-multiplier", 100, "--mechanism", "adaptive_gaussian"],
    ],
)
def test_numbers_that_make_no_sense_are_refused(fedcompute, arguments):
    result = fedcompute("privacy", "audit", *QUICK, *arguments)
    assert result.exit_code == 1
    assert "settings_invalid" in result.stderr
