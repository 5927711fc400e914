"""What the builder sends to task management, as seen there."""

import threading
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
from fedcompute.builder.task_management import link_warning, register_group
from fedcompute.protos import task_builder_pb2, task_pb2


def test_requests_that_run_at_once_carry_each_the_key_of_its_own_caller_and_uploads_carry_none(serve):
    # Every caller is held at its first request until all of them are there.
    together, seen = threading.Barrier(3, timeout=60), []

    def create(request):
        population = request.path_params["population"]
        together.wait()
        seen.append((population, request.headers.get("x-api-key")))
        base = f"{str(request.base_url).rstrip('/')}/blobs/{population}"
        task = task_pb2.Task(population_name=population, task_id=1)
        for urls in (task.init_checkpoint_url, task.server_phase_url, task.client_only_plan_url):
            urls.append(base)
        return Response(task_pb2.CreateTaskResponse(task=task).SerializeToString())

    def put(request):
        seen.append(("upload", request.headers.get("x-api-key") or request.headers.get("authorization")))
        return PlainTextResponse("")

    app = Starlette(
        routes=[
            Route("/taskmanagement/v1/population/{population}:create-task", create, methods=["POST"]),
            Route("/blobs/{path:path}", put, methods=["PUT"]),
        ]
    )
    keys = {name: f"fc_key_of_{name}" for name in ("a", "b", "c")}

    def register(name):
        built = BuiltTask(task_pb2.Task(population_name=name), b"plan", b"client plan", b"checkpoint")
        return register_group(url, BuiltGroup(built, None, task_builder_pb2.TaskReport()), api_key=keys[name])

    with serve(app) as url, ThreadPoolExecutor(3) as pool:
        groups = list(pool.map(register, keys))
    assert [one.training_task.population_name for one in groups] == list(keys)
    assert {one for one in seen if one[0] != "upload"} == set(keys.items())
    assert [one for one in seen if one[0] == "upload"] == [("upload", None)] * 9


def test_an_evaluation_that_reads_another_training_task_than_its_own_is_remarked_on():
    training = task_pb2.Task(population_name="digits", task_id=7)
    for source, remarked in ((1, True), (7, False)):
        evaluation = task_pb2.Task(population_name="digits", task_id=8)
        evaluation.info.evaluation_info.training_population_name = "digits"
        evaluation.info.evaluation_info.training_task_id = source
        warning = link_warning(task_builder_pb2.TaskGroup(training_task=training, eval_task=evaluation))
        assert (warning is not None) is remarked
        assert not remarked or {"1,", "7"} <= set(warning.split())
