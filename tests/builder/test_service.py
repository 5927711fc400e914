"""The service over real HTTP, with a task management of its own that keeps what it gets."""

import gzip
import re
import subprocess
import sys
from dataclasses import replace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedcompute.builder.client import build_request, send
from fedcompute.builder.service import ServiceSettings, create_service
from fedcompute.builder.task_management import PROTOBUF
from fedcompute.learning.plans import read_plan
from fedcompute.protos import plan_pb2, task_builder_pb2, task_pb2
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.job_data import decode_data, encode_data, name_of, named
from fedcompute.tensors.checkpoint import read_checkpoint

Flags = task_builder_pb2.ExperimentFlags
ErrorType = task_builder_pb2.ErrorType


class TaskManagement:
    """Creates tasks with ids from 1 and takes their artifacts; the server room, which is tested there, does more."""

    def __init__(self) -> None:
        self.forget()
        self.app = Starlette(
            routes=[
                Route("/taskmanagement/v1/population/{population}:create-task", self.create, methods=["POST"]),
                Route("/taskmanagement/v1/population/{population}/tasks/{id}:cancel", self.cancel, methods=["POST"]),
                Route("/blobs/{path:path}", self.put, methods=["PUT"]),
            ]
        )

    def forget(self) -> None:
        self.tasks: list[task_pb2.Task] = []
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.cancelled: list[str] = []
        self.refuse_creation_from = 99
        self.refuse_uploads_of = "nothing"

    async def create(self, request):
        task = task_pb2.CreateTaskRequest.FromString(await request.body()).task
        if len(self.tasks) + 1 >= self.refuse_creation_from:
            return PlainTextResponse("only one active training task is allowed", status_code=409)
        task.task_id = len(self.tasks) + 1
        base = f"{str(request.base_url).rstrip('/')}/blobs/{task.task_id}"
        task.init_checkpoint_url.append(f"{base}/checkpoint?signature=secret")
        task.server_phase_url.append(f"{base}/plan?signature=secret")
        task.client_only_plan_url.append(f"{base}/client_plan?signature=secret")
        self.tasks.append(task)
        return Response(task_pb2.CreateTaskResponse(task=task).SerializeToString())

    async def put(self, request):
        path = request.path_params["path"]
        if path.endswith(self.refuse_uploads_of):
            return PlainTextResponse("full", status_code=507)
        self.objects[path] = (await request.body(), request.headers.get("content-encoding"))
        return PlainTextResponse("")

    async def cancel(self, request):
        self.cancelled.append(f"{request.path_params['population']}/{request.path_params['id']}")
        return PlainTextResponse("")


@pytest.fixture(scope="module")
def service(serve, tmp_path_factory):
    """(task management, builder URL, storage root) of one service, whose worker process stays warm."""
    management = TaskManagement()
    root = tmp_path_factory.mktemp("storage") / "out"
    with serve(management.app) as management_url:
        management.url = management_url
        settings = ServiceSettings(task_management_url=f"{management_url}/", storage_root=root)
        with serve(create_service(settings)) as url:
            yield management, url, root


@pytest.fixture
def task_management(service):
    service[0].forget()
    return service[0]


@pytest.fixture
def builder(service, task_management):
    return service[1]


@pytest.fixture
def storage_root(service):
    return service[2]


@pytest.fixture
def request_of(config, dense_model):
    def make(flags=None, model=dense_model):
        return build_request(str(model), config, flags or Flags())

    return make


def test_a_task_group_is_built_created_and_uploaded(builder, task_management, request_of):
    response = send(request_of(), builder)
    assert response.WhichOneof("result") == "task_group", response
    group = response.task_group
    assert (group.training_task.task_id, group.eval_task.task_id) == (1, 2)
    assert list(task_management.tasks) == [group.training_task, group.eval_task]
    assert {encoding for _, encoding in task_management.objects.values()} == {"gzip"}
    objects = {path: gzip.decompress(body) for path, (body, _) in task_management.objects.items()}
    for task_id in (1, 2):
        plan = read_plan(objects[f"{task_id}/plan"])
        client = plan_pb2.ClientOnlyPlan.FromString(objects[f"{task_id}/client_plan"])
        assert client.tflite_graph == plan.client_tflite_graph_bytes
        assert "server/global_model_weights/trainable/0" in read_checkpoint(objects[f"{task_id}/checkpoint"])
    assert response.task_report.dp_hyperparameters.num_training_rounds == 20
    assert not task_management.cancelled


