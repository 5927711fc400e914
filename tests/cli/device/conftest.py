"""`fedcompute device ...` as people type it, in a device's directory of the test's own."""

import pytest

from fedcompute.device.isolation.probe import probe

CODE = """
from datetime import timedelta
from fedcompute.device import *

class Service(IsolatedService):
    def on_request(self, token):
        return Worker(self.get_federated_compute_scheduler(token), self.get_remote_data(token))

class Worker(IsolatedWorker):
    def __init__(self, scheduler, remote):
        self.scheduler, self.remote = scheduler, remote

    def on_execute(self, request):
        params = dict(request.app_params)
        print("asked", params)
        if "fail" in params:
            raise KeyError(params["fail"])
        if "schedule" in params:
            interval = TrainingInterval(SchedulingMode.RECURRENT, timedelta(hours=12))
            self.scheduler.schedule(Params(interval), FederatedComputeInput(params["schedule"]))
        return ExecuteOutput(rendering_config=RenderingConfig() if params.get("show") else None)

    def on_render(self, request):
        return RenderOutput(content=f"<p>{request.width} {request.height}</p>")

    def on_download_completed(self, request):
        return DownloadCompletedOutput(sorted(request.downloaded_contents.key_set()))
"""


@pytest.fixture(scope="module")
def isolated():
    missing = [one.name for one in probe() if not one.enforced]
    if missing:
        pytest.skip(f"this machine cannot isolate: {', '.join(missing)}")


@pytest.fixture
def write_app(tmp_path):
    """Returns write(name, server=..., download=None) -> folder of an app; its service is `org.example.NAME.Service`."""

    def write(name="app", server="http://localhost:1", download=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "service.py").write_text(CODE)
        manifest = f'[service]\nname = "org.example.{name}.Service"\n'
        if server is not None:
            manifest += f'[federated-compute-settings]\nurl = "{server}"\n'
        if download is not None:
            manifest += f'[download-settings]\nurl = "{download}"\n'
        (folder / "odp.toml").write_text(manifest)
        return folder

    return write


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The device's directory, which commands take from the environment."""
    monkeypatch.setenv("FEDCOMPUTE_DEVICE_DIR", str(tmp_path / "device"))
    return tmp_path / "device"


@pytest.fixture
def device(fedcompute, directory):
    """Returns device(*arguments, code=0) -> what `fedcompute device ...` prints; fails on another exit code.

    device.refused(*arguments) -> the block of an error: what, code, remedy.
    """

    def run(*arguments, code=0):
        result = fedcompute("device", *arguments)
        assert result.exit_code == code, result.output
        # A traceback would stand for an error that nobody has thought of.
        assert code == 0 or result.exception is None or isinstance(result.exception, SystemExit)
        return result.output

    def refused(*arguments):
        lines = run(*arguments, code=1).splitlines()
        assert [line.split(":")[0] for line in lines if line[:1].isalpha()] == ["Error", "Code", "Remedy"], lines
        return {line.split(":")[0]: line.partition(":")[2].strip() for line in lines if line[:1].isalpha()}

    run.refused = refused
    return run


@pytest.fixture
def installed(device, write_app):
    device("install", write_app())
    for name in ("condition_idle", "condition_unmetered"):
        device("config", "put", name, "true")
    return device
