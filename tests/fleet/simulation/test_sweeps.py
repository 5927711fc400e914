import pytest

from fedcompute.errors import ConfigInvalid
from fedcompute.fleet.simulation.jobs import Setup
from fedcompute.fleet.simulation.sweeps import read_sweep, variants
from fedcompute.protos import task_builder_pb2

SETUP = Setup(task_builder_pb2.TaskConfig(population_name="p").SerializeToString(), b"", "digits-linear", "digits", 10)


def test_every_combination_is_run_and_nothing_else_changes():
    sweeps = [
        read_sweep("client_learning_rate=0.1, 0.5"),
        read_sweep("learning_process.type=FED_SGD"),
        read_sweep("seed=1,2"),
    ]
    found = variants(SETUP, sweeps)
    assert [tuple(one.values.values()) for one in found] == [
        (rate, "FED_SGD", seed) for rate in ("0.1", "0.5") for seed in ("1", "2")
    ]
    assert found[1].label == "client_learning_rate 0.1, type FED_SGD, seed 2"
    config = task_builder_pb2.TaskConfig.FromString(found[3].setup.config)
    process = config.federated_learning.learning_process
    assert (process.client_learning_rate, process.type) == (0.5, task_builder_pb2.LearningAlgo.FED_SGD)
    assert (config.population_name, found[3].setup.seed, found[3].setup.clients) == ("p", 2, 10)


def test_without_a_sweep_there_is_one_run_as_configured():
    (only,) = variants(SETUP, [])
    assert (only.setup, only.label) == (SETUP, "")


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("clip_norm", "no sweep", "client_learning_rate="),
        ("clip_norm=", "no sweep", "client_learning_rate="),
        ("report_goal=1", "names 2 fields", "federated_learning.evaluation.report_goal"),
        ("learning_rate=1", "names 0 fields", "client_learning_rate"),
        ("nonsense=1", "names 0 fields", "task init"),
    ],
)
def test_a_field_that_is_not_one_is_refused_with_what_it_could_be(text, message, remedy):
    with pytest.raises(ConfigInvalid, match=message) as caught:
        read_sweep(text)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "text",
    ["clip_norm=much", "differential_privacy.type=LAPLACE", "use_daf=yes", "minimum_separation=1.5", "seed=x",
     "minimum_separation=99999999999999999999"],
)  # fmt: skip
def test_a_value_that_the_field_cannot_hold_is_refused_by_both(text):
    name, _, value = text.partition("=")
    with pytest.raises(ConfigInvalid, match=rf"{name} cannot be '?{value}"):
        variants(SETUP, [read_sweep(text)])


def test_more_runs_than_a_chart_can_show_are_refused():
    listed = ",".join(map(str, range(51)))
    with pytest.raises(ConfigInvalid, match="51 runs"):
        variants(SETUP, [read_sweep(f"seed={listed}")])