def test_tasks_are_cancelled_when_an_upload_fails_and_no_signature_is_shown(builder, task_management, request_of):
    task_management.refuse_uploads_of = "2/client_plan"
    response = send(request_of(), builder)
    assert response.error_info.error_type == ErrorType.ARTIFACT_BUILDING_ERROR
    assert response.error_info.error_message.startswith("Artifact failed to upload for task 2: Cannot upload artifact")
    assert "secret" not in response.error_info.error_message
    assert task_management.cancelled == ["digits/1", "digits/2"]
    assert response.task_report.applied_algorithms.learning_algo == 1


def test_a_refused_second_task_undoes_the_first_and_the_reason_reaches_the_user(builder, task_management, request_of):
    task_management.refuse_creation_from = 2
    response = send(request_of(), builder)
    assert response.error_info.error_type == ErrorType.TASK_MANAGEMENT_ERROR
    assert response.error_info.error_message == (
        "Failed to create tasks by task management service: 409: Conflict: only one active training task is allowed"
    )
    assert task_management.cancelled == ["digits/1"]
    assert not task_management.objects


def test_every_kind_of_failure_has_its_type_text_and_report(
    builder, task_management, config, request_of, refused_model
):
    refused = send(request_of(model=refused_model), builder)
    assert refused.error_info.error_type == ErrorType.ARTIFACT_BUILDING_ERROR
    text = refused.error_info.error_message
    assert text.startswith(
        "Artifact building failed for task 0: Cannot build the ClientOnlyPlan: Please contact Google"
    )
    assert text.endswith("}\n. Stop building remaining artifacts.")
    assert refused.task_report.dp_hyperparameters.num_training_rounds == 20

    no_model = task_builder_pb2.BuildTaskRequest(task_config=config)
    assert send(no_model, builder).error_info.error_type == ErrorType.INVALID_REQUEST
    no_model.saved_model.inline_resource.data = b"no archive"
    assert "cannot be read" in send(no_model, builder).error_info.error_message

    config.federated_learning.learning_process.runtime_config.report_goal = 0
    invalid = send(request_of(), builder)
    assert invalid.error_info.error_type == ErrorType.INVALID_REQUEST
    assert invalid.error_info.error_message.startswith(
        "Task config is invalid: [Invalid task config]: key `report_goal` has a bad value: `0` in `runtime_config`."
    )
    assert invalid.HasField("task_report")
    assert not task_management.tasks


def test_an_artifact_only_build_writes_six_files_and_creates_no_task(
    builder, task_management, config, request_of, storage_root
):
    out = storage_root
    for block, prefix in (
        (config.federated_learning.learning_process, ""),
        (config.federated_learning.evaluation, "eval_"),
    ):
        block.artifact_building.plan_url = str(out / f"{prefix}plan.pb")
        block.artifact_building.client_plan_url = (out / f"{prefix}client_only_plan.pb").as_uri()
        block.artifact_building.checkpoint_url = str(out / f"{prefix}initial_state.server.ckp")
    response = send(request_of(), builder, artifact_only=True)
    assert response.WhichOneof("result") == "task_group", response
    assert list(response.task_group.training_task.server_phase_url) == [str(out / "plan.pb")]
    assert response.task_group.eval_task.min_client_version == "341812000"
    assert len(list(out.iterdir())) == 6
    read_plan((out / "eval_plan.pb").read_bytes())
    assert not task_management.tasks


@pytest.mark.parametrize(
    "url", ["", "{storage_path}/plan.pb", "/etc/plan.pb", "ROOT/../plan.pb", "gs://bucket/plan.pb", "file://host/x"]
)
def test_an_artifact_place_outside_the_storage_root_is_refused_before_the_build(
    builder, config, request_of, url, storage_root
):
    block = config.federated_learning.learning_process.artifact_building
    block.plan_url = url.replace("ROOT", str(storage_root))
    response = send(request_of(), builder, artifact_only=True)
    assert response.error_info.error_type == ErrorType.INVALID_REQUEST
    assert "Cannot build artifacts because createTask returns invalid URLs: " in response.error_info.error_message


