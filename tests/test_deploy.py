"""The files of deploy/: every setting, option, port and route that they name exists."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedcompute.server.api import health
from fedcompute.server.configuration import configure, flag_of, variable_of
from fedcompute.server.settings import Settings

yaml = pytest.importorskip("yaml", reason="PyYAML, of the extra `dev`, is not installed")

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
FLAGS = {flag_of(one.name) for one in dataclasses.fields(Settings)} | {"--config"}
# What is no setting: the settings file's name and the operator secret.
VARIABLES = {variable_of(one.name) for one in dataclasses.fields(Settings)} | {"FEDCOMPUTE_CONFIG", "FEDCOMPUTE_SECRET"}
ROUTES = {route.path for route in health.routes}


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def pods():
    """(name of the file, container, pod) of every deployment."""
    for path in MANIFESTS:
        for one in documents(path):
            if one["kind"] == "Deployment":
                pod = one["spec"]["template"]["spec"]
                yield from ((path.name, container, pod) for container in pod["containers"])


def settings_of(environment):
    """The settings that a server would have; raises if one of the variables is none or cannot be read."""
    return configure({}, environment).settings


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_that_is_named_is_a_setting(path):
    found = set(re.findall(r"FEDCOMPUTE_[A-Z0-9_]*[A-Z0-9]", path.read_text()))
    assert found <= VARIABLES


@pytest.mark.parametrize("path", [*DEPLOY.glob("*.yaml"), *MANIFESTS], ids=lambda path: path.name)
def test_every_yaml_file_can_be_read(path):
    for one in documents(path):
        assert isinstance(one, dict)
    if path in MANIFESTS:
        assert all({"apiVersion", "kind"} <= one.keys() for one in documents(path))


def test_the_variables_of_the_compose_file_make_settings():
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    for name in ("server-1", "server-2"):
        environment = {
            key: re.sub(r"\$\{[^}]*\}", "x", str(value)) for key, value in services[name]["environment"].items()
        }
        environment["FEDCOMPUTE_PUBLIC_URL"] = "http://localhost:8080"
        settings = settings_of(environment)
        assert settings.database.startswith("postgresql+psycopg://")
        assert settings.runs_api
        assert settings.runs_engine
    upstream = re.findall(r"server (server-\d+):(\d+);", (DEPLOY / "nginx.conf").read_text())
    assert upstream == [(name, "8080") for name in services if name.startswith("server-")]


def test_the_variables_of_the_pods_make_settings():
    told = {}
    for name in ("config.yaml", "secret.example.yaml"):
        for one in documents(DEPLOY / "kubernetes" / name):
            told |= one.get("data", {}) | one.get("stringData", {})
    assert all(isinstance(value, str) for value in told.values())
    settings = settings_of(told)
    assert settings.port == 8080
    assert settings.public_url.startswith("https://")


def test_the_image_has_the_program_its_settings_and_no_rights():
    text = (DEPLOY / "Dockerfile").read_text()
    told = dict(re.findall(r"(FEDCOMPUTE_[A-Z_]+)=(\S+)", text))
    settings = settings_of(told)
    assert f"EXPOSE {settings.port}" in text
    assert f"http://127.0.0.1:{settings.port}/healthz" in text
    assert str(settings.data_dir) in re.search(r"VOLUME (\S+)", text)[1]
    assert re.search(r"^USER 10001", text, re.M)
    assert 'ENTRYPOINT ["fedcompute"]' in text
    assert "tensorflow" not in re.search(r"ARG EXTRAS=(\S+)", text)[1]


@pytest.mark.parametrize(
    ("file", "container", "pod"), list(pods()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_a_pod_runs_a_role_that_exists_and_is_probed_where_the_server_answers(file, container, pod):
    command, *options = container["args"]
    assert command == "server"
    assert set(options[::2]) <= FLAGS
    flags = {name[2:].replace("-", "_"): [value] for name, value in zip(options[::2], options[1::2], strict=True)}
    settings = configure(flags, {"FEDCOMPUTE_DATABASE_URL": "postgresql://host/name"}).settings
    assert settings.roles == (file.removesuffix(".yaml"),)
    (port,) = container["ports"]
    assert port["containerPort"] == settings.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in ROUTES
        assert asked["port"] == port["name"]
        # The server answers within two seconds, whatever hangs.
        assert container[probe]["timeoutSeconds"] > 2
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert "/var/lib/fedcompute" in mounts


def test_everybody_who_ends_a_server_waits_for_its_good_order():
    # Its grace, and half a minute more; see server/web_server.py.
    grace = float(documents(DEPLOY / "kubernetes" / "config.yaml")[0]["data"]["FEDCOMPUTE_STOP_GRACE"])
    for _, container, pod in pods():
        pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > pause + grace + 30
    for name, service in documents(DEPLOY / "compose.yaml")[0]["services"].items():
        if name.startswith("server"):
            grace = float(service["environment"]["FEDCOMPUTE_STOP_GRACE"])
            assert float(service["stop_grace_period"].removesuffix("s")) > grace + 30


def test_selectors_name_pods_that_exist():
    objects = [one for path in MANIFESTS for one in documents(path)]
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects if one["kind"] == "Deployment"]
    names = {one["metadata"]["name"] for one in objects if one["kind"] == "Deployment"}
    for one in objects:
        if one["kind"] == "HorizontalPodAutoscaler":
            assert one["spec"]["scaleTargetRef"]["name"] in names
        selector = one.get("spec", {}).get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found.items() for found in labels)
    applied = documents(DEPLOY / "kubernetes" / "kustomization.yaml")[0]["resources"]
    assert sorted([*applied, "kustomization.yaml", "secret.example.yaml"]) == [path.name for path in MANIFESTS]


def test_the_service_and_its_settings_file_fit_each_other():
    unit = (DEPLOY / "fedcompute.service").read_text()
    assert "ExecStart=/opt/fedcompute/bin/fedcompute server --config /etc/fedcompute/server.toml" in unit
    # A server may use its grace and half a minute more; see server/web_server.py.
    settings = configure({}, {}, DEPLOY / "server.toml").settings
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > settings.stop_grace + 30
    assert "StateDirectory=fedcompute" in unit
    assert str(settings.data_dir) == "/var/lib/fedcompute"


@pytest.mark.parametrize("name", ["fedcompute.service", "fedcompute-device.service"])
def test_a_unit_is_one_that_systemd_takes(name, tmp_path):
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd is not installed")
    program = tmp_path / "fedcompute"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / name
    unit.write_text((DEPLOY / name).read_text().replace("/opt/fedcompute/bin/fedcompute", str(program)))
    told = subprocess.run([verify, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stderr) == (0, "")
