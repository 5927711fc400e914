from fedcompute.learning.specification import training_process
from fedcompute.monitoring.comparison import RunFacts, differing, facts_of_plan, labels
from fedcompute.protos import learning_pb2, plan_pb2


def plan(aggregator):
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=(),
        non_trainable=(),
        server_optimizer=learning_pb2.Sgd(learning_rate=0.1),
        aggregator=aggregator,
        metrics=[],
    )
    return plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process).SerializeToString()


def run(task_id, population="digits", **facts):
    return RunFacts(population, task_id, {name.replace("_", " "): value for name, value in facts.items()})


def test_a_plan_tells_its_configuration_in_the_numbers_that_were_written():
    facts = facts_of_plan(plan(learning_pb2.FixedGaussian(clip_norm=0.3, noise_multiplier=0.1, report_goal=7)))
    assert facts["DP type"] == "FIXED_GAUSSIAN"
    assert (facts["noise multiplier"], facts["clip norm"], facts["server learning rate"]) == (0.1, 0.3, 0.1)
    assert facts_of_plan(plan(learning_pb2.UniformMean()))["DP type"] == "none"
    assert facts_of_plan(b"no plan") == {}


def test_runs_are_called_by_what_differs():
    runs = [run(1, noise_multiplier=0.1, clip_norm=1.0), run(2, noise_multiplier=0.3, clip_norm=1.0)]
    assert differing(runs) == ["noise multiplier"]
    assert labels(runs) == ["noise multiplier 0.1", "noise multiplier 0.3"]


def test_runs_that_differ_in_nothing_are_called_by_their_tasks():
    assert labels([run(1, clip_norm=1.0), run(2, clip_norm=1.0)]) == ["task 1", "task 2"]
    assert labels([run(1), run(1, population="letters")]) == ["digits/1", "letters/1"]


def test_no_two_runs_have_one_name():
    three = [run(1, clip_norm=1.0), run(2, clip_norm=1.0), run(3, clip_norm=2.0)]
    assert labels(three) == ["clip norm 1.0 (task 1)", "clip norm 1.0 (task 2)", "clip norm 2.0"]