def test_a_body_that_is_no_request_is_a_400_and_a_large_one_a_413(serve):
    with serve(create_service(ServiceSettings(max_request_bytes=1000))) as url:
        route = f"{url}/taskbuilder/v1:build-task-group"
        with httpx.Client(trust_env=False) as client:
            kind = {"content-type": PROTOBUF}
            assert client.post(route, content=b"\xff\xff", headers=kind).status_code == 400
            assert client.post(route, content=b"x" * 1001, headers=kind).status_code == 413
            assert client.get(f"{url}/ready").status_code == client.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"content-type": "text/plain"}, 415), ({}, 415), ({"content-type": PROTOBUF, "host": "evil.example"}, 403)],
)
def test_a_request_that_a_web_page_could_send_is_refused(serve, headers, status):
    settings = ServiceSettings(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))
    with serve(create_service(settings)) as url, httpx.Client(trust_env=False) as client:
        answer = client.post(f"{url}/taskbuilder/v1:build-artifacts", content=b"", headers=headers)
        assert answer.status_code == status
        own = client.post(f"{url}/taskbuilder/v1:build-artifacts", content=b"", headers={"content-type": PROTOBUF})
        assert own.status_code == 200


def artifacts_of(task_management, task_id):
    return {
        name: gzip.decompress(task_management.objects[f"{task_id}/{name}"][0])
        for name in ("plan", "client_plan", "checkpoint")
    }


def test_an_equal_build_is_done_once_and_a_changed_one_again(builder, task_management, config, request_of, caplog):
    caplog.set_level("INFO", "fedcompute.builder.service")
    config.population_name = "cached"
    first = send(request_of(), builder)
    second = send(request_of(), builder)
    assert caplog.text.count("were built before") == 1
    assert artifacts_of(task_management, 1) == artifacts_of(task_management, 3)
    assert artifacts_of(task_management, 2) == artifacts_of(task_management, 4)
    # A second registration has other ids, of which the report warns.
    assert second.task_report.warnings.pop() not in first.task_report.warnings
    assert second.task_report == first.task_report
    correlations = [group.training_task.correlation_id for group in (first.task_group, second.task_group)]
    assert len(set(correlations)) == 2
    assert second.task_group.eval_task.correlation_id == correlations[1]
    config.federated_learning.learning_process.client_learning_rate = 0.2
    send(request_of(), builder)
    send(request_of(Flags(skip_flex_ops_check=True)), builder)
    assert caplog.text.count("were built before") == 1


def test_no_artifact_of_a_tree_holds_noise_which_begins_on_the_server(builder, task_management, config, request_of):
    config.population_name = "trees"
    config.differential_privacy.type = task_builder_pb2.DpAggregator.TREE_AGGREGATION
    config.differential_privacy.noise_multiplier = 8
    for _ in range(2):
        assert send(request_of(), builder).WhichOneof("result") == "task_group"
    first, second = (read_checkpoint(artifacts_of(task_management, task)["checkpoint"]) for task in (1, 3))
    assert first.keys() == second.keys()
    buffers = [name for name in first if "/level_buffer/" in name]
    assert buffers
    assert not any(first[name].any() for name in buffers)
    for name in first:
        assert (first[name] == second[name]).all()


def test_a_model_that_runs_python_is_refused_and_never_run(builder, request_of, python_model):
    path, trace = python_model
    trace.unlink(missing_ok=True)
    response = send(request_of(model=path), builder)
    assert response.error_info.error_type == ErrorType.INVALID_REQUEST
    assert "has the operation EagerPyFunc" in response.error_info.error_message
    assert not trace.exists()


