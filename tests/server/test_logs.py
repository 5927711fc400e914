"""What stands in the log, in which form, and what never does."""

import io
import json
import logging
import re
import sys
import time

import pytest
from sqlalchemy import select

from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.logs import JsonFormatter, Logs, TextFormatter, bound, configure_logging, facts
from fedcompute.storage import schema

SESSION = "0a1b2c3d-1111-2222-3333-444455556666"
HOSTILE = [
    "a\nERROR forged",
    "a\r\nERROR forged",
    "bell\x07 escape \x1b[31m",
    "next line \x85 and \u2028 and \u2029",
    "right to left \u202e",
    "half a character \ud800",
    'quote " and \\ backslash',
]


@pytest.fixture
def write():
    """Returns write(formatter, message, *arguments, **options) -> what a handler would write."""

    def run(formatter, message, *arguments, **options):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger = logging.Logger("fedcompute.test", logging.DEBUG)
        logger.addHandler(handler)
        logger.error(message, *arguments, **options)
        return stream.getvalue()

    return run


@pytest.fixture
def logged_by(run_server, monkeypatch):
    """Returns run(form, act) -> the lines that a server logs, as they stand on stderr, while `act(api)` runs."""

    def run(form, act, **changes):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging(Logs("debug", form))
        try:
            running = run_server(**changes)
            act(running.api)
            running.stop()
        finally:
            root = logging.getLogger()
            for handler in [one for one in root.handlers if getattr(one, "stream", None) is stream]:
                root.removeHandler(handler)
            root.setLevel(logging.WARNING)
            logging.captureWarnings(False)
            monkeypatch.undo()
        return stream.getvalue().splitlines()

    return run


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_name_ends_a_line_or_forges_one(write, formatter, hostile):
    with bound({"population": hostile, "correlation_id": hostile}):
        written = write(formatter, "task %s is open", hostile)
    assert written.endswith("\n")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]", written[:-1])


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_traceback_forges_no_line_and_holds_no_secret(write, formatter):
    try:
        raise ValueError(f"first\n2026-01-01T00:00:00.000Z ERROR forged\n{SESSION} ?signature=abc")
    except ValueError:
        written = write(formatter, "failed", exc_info=True)
    first, *rest = written.splitlines()
    assert all(line.startswith("  | ") for line in rest)
    assert "forged" not in first or json.loads(first)["traceback"]
    assert SESSION not in written
    assert "abc" not in written


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
@pytest.mark.parametrize(
    ("message", "secret"),
    [
        (f"upload of {SESSION}", SESSION),
        (f"upload of {SESSION.upper()}", SESSION.upper()),
        ("GET /x?expires=1&signature=5ec2e7", "5ec2e7"),
        ("PUT https://s3/x?X-Amz-Signature=5ec2e7&X-Amz-Credential=5ec2e7/aws&X-Amz-Security-Token=5ec2e7", "5ec2e7"),
        ("https://blob/x?sv=1&sig=5ec2e7", "5ec2e7"),
        ("s3://bucket?aws_secret_access_key=5ec2e7&access_key_id=5ec2e7", "5ec2e7"),
        ("cannot connect to postgresql://user:5ec2e7@host/name", "5ec2e7"),
        ("cannot connect to postgresql://user:p/5ec2e7@host/name", "5ec2e7"),
        ("cannot connect to postgresql://user:p@5ec2e7@host/name", "5ec2e7"),
        ("connection failed: password=5ec2e7 host=x", "5ec2e7"),
        ("Authorization: Bearer 5ec2e7.x/y", "5ec2e7"),
        (f"GET /api/v1/api-keys/fc_0f0f0f0f0f0f_{'5ec2e7_' * 7}", "5ec2e7"),
    ],
)
def test_what_looks_like_a_secret_is_masked_whoever_logs_it(write, formatter, message, secret):
    assert secret not in write(formatter, "%s", message)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
@pytest.mark.parametrize("unit", ["a", "key", "a-", "k=", "x://", "0a1b2c3d-", "signature", "\n", "=@"])
def test_a_line_of_any_length_is_short_and_soon_written(write, formatter, unit):
    hostile = (unit * 100_000)[:60_000] + "="
    start = time.monotonic()
    with bound({"population": hostile}):
        written = write(formatter, "GET %s", hostile, extra={"fields": {"path": hostile}, "trace": hostile})
    # A pattern that goes back over what it has read would take minutes.
    assert time.monotonic() - start < 5
    assert len(written) < 500_000


