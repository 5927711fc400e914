import json
import re

import pytest
from typer.testing import CliRunner

from fedcompute.builder.sample_config import sample_config
from fedcompute.cli import app
from fedcompute.protos import task_builder_pb2

TRAINING = "server/client_work/train/loss"
HELD_OUT = "server/eval/loss"


def simulate(*arguments, code=0):
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "task_config.pbtxt"
    text = sample_config(task_builder_pb2.TaskMode.TRAINING_ONLY, rounds=50, report_goal=8)
    file.write_text(text.replace("clip_norm: 0.1", "clip_norm: 1"))
    return file


def test_a_run_says_how_the_model_learns_and_what_it_would_spend(config, tmp_path):
    arguments = (config, "--model=digits-linear", "--clients=40", "--rounds=4")
    output = simulate(*arguments, "--evaluate-every=2", "--out", tmp_path / "out")
    lines = output.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("round ")] == ["0", "2", "4"]
    assert "4 rounds of 8 clients" in output
    assert re.search(r"a task that runs so spends epsilon \d\S* at delta 1e-06", output)
    found = json.loads((tmp_path / "out/simulation.json").read_text())
    (run,) = found["runs"]
    assert [one["number"] for one in run["rounds"]] == [0, 1, 2, 3, 4]
    assert (TRAINING in run["rounds"][3]["metrics"], HELD_OUT in run["rounds"][3]["metrics"]) == (True, False)
    assert run["rounds"][4]["metrics"][HELD_OUT] < run["rounds"][0]["metrics"][HELD_OUT]
    assert {one.name for one in (tmp_path / "out").glob("*.png")} == {
        "server.client_work.train.loss.png",
        "server.eval.loss.png",
    }


def test_a_sweep_by_two_processes_is_that_of_one(config):
    arguments = (config, "--model=digits-linear", "--clients=40", "--rounds=1", "--json", "--skip-dp-aggregator")
    sweep = ("--sweep=client_learning_rate=0.05,0.3",)
    alone, shared = (json.loads(simulate(*arguments, *sweep, f"--processes={count}")) for count in (1, 2))
    losses = []
    for one, other in zip(alone["runs"], shared["runs"], strict=True):
        assert one["label"] == other["label"]
        assert (one["epsilon"], other["epsilon"]) == (None, None)
        losses.append(one["rounds"][-1]["metrics"][HELD_OUT])
        assert losses[-1] == pytest.approx(other["rounds"][-1]["metrics"][HELD_OUT], rel=1e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model=digits-linear", "--clients=5"), "rounds of 8, 1 rounds apart, need 8"),
        (("--model=digits-linear", "--clients=40", "--rounds=51"), "51 rounds of a task that has 50"),
        (("--model=nowhere",), "there is no saved model at nowhere"),
        (("--model=digits-linear", "--data=nowhere"), "'nowhere' is neither"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_remedy(config, arguments, said):
    output = simulate(config, *arguments, code=1)
    assert said in output
    assert "Remedy:" in output
