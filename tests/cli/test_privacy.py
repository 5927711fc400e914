"""`fedcompute privacy` at the prompt."""

import json

import pytest

SETTING = ["--rounds", 100, "--report-goal", 100, "--devices", 100_000]


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


def test_no_noise_is_null_for_programs_and_inf_for_people(fedcompute):
    assert asked(fedcompute, "epsilon", "--noise-multiplier", 0, *SETTING)["epsilon"] is None
    assert "epsilon inf" in fedcompute("privacy", "epsilon", "--noise-multiplier", 0, *SETTING).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--delta", 0],
        ["epsilon", "--noise-multiplier", 1, *SETTING, "--delta", 1],
        ["noise", "--target-epsilon", 0, *SETTING],
        ["noise", "--target-epsilon", "nan", *SETTING],
        ["epsilon", "--noise-multiplier", 1, "--rounds", 1, "--report-goal", 11, "--devices", 10],
    ],
)
def test_numbers_that_make_no_sense_are_refused(fedcompute, arguments):
    result = fedcompute("privacy", *arguments)
    assert result.exit_code == 1
    assert "settings_invalid" in result.stderr
