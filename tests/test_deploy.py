"""The files of deploy/: every setting, option, port and route that they name exists."""

import dataclasses
import json
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


ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
# Prometheus' own, and one of its process collector's, which are there on Linux alone.
_OWN_NAMES = {"up", "process_resident_memory_bytes"}
_WORDS = re.compile(r"\b((?:fedcompute|http_server|create_task|report_result|process)_[a-z_]+)")


def _expressions():
    """(where, expression) of every rule and panel."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana" / "fedcompute.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_every_figure_of_an_alert_or_a_panel_is_one_that_servers_give_out():
    from fedcompute.builder.measures import BuildMeasures
    from fedcompute.server.measures import Measures
    from fedcompute.server.state_gauges import GAUGES

    known = set(GAUGES)
    for family in (*Measures(("api", "engine")).registry.collect(), *BuildMeasures().registry.collect()):
        known |= {
            family.name,
            f"{family.name}_total",
            *(f"{family.name}_{part}" for part in ("count", "sum", "bucket")),
        }
    for where, expression in _expressions():
        named = set(_WORDS.findall(expression)) - _OWN_NAMES
        assert named or any(name in expression for name in _OWN_NAMES), where
        assert named <= known, (where, named - known)


def test_every_query_of_the_dashboard_is_one_that_prometheus_takes(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    rules = [
        {"record": f"query:{number}", "expr": expression.replace("$population", ".*")}
        for number, (_, expression) in enumerate(_expressions())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [DEPLOY / "prometheus" / "prometheus.yaml"]
    done = subprocess.run(["promtool", "check", "config", "--syntax-only", *told], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_is_wrong_and_what_to_do():
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert len(rule["annotations"]["description"]) > 30, rule["alert"]
            assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_dashboard_draws_the_charts_of_the_reference():
    panels = json.loads((DEPLOY / "grafana" / "fedcompute.json").read_text())["panels"]
    titles = {one["title"] for one in panels if one["type"] != "row"}
    results = ("COMPLETED", "FAILED", "NOT_ELIGIBLE", "FAILED_EXAMPLE_GENERATION", "FAILED_MODEL_COMPUTATION")
    assert {
        f"{one} a second, by population" for one in (*results, "FAILED_OPS_ERROR", "CREATED", "NO_TASK_AVAILABLE")
    } <= titles
    assert {"Check-ins a minute, by population and outcome", "Check-ins: p50 and p99", "Reports: p50 and p99"} <= titles
    assert len({one["id"] for one in panels}) == len(panels)


_STUCK = """
rule_files: [alerts.yaml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'fedcompute_round_status_seconds{population="p",task="1",status="APPLYING"}'
        values: '0+60x60'
      - series: 'fedcompute_round_status_seconds{population="p",task="2",status="COLLECTING"}'
        values: '0+60x60'
      - series: 'fedcompute_task_created_seconds{population="p",task="3"}'
        values: '3000+60x60'
      - series: 'fedcompute_rounds_total{population="p",end="aggregating_failed",reason="storage_failed"}'
        values: '_x29 1x30'
      - series: 'fedcompute_engine_alive{instance="a",job="fedcompute"}'
        values: '1x60'
    alert_rule_test:
      - {eval_time: 10m, alertname: FedcomputeRoundStuck, exp_alerts: []}
      - eval_time: 20m
        alertname: FedcomputeRoundStuck
        exp_alerts:
          - exp_labels: {severity: critical, population: p, task: "1", status: APPLYING}
            exp_annotations: {summary: S1, description: D1}
      - {eval_time: 50m, alertname: FedcomputeRoundCollectsLong, exp_alerts: []}
      - {eval_time: 5m, alertname: FedcomputeTaskWithoutArtifacts, exp_alerts: []}
      - eval_time: 20m
        alertname: FedcomputeTaskWithoutArtifacts
        exp_alerts:
          - exp_labels: {severity: warning, population: p, task: "3"}
            exp_annotations: {summary: S2, description: D2}
      - {eval_time: 20m, alertname: FedcomputeRoundFailed, exp_alerts: []}
      - eval_time: 32m
        alertname: FedcomputeRoundFailed
        exp_alerts:
          - exp_labels: {severity: warning, population: p, end: aggregating_failed, reason: storage_failed}
            exp_annotations: {summary: S3, description: D3}
      - {eval_time: 30m, alertname: FedcomputeNoEngine, exp_alerts: []}
"""


# Every rule -> what makes it fire at the end of four hours, sampled every five minutes, and with which labels.
_P = 'population="p"'
_CHECK_IN = "/taskassignment/v1/population/{population}"
_FIRING = {
    "FedcomputeServerDown": (['up{job="fedcompute",instance="a"} | 0x48'], {"job": "fedcompute", "instance": "a"}),
    "FedcomputeNothingScraped": (['up{job="other"} | 1x48'], {"job": "fedcompute"}),
    "FedcomputePartNotReady": (
        ['fedcompute_part_ready{part="blobs",instance="a"} | 0x48'],
        {"part": "blobs", "instance": "a"},
    ),
    "FedcomputeErrors": (['http_server_requests_seconds_count{uri="/x",status="500"} | 0+5x48'], {"uri": "/x"}),
    "FedcomputeNoEngine": (['fedcompute_engine_alive{instance="a"} | 0x48'], {}),
    "FedcomputeEngineStandsStill": (['fedcompute_engine_alive{instance="a"} | 0x48'], {"instance": "a"}),
    "FedcomputeDatabaseSilent": (['fedcompute_scrape_complete{instance="a"} | 0x48'], {"instance": "a"}),
    "FedcomputeDatabaseSlow": (
        [
            'fedcompute_database_seconds_bucket{kind="write",instance="a",le="0.5"} | 0x48',
            'fedcompute_database_seconds_bucket{kind="write",instance="a",le="1.0"} | 0+5x48',
            'fedcompute_database_seconds_bucket{kind="write",instance="a",le="+Inf"} | 0+5x48',
        ],
        {"kind": "write", "instance": "a"},
    ),
    "FedcomputeDiskNearlyFull": (
        ['fedcompute_disk_free_bytes{place="data",instance="a"} | 1000x48'],
        {"place": "data", "instance": "a"},
    ),
    "FedcomputeCertificateExpires": (
        ['fedcompute_tls_certificate_expiry_timestamp_seconds{instance="a"} | 30000x48'],
        {"instance": "a"},
    ),
    "FedcomputeEncryptionKeysRunOut": (["fedcompute_encryption_key_expiry_timestamp_seconds | 30000x48"], {}),
    "FedcomputeTaskWithoutArtifacts": (
        [f'fedcompute_task_created_seconds{{{_P},task="1",instance="a"}} | 0+300x48'],
        {"population": "p", "task": "1"},
    ),
    "FedcomputeRoundStuck": (
        [
            f'fedcompute_round_status_seconds{{{_P},task="1",status="APPLYING",instance="{one}"}} | 0+300x48'
            for one in "ab"
        ],
        {"population": "p", "task": "1", "status": "APPLYING"},
    ),
    "FedcomputeRoundCollectsLong": (
        [f'fedcompute_round_status_seconds{{{_P},task="1",status="COLLECTING"}} | 86000+300x48'],
        {"population": "p", "task": "1"},
    ),
    "FedcomputeBatchesWait": (['fedcompute_batch_oldest_seconds{instance="a"} | 0+300x48'], {}),
    "FedcomputeMoreWorkThanWorkers": (
        ['fedcompute_jobs_running{instance="a"} | 4x48', 'fedcompute_jobs_room{instance="a"} | 4x48'],
        {},
    ),
    "FedcomputeLeasesLost": (['fedcompute_leases_lost_total{instance="a"} | 0+5x48'], {}),
    "FedcomputeRoundFailed": (
        [f'fedcompute_rounds_total{{{_P},end="applying_failed",reason="internal",instance="a"}} | _x46 1x2'],
        {"population": "p", "end": "applying_failed", "reason": "internal"},
    ),
    "FedcomputeTaskFailed": (['fedcompute_tasks{status="FAILED",instance="a"} | 0x46 1x2'], {}),
    "FedcomputeJobsFail": (
        ['fedcompute_jobs_total{kind="update",outcome="failed",instance="a"} | _x46 1x2'],
        {"kind": "update"},
    ),
    "FedcomputeStorageOutage": (
        ['fedcompute_jobs_total{kind="update",outcome="outage"} | 0+5x48'],
        {"kind": "update"},
    ),
    "FedcomputeContributionsRejected": (
        [
            f'fedcompute_contributions_total{{{_P},result="accepted"}} | 0+10x48',
            f'fedcompute_contributions_total{{{_P},result="norm_too_large"}} | 0+5x48',
        ],
        {"population": "p"},
    ),
    "FedcomputeDecryptionFails": (
        [
            f'fedcompute_contributions_total{{{_P},result="accepted"}} | 0+100x48',
            f'fedcompute_contributions_total{{{_P},result="unknown_key"}} | 0+5x48',
        ],
        {"population": "p"},
    ),
    "FedcomputeMoreContributionsThanDenominator": (
        [f'fedcompute_round_excess{{{_P},task="1",instance="a"}} | 1x48'],
        {"population": "p", "task": "1"},
    ),
    "FedcomputeReportsFail": (
        [f'report_result_seconds_count{{{_P},result="{one}"}} | 0+5x48' for one in ("COMPLETED", "FAILED_OPS_ERROR")],
        {"population": "p"},
    ),
    "FedcomputeDevicesTurnedAway": (
        [f'create_task_assignment_seconds_count{{{_P},result="{one}"}} | 0+5x48' for one in ("CREATED", "TURNED_AWAY")],
        {},
    ),
    "FedcomputeNobodyGetsATask": (
        [f'create_task_assignment_seconds_count{{{_P},result="NO_TASK_AVAILABLE"}} | 0+45x48'],
        {"population": "p"},
    ),
    "FedcomputeVersionsDoNotFit": (
        [f'create_task_assignment_seconds_count{{{_P},result="CLIENT_VERSION_MISMATCH"}} | 0+45x48'],
        {"population": "p"},
    ),
    "FedcomputeCheckInsSlow": (
        [
            f'http_server_requests_seconds_bucket{{uri="{_CHECK_IN}",le="{le}"}} | {values}'
            for le, values in (("0.5", "0x48"), ("1.0", "0+5x48"), ("+Inf", "0+5x48"))
        ],
        {},
    ),
    "FedcomputeDevicesNotAdmitted": (
        [
            f'fedcompute_authentications_total{{decision="{one}"}} | 0+5x48'
            for one in ("admitted", "refused: enrolment_invalid")
        ],
        {},
    ),
    "FedcomputeAttestationUnavailable": (
        ['fedcompute_authentications_total{decision="service failed: challenge"} | 0+5x48'],
        {},
    ),
    "FedcomputeBudgetNearlySpent": (
        [
            f'fedcompute_epsilon_spent{{{_P},instance="a"}} | 1.9x48',
            f'fedcompute_epsilon_budget{{{_P},instance="a"}} | 2x48',
        ],
        {"population": "p"},
    ),
    "FedcomputeBudgetSpent": (
        [f'fedcompute_rounds_total{{{_P},end="refused",reason="budget_spent"}} | _x46 1x2'],
        {"population": "p"},
    ),
    "FedcomputeBuildsFail": (
        ['fedcompute_build_seconds_count{outcome="TASK_MANAGEMENT_ERROR"} | _x46 3x2'],
        {"outcome": "TASK_MANAGEMENT_ERROR"},
    ),
}


def test_every_alert_can_fire_on_several_servers_and_on_the_first_failure(tmp_path):
    rules = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert rules.keys() == _FIRING.keys()
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: prometheus)")

    def told(rule, labels):
        return {
            part: re.sub(r"{{ \$labels\.(\w+) }}", lambda found: labels[found[1]], text)
            for part, text in rule["annotations"].items()
        }

    tests = [
        {
            "interval": "5m",
            "input_series": [dict(zip(("series", "values"), one.split(" | "), strict=True)) for one in series],
            "alert_rule_test": [
                {
                    "eval_time": "4h",
                    "alertname": name,
                    "exp_alerts": [
                        {
                            "exp_labels": {**rules[name]["labels"], **labels},
                            "exp_annotations": told(rules[name], labels),
                        }
                    ],
                }
            ],
        }
        for name, (series, labels) in _FIRING.items()
    ]
    shutil.copy(ALERTS, tmp_path / "alerts.yaml")
    document = {"rule_files": ["alerts.yaml"], "evaluation_interval": "10m", "tests": tests}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_figures_has_each_of_them_and_every_alert():
    from fedcompute.builder.measures import BuildMeasures
    from fedcompute.server.measures import Measures
    from fedcompute.server.state_gauges import GAUGES

    page = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    families = (*Measures(("api",)).registry.collect(), *BuildMeasures().registry.collect())
    counted = {f"{one.name}_total" if one.type == "counter" else one.name.removesuffix("_max") for one in families}
    names = {one for one in counted | set(GAUGES) if not one.startswith("process_")}
    assert {one for one in names if f"`{one}`" not in page} == set()
    assert {one for one in _FIRING if f"`{one}`" not in page} == set()


def test_alerts_fire_when_something_is_stuck_and_not_before(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    rules = {
        rule["alert"]: rule["annotations"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    }
    text = _STUCK
    for number, (name, labels) in enumerate(
        (
            ("FedcomputeRoundStuck", {"population": "p", "task": "1", "status": "APPLYING"}),
            ("FedcomputeTaskWithoutArtifacts", {"population": "p", "task": "3"}),
            ("FedcomputeRoundFailed", {"population": "p", "end": "aggregating_failed", "reason": "storage_failed"}),
        ),
        1,
    ):
        for letter, part in (("S", "summary"), ("D", "description")):
            told = rules[name][part]
            for label, words in labels.items():
                told = told.replace(f"{{{{ $labels.{label} }}}}", words)
            text = text.replace(f"{letter}{number}", json.dumps(told))
    shutil.copy(ALERTS, tmp_path / "alerts.yaml")
    (tmp_path / "test.yaml").write_text(text)
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run(
        ["promtool", "check", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