def test_a_json_line_has_the_facts_of_the_moment(write):
    with bound({"population": "digits", "task": "1"}), bound({"iteration": "3"}):
        line = json.loads(write(JsonFormatter(), "round is %s", "open", extra={"fields": {"seconds": 0.5}}))
    assert line["time"].endswith("Z")
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "fedcompute.test", "round is open")
    assert (line["population"], line["task"], line["iteration"], line["seconds"]) == ("digits", "1", "3", 0.5)
    assert facts() == {}


def test_a_text_line_quotes_facts_that_are_not_one_word(write):
    with bound({"population": "two words=x", "task": "1"}):
        line = write(TextFormatter(), "hello")
    assert line.rstrip().endswith('ERROR fedcompute.test: hello population="two words=x" task=1')


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_line_of_a_request_has_its_ids_and_its_population(logged_by, form):
    told = {}

    def act(api):
        headers = {"odp-correlation-id": b"seen from\x9bhere"}
        told["id"] = api.check_in("digits", headers=headers).headers["x-request-id"]

    (access,) = [line for line in logged_by(form, act) if "fedcompute.access" in line]
    if form == "text":
        assert f" request_id={told['id']}" in access
        assert " population=digits" in access
        assert 'correlation_id="seen from\\x9bhere"' in access
        assert "POST /taskassignment/v1/population/digits:create-task-assignment 200 " in access
    else:
        line = json.loads(access)
        assert (line["request_id"], line["population"], line["status"]) == (told["id"], "digits", 200)
        assert line["correlation_id"] == "seen from\x9bhere"
        assert line["path"] == "/taskassignment/v1/population/digits:create-task-assignment"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_hostile_path_is_one_line_of_the_log(logged_by, form):
    def act(api):
        for path in ("/a%0aERROR%20forged", "/taskassignment/v1/population/%0d%0a%1b[31m:create-task-assignment"):
            assert api.http.get(api.url + path).status_code in (400, 404, 405)

    lines = logged_by(form, act)
    assert len([line for line in lines if "fedcompute.access" in line]) == 2
    for line in lines:
        assert line.isprintable()
        assert not line.startswith("ERROR")
        assert form == "text" or json.loads(line)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_whole_round_leaves_no_secret_in_the_log_of_a_server_that_logs_everything(logged_by, hand_made, form):
    process = hand_made.process_of()
    secrets = []

    def act(api):
        task = api.open_task("quiet", process, goal=2)
        for _ in range(2):
            assignment = api.assignment("quiet")
            instruction = api.upload_instruction(assignment)
            body = api.seal(hand_made.update_of(process, hand_made.initial))
            assert api.upload(instruction, body).status_code == 200
            secrets.extend([assignment.assignment_id, instruction.upload_location])
            secrets.append(re.search(r"signature=(\w+)", instruction.upload_location)[1])
        api.wait_for("quiet", task, "COMPLETED")

    log = "\n".join(line for line in logged_by(form, act) if "httpx" not in line and "httpcore" not in line)
    assert "quiet" in log
    assert "fedcompute.access" in log
    for secret in secrets:
        assert secret not in log
    assert "signature=" not in log


def test_worker_processes_log_in_the_same_form_with_the_facts_of_their_job(tmp_path, monkeypatch, capfd):
    (tmp_path / "logging_jobs.py").write_text(
        "import logging\n"
        "def say(text): logging.getLogger('fedcompute.job').info('%s', text)\n"
        "def fail(text): raise ValueError(text)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import logging_jobs

    configure_logging(Logs("info", "json"))
    executor = ProcessExecutor(1)
    try:
        with bound({"population": "digits", "iteration": "7"}):
            executor.submit(logging_jobs.say, "two\nlines").result(90)
            assert executor.submit(logging_jobs.fail, "no luck").exception(90)
    finally:
        executor.close()
        root = logging.getLogger()
        for handler in [one for one in root.handlers if isinstance(one.formatter, JsonFormatter)]:
            root.removeHandler(handler)
        root.setLevel(logging.WARNING)
        del sys.modules["logging_jobs"]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (said,) = [line for line in lines if line["logger"] == "fedcompute.job"]
    assert (said["message"], said["population"], said["iteration"]) == ("two\nlines", "digits", "7")
    (failed,) = [line for line in lines if line["message"] == "a job failed"]
    assert "ValueError: no luck" in failed["traceback"]


def test_a_correlation_id_is_kept_with_its_assignment_and_not_in_the_log_only(run_server, hand_made):
    running = run_server()
    running.api.open_task("kept", hand_made.process_of())
    headers = {"odp-correlation-id": "from-the-device"}
    running.api.wait(lambda: running.api.check_in("kept", headers=headers).status_code == 201)
    with running.app.state.context.database.read() as tx:
        assert tx.execute(select(schema.assignment.c.correlation_id)).scalars().all() == ["from-the-device"]