@pytest.fixture(scope="module")
def python_model(tmp_path_factory):
    """A model whose prediction writes a file, and the file."""
    import keras
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    directory = tmp_path_factory.mktemp("python")
    trace = directory / "trace"

    def act(x):
        y = tf.py_function(lambda v: (trace.write_text("x"), v)[1], [x], tf.float32)
        y.set_shape(x.shape)
        return y

    layers = [keras.Input((6,)), keras.layers.Lambda(act, output_shape=(6,)), keras.layers.Dense(3)]
    model = functional_model_from_keras(
        keras_model=keras.Sequential(layers),
        loss_fn=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        input_spec=(tf.TensorSpec([None, 6], tf.float32), tf.TensorSpec([None, 1], tf.int64)),
    )
    save_functional_model(model, directory / "model")
    return directory / "model", trace


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A model of 170 MB of zeros, which is small in an archive."""
    import keras
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    layers = [keras.Input((6,)), keras.layers.Dense(6_000_000, kernel_initializer="zeros")]
    model = functional_model_from_keras(
        keras_model=keras.Sequential(layers),
        loss_fn=lambda label, output: tf.reduce_mean(output),
        input_spec=(tf.TensorSpec([None, 6], tf.float32), tf.TensorSpec([None, 1], tf.int64)),
    )
    path = tmp_path_factory.mktemp("large") / "model"
    save_functional_model(model, path)
    return path


def test_a_build_that_takes_too_much_memory_fails_alone(serve, task_management, service, request_of, large_model):
    management_url = service[0].url
    settings = ServiceSettings(task_management_url=management_url, build_memory=800 << 20)
    with serve(create_service(settings)) as url:
        response = send(request_of(model=large_model), url)
        assert response.error_info.error_type == ErrorType.ARTIFACT_BUILDING_ERROR, response
        # It raised in Python, or TensorFlow ended the process.
        assert re.search("ran out of memory|may hold 800 MiB", response.error_info.error_message)
        after = send(request_of(), url)
        assert after.WhichOneof("result") == "task_group", after


def test_without_task_management_and_with_forbidden_flags_nothing_is_built(serve, request_of):
    settings = ServiceSettings(forbidden_flags=frozenset({"skip_dp_check"}))
    with serve(create_service(settings)) as url:
        unregistered = send(request_of(), url)
        assert unregistered.error_info.error_message == "Cannot find task management server."
        assert unregistered.error_info.error_type == ErrorType.TASK_MANAGEMENT_ERROR
        forbidden = send(request_of(Flags(skip_dp_check=True)), url)
        assert "does not allow the flag skip_dp_check" in forbidden.error_info.error_message


def test_builds_are_counted_for_prometheus_by_how_they_ended(serve, request_of):
    settings = ServiceSettings(hosts=frozenset({"localhost", "127.0.0.1"}))
    with serve(create_service(settings)) as url, httpx.Client(trust_env=False) as client:
        for _ in range(2):
            send(request_of(), url)
        found = client.get(f"{url}/metrics")
        assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'fedcompute_build_seconds_count{outcome="TASK_MANAGEMENT_ERROR"} 2.0' in found.text
        assert 'roles="builder"' in found.text
        assert client.get(f"{url}/metrics", headers={"host": "evil.example"}).status_code == 403


def test_a_build_that_takes_too_long_is_ended(serve, request_of):
    settings = ServiceSettings(task_management_url="http://localhost:9", build_timeout=0.2)
    with serve(create_service(settings)) as url:
        response = send(request_of(), url)
    assert response.error_info.error_type == ErrorType.ARTIFACT_BUILDING_ERROR
    assert "more than 0.2 seconds" in response.error_info.error_message


def test_builds_that_go_to_an_executor_come_back_whole_and_those_that_take_too_long_end(
    serve, service, task_management, request_of, builder
):
    workshop = ProcessExecutor(1)
    # What another machine would be sent, and send back, is sent as bytes there.
    travelled = []

    def submit(job, order):
        travelled.append(decode_data(encode_data(order)))
        return workshop.submit(named(name_of(job)), travelled[-1])

    try:
        here, objects = send(request_of(), builder), task_management.objects
        task_management.forget()
        settings = ServiceSettings(task_management_url=service[0].url)
        with serve(create_service(settings, submit)) as url:
            elsewhere = send(request_of(), url)
        assert elsewhere.task_group.training_task.task_id == 1
        assert elsewhere.task_report == here.task_report
        assert task_management.objects.keys() == objects.keys()
        assert len(travelled) == 1
        with serve(create_service(replace(settings, build_timeout=0.2), submit)) as url:
            late = send(request_of(Flags(lower_ops="never")), url)
        assert "more than 0.2 seconds" in late.error_info.error_message
    finally:
        workshop.close()


def test_the_service_process_never_loads_tensorflow():
    code = (
        "import sys, fedcompute.builder.service, fedcompute.builder.client\n"
        "assert not {'tensorflow', 'keras', 'dp_accounting'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_chooses_when_gradients_are_lowered(builder, request_of, cnn_model):
    lowered = send(request_of(model=cnn_model), builder)
    assert int(lowered.task_group.training_task.min_client_version) > 0
    refused = send(request_of(Flags(lower_ops="never"), model=cnn_model), builder)
    assert "Please contact Google to register these ops: {'Conv2DBackpropFilter'" in refused.error_info.error_message
    unknown = send(request_of(Flags(lower_ops="perhaps"), model=cnn_model), builder)
    assert unknown.error_info.error_type == ErrorType.INVALID_REQUEST
    assert "one of auto, always, never" in unknown.error_info.error_message
