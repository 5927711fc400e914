"""Models and artifacts in an object store: obstore's own S3 client against a small store on loopback."""

import hashlib
import shutil
import xml.sax.saxutils

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.builder.archive import pack_directory
from fedcompute.builder.artifact_places import PlaceRules, artifact_place
from fedcompute.builder.client import build_request, send
from fedcompute.builder.model_sources import fingerprint, model_directory
from fedcompute.builder.object_stores import ObjectUri, list_folder, object_uri, read_object, write_object
from fedcompute.builder.service import ServiceSettings, create_service
from fedcompute.errors import ArtifactInvalid, ConfigInvalid, OperationFailed
from fedcompute.learning.plans import read_plan
from fedcompute.protos import task_builder_pb2
from fedcompute.protos.federatedcompute_pb2 import Resource

Flags = task_builder_pb2.ExperimentFlags


class Store:
    """As much of S3 as listing, getting and putting take; no signatures, which obstore's own tests cover."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.written: list[str] = []
        self.full = False
        self.app = Starlette(
            routes=[
                Route("/{bucket}", self.list, methods=["GET"]),
                Route("/{bucket}/{key:path}", self.get, methods=["GET"]),
                Route("/{bucket}/{key:path}", self.put, methods=["PUT"]),
            ]
        )

    async def list(self, request):
        prefix = f"{request.path_params['bucket']}/{request.query_params.get('prefix', '')}"
        items = "".join(
            f"<Contents><Key>{xml.sax.saxutils.escape(key.partition('/')[2])}</Key><Size>{len(data)}</Size>"
            f'<ETag>"{hashlib.md5(data).hexdigest()}"</ETag><LastModified>2025-01-01T00:00:00Z</LastModified></Contents>'
            for key, data in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        return Response(f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>")

    async def get(self, request):
        data = self.objects.get(f"{request.path_params['bucket']}/{request.path_params['key']}")
        if data is None:
            return Response("<Error><Code>NoSuchKey</Code></Error>", status_code=404)
        return Response(data, headers={"etag": '"x"', "last-modified": "Wed, 01 Jan 2025 00:00:00 GMT"})

    async def put(self, request):
        if self.full:
            return Response("", status_code=403)
        key = f"{request.path_params['bucket']}/{request.path_params['key']}"
        self.objects[key] = await request.body()
        self.written.append(key)
        return Response("", headers={"etag": '"x"'})


@pytest.fixture(scope="module")
def store(serve):
    store = Store()
    with pytest.MonkeyPatch.context() as environment, serve(store.app) as url:
        environment.setenv("AWS_ENDPOINT", url)
        environment.setenv("AWS_ALLOW_HTTP", "true")
        environment.setenv("AWS_ACCESS_KEY_ID", "id")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "TOPSECRET")
        environment.setenv("AWS_REGION", "us-east-1")
        yield store


@pytest.fixture
def uploaded(store, dense_model):
    store.objects.clear()
    store.written.clear()
    for file in dense_model.rglob("*"):
        if file.is_file():
            store.objects[f"models/m/{file.relative_to(dense_model)}"] = file.read_bytes()
    # A sibling whose name begins alike is another model.
    store.objects["models/m2/saved_model.pb"] = b"other"
    # What some tools write for a folder.
    store.objects["models/m/variables/"] = b""
    return store


@pytest.mark.parametrize(
    "uri", ["", "/a", "file:///a", "http://a/b", "gs://", "gs:///b", "gs://B!/x", "s3://bucket/a/../b", "s3://bucket/a?b",
            "s3://bucket/{x}", "gs://[::1"]
)  # fmt: skip
def test_what_is_no_object_is_none(uri):
    assert object_uri(uri) is None


def test_an_object_uri_has_scheme_bucket_and_key():
    assert object_uri("gs://my-bucket/a/b/") == ObjectUri("gs", "my-bucket", "a/b")
    assert str(object_uri("s3://my-bucket")) == "s3://my-bucket/"


def test_a_folder_is_listed_and_its_namesake_is_not(uploaded):
    paths = [item.path for item in list_folder(object_uri("s3://models/m"), 100)]
    assert "saved_model.pb" in paths
    assert "variables/variables.index" in paths
    assert len(paths) == 4
    with pytest.raises(OperationFailed, match="more than 3 objects"):
        list_folder(object_uri("s3://models/m"), 3)


def test_an_object_beyond_the_limit_is_not_read(uploaded):
    uri = object_uri("s3://models/m2/saved_model.pb")
    assert read_object(uri, 5) == b"other"
    with pytest.raises(OperationFailed, match="more than 4 bytes"):
        read_object(uri, 4)
    assert read_object(object_uri("s3://models/none"), 4) is None


def test_a_model_is_downloaded_whole_from_a_folder_or_an_archive(uploaded, dense_model, tmp_path):
    uploaded.objects["models/m.zip"] = pack_directory(dense_model)
    for name in ("m", "m.zip"):
        target = tmp_path / name
        target.mkdir()
        directory = model_directory(Resource(uri=f"s3://models/{name}"), target)
        assert (directory / "saved_model.pb").read_bytes() == (dense_model / "saved_model.pb").read_bytes()
    with pytest.raises(ArtifactInvalid, match="no saved model at s3://models/none"):
        model_directory(Resource(uri="s3://models/none"), tmp_path)


def test_a_name_that_climbs_out_is_refused(uploaded, tmp_path):
    uploaded.objects["models/m/a\\..\\..\\x"] = b""
    with pytest.raises(ArtifactInvalid, match="unsafe name"):
        model_directory(Resource(uri="s3://models/m"), tmp_path)


def test_the_fingerprint_follows_the_content(uploaded, dense_model, tmp_path):
    source = Resource(uri="s3://models/m")
    before = fingerprint(source)
    assert before == fingerprint(source) != fingerprint(Resource(uri=str(dense_model)))
    uploaded.objects["models/m/saved_model.pb"] += b" "
    assert fingerprint(source) != before
    copy = shutil.copytree(dense_model, tmp_path / "copy")
    before = fingerprint(Resource(uri=str(copy)))
    (copy / "fingerprint.pb").write_bytes(b"changed")
    assert fingerprint(Resource(uri=copy.as_uri())) != before
    assert fingerprint(Resource(uri="/none")) is None


def test_a_store_that_refuses_is_named_without_its_secret(uploaded):
    uploaded.full = True
    try:
        with pytest.raises(OperationFailed) as caught:
            write_object(object_uri("s3://models/x"), b"data")
    finally:
        uploaded.full = False
    assert "could not write s3://models/x" in caught.value.detail
    assert "TOPSECRET" not in str(caught.value)


def test_places_in_object_stores_can_be_forbidden_and_need_a_name():
    assert artifact_place("gs://bucket/plan", PlaceRules()) == ObjectUri("gs", "bucket", "plan")
    for uri, rules in (("gs://bucket/plan", PlaceRules(object_stores=False)), ("gs://bucket", PlaceRules())):
        with pytest.raises(ConfigInvalid, match="invalid URLs: "):
            artifact_place(uri, rules)


def test_a_service_reads_a_model_from_a_store_and_writes_artifacts_there_in_order(serve, uploaded, config):
    learning = config.federated_learning
    for name, block in (("train", learning.learning_process), ("eval", learning.evaluation)):
        places = block.artifact_building
        places.plan_url = f"s3://out/{name}/plan"
        places.client_plan_url = f"s3://out/{name}/client_plan"
        places.checkpoint_url = f"s3://out/{name}/checkpoint"
    request = build_request("s3://models/m", config, Flags())
    assert request.saved_model.uri == "s3://models/m"
    with serve(create_service(ServiceSettings())) as url:
        response = send(request, url, artifact_only=True)
        assert response.WhichOneof("result") == "task_group", response
        assert uploaded.written == [
            f"out/{task}/{part}" for task in ("train", "eval") for part in ("checkpoint", "plan", "client_plan")
        ]
        read_plan(uploaded.objects["out/train/plan"])
        uploaded.full = True
        failed = send(request, url, artifact_only=True)
        uploaded.full = False
    assert failed.error_info.error_type == task_builder_pb2.ErrorType.ARTIFACT_BUILDING_ERROR
    assert failed.error_info.error_message == "Cannot upload artifact to: s3://out/train/checkpoint"
