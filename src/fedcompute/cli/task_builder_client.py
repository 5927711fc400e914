"""The `task_builder_client` program, with the flags of the published tutorial (spec/task-builder.md 8.2 to 8.4)."""

from absl import flags, logging

from fedcompute.cli.connection import api_key
from fedcompute.cli.flags import define_tracing, run, tracing_url
from fedcompute.protos import task_pb2

USAGE = """
Sends a model and a task configuration to a task builder and prints what it made of them.

Example: task_builder_client --task_builder_server=http://localhost:5000 --saved_model=saved_model \\
             --task_config=fcp_server_config.json
"""
_URL_FIELDS = ("client_only_plan_url", "server_phase_url", "init_checkpoint_url", "metrics_url")


def main() -> None:
    """Entry point of the `task_builder_client` program."""
    run(_build, _define, USAGE)


def _define(values: flags.FlagValues) -> None:
    from fedcompute.builder.client import DEFAULT_SERVER

    for name, default, text in (
        ("saved_model", None, "FunctionalModel SavedModel: a local directory or zip archive, or a URI."),
        (
            "task_config",
            None,
            "Task configuration: a local file or file:// URI; text format or JSON, or in a zip archive.",
        ),
        ("task_builder_server", DEFAULT_SERVER, "Base URL of the task builder."),
        ("population_name", None, "Replaces population_name of the configuration."),
        (
            "api_key",
            None,
            "API key, sent as ?key=; replaces any token. Unset: FEDCOMPUTE_API_KEY, sent as a header beside a token.",
        ),
        ("impersonate_service_account", None, "Service account whose token is sent."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, text in (
        ("build_artifact_only", "Write artifacts where the configuration says; create no task."),
        ("skip_flex_ops_check", "Accept operations that phones may lack."),
        ("skip_dp_check", "Accept an epsilon above the target; it is reported all the same."),
        ("skip_dp_aggregator", "Build without clipping and noise."),
    ):
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    define_tracing(values)
    flags.DEFINE_enum(
        "lower_ops",
        "auto",
        ["auto", "always", "never"],
        "When to lower gradients to operations that phones have; auto: if the check would fail otherwise.",
        flag_values=values,
    )


def _build(values: flags.FlagValues) -> int:
    from fedcompute.builder.client import build_request, load_config, render, send
    from fedcompute.monitoring.tracing import TASK_BUILDER_CLIENT, traced
    from fedcompute.protos import task_builder_pb2

    saved_model = values["saved_model"].value or ""
    # One archive may hold both.
    task_config = values["task_config"].value or (saved_model if saved_model.endswith(".zip") else "")
    for name, value in (("saved_model", saved_model), ("task_config", task_config)):
        if not value:
            raise ValueError(f"`--{name}` is required but not set.")
    logging.info("Creating build task request from command-line options.")
    loaded = load_config(task_config, population_name=values["population_name"].value or "")
    for warning in loaded.warnings:
        logging.warning("%s", warning)
    experiment = task_builder_pb2.ExperimentFlags(
        skip_flex_ops_check=values["skip_flex_ops_check"].value,
        skip_dp_check=values["skip_dp_check"].value,
        skip_dp_aggregator=values["skip_dp_aggregator"].value,
        lower_ops="" if values["lower_ops"].value == "auto" else values["lower_ops"].value,
    )
    request = build_request(saved_model, loaded.config, experiment)
    server = values["task_builder_server"].value
    artifact_only = values["build_artifact_only"].value
    endpoint = f"{server.removesuffix('/')}/taskbuilder/v1:build-{'artifacts' if artifact_only else 'task-group'}"
    given = values["api_key"].value or ""
    headers = {} if given else _headers(endpoint, values["impersonate_service_account"].value or "")
    with traced(tracing_url(values), TASK_BUILDER_CLIENT):
        response = send(request, server, artifact_only=artifact_only, api_key=given, headers=headers)
    response.task_report.warnings[:0] = loaded.warnings
    # Only where there are tasks: touching the group of a refusal would turn it into a success.
    if response.HasField("task_group"):
        for _, task in response.task_group.ListFields():
            _drop_signatures(task)
    rendered = render(response)
    for record in rendered.records[:-1]:
        logging.info("%s", record)
    logging.log(logging.INFO if rendered.success else logging.ERROR, "%s", rendered.records[-1])
    return 0 if rendered.success else 1


def _headers(endpoint: str, account: str) -> dict[str, str]:
    from fedcompute.builder.callers import key_header
    from fedcompute.builder.identity import id_token_header

    return {**id_token_header(endpoint, account), **key_header(api_key(None) or "")}


def _drop_signatures(task: task_pb2.Task) -> None:
    # Whoever has a signed URL may write the artifact; a log outlives the minutes for which it is valid.
    for field in _URL_FIELDS:
        urls = getattr(task, field)
        urls[:] = [url.partition("?")[0] for url in urls]
