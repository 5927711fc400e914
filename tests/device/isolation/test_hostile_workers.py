"""What a bad worker does in its process costs its own operation."""

import asyncio
import time
from dataclasses import replace

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import (
    ExecuteOutput,
    TrainingExampleInput,
)
from fedcompute.device.isolation import process
from fedcompute.device.state import key_values

MEBIBYTE = 1 << 20
SECRET = "a user's data"


# What a bad worker does


def test_an_exception_fails_the_operation_and_only_the_developer_reads_what_it_says(device):
    called = device.call(f"raise ValueError({SECRET!r})")
    assert device.failure(called) == (Status.SERVICE_FAILED, "on_execute: ValueError")
    assert called.printed.splitlines()[0] == "Traceback (most recent call last):"
    assert "sample_service.py" in called.printed
    assert called.printed.splitlines()[-1] == f"ValueError: {SECRET}"
    assert SECRET not in str(called.result)
    assert device.works()


@pytest.mark.parametrize(
    ("code", "counted"),
    [("42", 42), ("127", 127), ("0", 0), ("128", 0), ("-1", 0), ("True", 0), ("'x'", 0), ("2**70", 0)],
)
def test_a_services_exception_carries_its_code(device, code, counted):
    called = device.call(f"raise IsolatedServiceException({code}, 'no')")
    assert device.failure(called) == (Status.SERVICE_FAILED, "on_execute: IsolatedServiceException")
    assert called.result.code == counted


BAD_RESULTS = {
    "nothing": ("pass", "TypeError: on_execute returned NoneType, not ExecuteOutput"),
    "another type": ("return RenderOutput()", "TypeError: on_execute returned RenderOutput, not ExecuteOutput"),
    "a column with a list": (
        "return ExecuteOutput(RequestLogRecord([{'a': [1]}]))",
        "TypeError: column 'a' holds list, which is no value of a column",
    ),
    "such a column behind its back": (
        "record = RequestLogRecord(); record.__dict__['rows'] = [{'a': {'b': 1}}]; return ExecuteOutput(record)",
        "ValidationError: column 'a' holds dict, which is no value of a column",
    ),
    "an object as a value": ("return ExecuteOutput(output_data=object())", "TypeError: object is no plain data"),
    "a value of another type": (
        "return ExecuteOutput(best_value=1.5)",
        "ValidationError: Expected `int`, got `float` - at `$.best_value`",
    ),
    "more than 64 bits": ("return ExecuteOutput(RequestLogRecord([{'a': 2**63}]))", "more than 64 bits"),
    "a text that is none": ("return ExecuteOutput(RequestLogRecord([{'a': '\\ud800'}]))", "UnicodeEncodeError"),
    "too much": (
        "return ExecuteOutput(output_data=bytes(1 << 20))",
        "ValueError: on_execute returned 1048",
    ),
    "itself": (
        "rows = {}; rows['a'] = rows; record = RequestLogRecord(); record.__dict__['rows'] = [rows]\n"
        "return ExecuteOutput(record)",
        "RecursionError",
    ),
}


@pytest.mark.parametrize(("body", "said"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_result_that_is_none_fails_the_operation_and_says_why_to_the_developer(device, body, said):
    called = device.call(body)
    assert device.failure(called)[0] is Status.SERVICE_FAILED
    assert said in called.printed.splitlines()[-1]


def test_a_service_that_makes_no_worker_says_so(device):
    device.write("pass")
    source = device.code / "sample_service.py"
    source.write_text(source.read_text().replace("return Worker(self, token)", "return 3"))
    called = asyncio.run(device.calling())
    assert device.failure(called) == (Status.SERVICE_FAILED, "on_execute: TypeError")
    assert "on_request returned int, which is no IsolatedWorker" in called.printed


@pytest.mark.parametrize(
    "body",
    ["time.sleep(60)", "while True: pass", "self.local.get('k'); threading.Event().wait()", "await asyncio.sleep(60)"],
    ids=["sleep", "spin", "wait", "coroutine"],
)
def test_a_hook_that_hangs_is_ended_at_its_deadline_and_prints_where_it_was(device, body):
    start = time.monotonic()
    called = device.call(body, kind="async def" if "await" in body else "def", seconds=0.5)
    # The deadline, a second for the end, and what it takes to start on a busy machine.
    assert time.monotonic() - start < 0.5 + 1 + 1.5
    assert device.failure(called) == (Status.SERVICE_TIMEOUT, "on_execute: no answer within 0.5 s")
    assert "Current thread" in called.printed
    assert "await" in body or 'sample_service.py", line ' in called.printed
    assert device.works()


@pytest.mark.parametrize(
    "body",
    [
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nwhile True: pass",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
    ids=["ignores", "blocks", "stopped"],
)
def test_a_hook_that_cannot_be_asked_where_it_is_ends_all_the_same(device, body):
    called = device.call(body, seconds=0.3)
    assert device.failure(called)[0] is Status.SERVICE_TIMEOUT


def test_processor_time_is_limited_whatever_the_clock_says(device, monkeypatch):
    original = process.Confinement
    monkeypatch.setattr(
        "fedcompute.device.isolation.worker_call.Confinement", lambda **more: original(**{**more, "cpu_seconds": 1})
    )
    called = device.call("while True: pass")
    assert device.failure(called) == (
        Status.SERVICE_FAILED,
        "on_execute: no answer; the process got SIGXCPU",
    )


@pytest.mark.parametrize(
    "body",
    [
        "bytearray(1 << 30)",
        "hoard = []\nwhile True: hoard.append(bytearray(1 << 20))",
        "import mmap\nmmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
    ],
    ids=["at once", "bit by bit", "pages"],
)
def test_a_worker_gets_no_more_memory_than_it_may_have(device, processes, body):
    with processes.bounded_memory(32 * MEBIBYTE):
        called = device.call(body, memory=256 * MEBIBYTE)
    assert device.failure(called)[0] is Status.SERVICE_FAILED
    assert "MemoryError" in called.printed or "Cannot allocate memory" in called.printed
    assert device.works()


def test_of_what_is_printed_the_end_is_kept_and_the_loop_goes_on(device, processes):
    device.write(
        """
        line = "x" * 1023
        for _ in range(100 * 1024):
            print(line)
        print("the end \\x1b[31m\\x9b\\a\\t.")
        return ExecuteOutput(best_value=1)
        """
    )
    with processes.bounded_memory(16 * MEBIBYTE):
        called, gap = asyncio.run(with_heartbeat(device.calling()))
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))
    size = 100 * MEBIBYTE + len("the end \x1b[31m\x9b\a\t.\n".encode())
    assert called.printed.startswith(f"[{size - process.OUTPUT_LIMIT} bytes before]\n")
    assert called.printed.endswith("x\nthe end �[31m��\t.\n")
    assert len(called.printed) < process.OUTPUT_LIMIT + 50
    assert gap < 0.5


async def with_heartbeat(awaitable):
    """The result, and the longest time for which the loop ran nothing else."""
    gaps = []

    async def beat():
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - start)

    task = asyncio.create_task(beat())
    try:
        return await awaitable, max(gaps)
    finally:
        task.cancel()


ENDS = {
    "os._exit": ("os._exit(3)", "on_execute: no answer; the process ended with 3", ""),
    "sys.exit": ("sys.exit(3)", "on_execute: SystemExit", "SystemExit: 3"),
    "segmentation fault": (
        "ctypes.string_at(0)",
        "on_execute: no answer; the process got SIGSEGV",
        "Fatal Python error: Segmentation fault",
    ),
    "abort": (
        "os.abort()",
        "on_execute: no answer; the process got SIGABRT",
        "Fatal Python error: Aborted",
    ),
    "SIGKILL": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "on_execute: no answer; the process got SIGKILL",
        "",
    ),
    "a signal without a name": (
        "os.kill(os.getpid(), 40)",
        "on_execute: no answer; the process got signal 40",
        "",
    ),
    "closed socket": (
        "os.close(int(sys.argv[1])); time.sleep(60)",
        "on_execute: no answer; the process let go of its connection",
        "",
    ),
    "shut socket": (
        "socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_RDWR); time.sleep(60)",
        "on_execute: no answer; the process let go of its connection",
        "",
    ),
    "closed output": (
        "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2); raise ValueError",
        "on_execute: ValueError",
        "",
    ),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "on_execute: KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize(("body", "detail", "printed"), ENDS.values(), ids=ENDS)
def test_a_worker_that_ends_costs_its_own_operation(device, body, detail, printed):
    called = device.call(body)
    assert device.failure(called) == (Status.SERVICE_FAILED, detail)
    assert printed in called.printed
    assert device.works()


def test_a_thread_that_keeps_running_neither_delays_the_answer_nor_outlives_it(device):
    called = device.call(
        """
        def spin():
            while True: pass
        threading.Thread(target=spin).start()
        return ExecuteOutput(best_value=1)
        """
    )
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))


HOSTILE_BYTES = {
    "garbage": "send(b'\\xc1' * 1000)",
    "nothing": "send(b'')",
    "text": "os.write(int(sys.argv[1]), b'GET / HTTP/1.1\\r\\n\\r\\n' * 100)",
    "4 GiB announced": "send(b'', announced=0xFFFFFFFF)",
    "a message of the device": "say('Answer', value=b'x', status=0, detail='')",
    "a message of a trainer": "say('Trained', update=b'', example_count=1, example_bytes=1)",
    "no type": "send(msgspec.msgpack.encode({'output': {}}))",
    "two types": "send(b'\\x82\\xa4type\\xa8Question\\xa4type\\xa4Done')",
    "a list": "send(msgspec.msgpack.encode(['Done', {}]))",
    "too many entries announced": "send(b'\\xdf\\xff\\xff\\xff\\xff')",
    "deep nesting": "send(b'\\x91' * (1 << 20) + b'\\xc0')",
    "deep nesting in an output": "send(b'\\x82\\xa4type\\xa4Done\\xa6output' + b'\\x91' * (1 << 20) + b'\\xc0')",
    "deep nesting in a column": (
        "done(request_log_record={'rows': [{'a': msgspec.Raw(b'\\x91' * 100_000 + b'\\xc0')}]})"
    ),
    "bytes after the message": "send(msgspec.msgpack.encode({'type': 'Done', 'output': {}}) + b'\\xc0')",
    "no output": "say('Done', output=None)",
    "fields of other types": "done(best_value='7', event_log_records=7)",
    "a huge integer": "done(best_value=2**64 - 1)",
    "a number that is none": "done(best_value=float('nan'))",
    "a record that no database holds": "done(event_log_records=[{'request_log_record': {'id': 2**63}}])",
    "a negative row": "done(event_log_records=[{'row_index': -1}])",
    "an event type out of range": "done(event_log_records=[{'type': 128}])",
    "a column of a type of its own": "done(request_log_record={'rows': [{'a': msgspec.msgpack.Ext(5, b'x')}]})",
    "a time that is none": "done(request_log_record={'rows': [], 'time': msgspec.msgpack.Ext(-1, b'\\xff' * 12)})",
    "text that is no text": "send(b'\\x82\\xa4type\\xa4Done\\xa6output\\x81\\xab\\xffest_value\\x07')",
    "a type that is no text": "send(b'\\x81\\xa4type\\xa2\\xff\\xff')",
    "rows without end": "done(request_log_record={'rows': [{}] * (1 << 21)})",
}


@pytest.mark.parametrize("body", HOSTILE_BYTES.values(), ids=HOSTILE_BYTES)
def test_hostile_bytes_cost_their_own_operation(device, processes, body):
    with processes.bounded_memory(48 * MEBIBYTE):
        called = device.call(f"{body}\ntime.sleep(60)")
    status, detail = device.failure(called)
    assert status is Status.SERVICE_FAILED
    assert "an answer that breaks a rule" in detail or "a message of " in detail, detail
    assert device.works()


def test_a_message_that_stops_half_way_ends_with_the_deadline_or_with_the_process(device):
    called = device.call("send(b'abc', announced=1000); time.sleep(60)", seconds=0.3)
    assert device.failure(called)[0] is Status.SERVICE_TIMEOUT
    called = device.call("send(b'abc', announced=1000); os._exit(0)")
    assert device.failure(called) == (Status.SERVICE_FAILED, "on_execute: no answer; the process ended with 0")


@pytest.mark.parametrize(
    ("operation", "given", "field", "part", "count", "mebibytes"),
    [
        ("execute", None, b"\xb2request_log_record\x81\xa4rows", b"\x80", (1 << 20) - 100, 75 + 10),
        (
            "training_examples",
            TrainingExampleInput("p", "1"),
            b"\xb8training_example_records",
            b"\x81\xb0training_example\xc4\x02ab",
            380_000,
            8 * 10,
        ),
        ("download_completed", None, b"\xadretained_keys", b"\xa2ab", 1_000_000, 3 * 25 + 10),
    ],
    ids=["rows", "examples", "keys"],
)
def test_what_grows_by_decoding_grows_in_proportion(device, processes, operation, given, field, part, count, mebibytes):
    device.write(
        f"""
        body = b"\\x82\\xa4type\\xa4Done\\xa6output\\x81" + {field!r} + b"\\xdd" + struct.pack(">I", {count})
        send(body + {part!r} * {count})
        time.sleep(60)
        """,
        operation,
    )
    answers = []

    async def scenario():
        # Not returned: as it ends, asyncio makes a text of what a coroutine has returned.
        answers.append(await device.calling(operation, given))

    with processes.bounded_memory(mebibytes * MEBIBYTE):
        asyncio.run(scenario())
    (parts,) = (value for value in vars(answers[0].result).values() if value)
    assert len(getattr(parts, "rows", parts)) == count


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"error": "x" * 2000, "code": 5}, "on_execute: " + "x" * 80),
        ({"error": "two words\n\x1b[2J", "code": 5}, "on_execute: an error"),
        ({"error": "", "code": 2**63}, "on_execute: an error"),
        ({"error": "E", "code": -5}, "on_execute: E"),
    ],
)
def test_a_failure_in_a_workers_own_words_says_a_name_and_a_code_at_most(device, fields, detail):
    called = device.call(f"say('Failed', loading=False, **{fields!r}); time.sleep(60)")
    assert device.failure(called) == (Status.SERVICE_FAILED, detail)
    assert called.result.code == (5 if fields["code"] == 5 else 0)


def test_questions_without_end_neither_stop_the_loop_nor_fill_the_memory(device, processes):
    bodies = {
        "one after the other": "while True: self.local.get('k')",
        "written": "while True: self.local.put('k', bytes(1000))",
        "large": "self.local.put('k', bytes(8 << 20))\nwhile True: self.local.get('k')",
        "without reading an answer": (
            "question = msgspec.msgpack.encode({'type': 'Question', 'method': 'user_data', 'arguments': []})\n"
            "os.set_blocking(int(sys.argv[1]), True)\n"
            "while True: os.write(int(sys.argv[1]), (struct.pack('>I', len(question)) + question) * 1000)"
        ),
    }
    for name, body in bodies.items():
        device.write(body)
        with processes.bounded_memory(96 * MEBIBYTE):
            called, gap = asyncio.run(with_heartbeat(device.calling(seconds=0.7)))
        assert device.failure(called)[0] is Status.SERVICE_TIMEOUT, name
        assert gap < 0.5, name
    assert device.works()


def test_a_question_that_takes_long_does_not_stop_the_loop(device):
    device.outside = replace(device.outside, user_data=lambda app: time.sleep(1.0) or UserData())
    device.write("self.service.get_user_data(self.token); return ExecuteOutput(best_value=1)")
    called, gap = asyncio.run(with_heartbeat(device.calling()))
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))
    assert gap < 0.7


QUESTIONS = {
    "unknown": ("no.such", []),
    "empty": ("", []),
    "a name that is long": ("x" * 1_000_000, []),
    "no arguments": ("local_data.get", []),
    "too many": ("local_data.get", ["a", "b"]),
    "not a list": ("local_data.get", {"key": "a"}),
    "nothing": ("local_data.get", None),
    "of another type": ("local_data.get", [7]),
    "a key without end": ("local_data.put", ["k" * 5000, b""]),
    "an empty key": ("local_data.put", ["", b""]),
    "more than there is room for": ("local_data.put", ["k", bytes(6 << 20)]),
    "times of more than 64 bits": ("logs.requests", [0, 2**64 - 1]),
    "times before 1970": ("logs.joined_events", [-5, 5]),
    "times the wrong way round": ("logs.requests", [5, 5]),
    "an interval of more than 64 bits": ("scheduler.schedule", ["p", True, 2**64 - 1]),
    "a negative interval": ("scheduler.schedule", ["p", True, -1]),
    "a population that leads elsewhere": ("scheduler.schedule", ["../../other", False, 0]),
    "a population without end": ("scheduler.schedule", ["p" * 300, False, 0]),
    "no population": ("scheduler.schedule", ["", False, 0]),
    "parameters that are none": ("event_urls.create", [{"a": [1]}, None, None, None]),
    "parameters without end": ("event_urls.create", [{"a": b"x" * (1 << 19)}, None, None, None]),
    "many small parts": ("event_urls.create", [{"a": [{}] * (1 << 17)}, None, None, None]),
    "another facility": ("downloaded_contents.get", ["k"]),
}


def test_questions_that_are_none_are_refused_and_the_worker_goes_on(device, processes):
    device.outside = replace(device.outside, local_bytes_limit=5 * MEBIBYTE)
    body = """
        for name, (method, arguments) in QUESTIONS.items():
            say("Question", method=method, arguments=arguments)
            size = struct.unpack(">I", os.read(int(sys.argv[1]), 4))[0]
            answer = msgspec.msgpack.decode(os.read(int(sys.argv[1]), size))
            assert answer["status"] != 0, (name, answer)
            assert len(answer["detail"]) < 500, name
        send(b"\\x83\\xa4type\\xa8Question\\xa6method\\xa5local\\xa9arguments" + b"\\x91" * 100_000 + b"\\xc0")
        time.sleep(60)
        """
    device.write(body)
    source = device.code / "sample_service.py"
    source.write_text(source.read_text().replace("QUESTIONS", repr(QUESTIONS)))
    with processes.bounded_memory(96 * MEBIBYTE):
        called = asyncio.run(device.calling())
    assert device.failure(called) == (
        Status.SERVICE_FAILED,
        "on_execute: an answer that breaks a rule (RecursionError)",
    ), called.printed
    assert device.scheduled == []


def test_a_put_that_no_message_holds_is_refused_and_the_worker_goes_on(device):
    called = device.call(
        """
        assert self.local.put("k", bytes(65 << 20)) is None
        assert self.local.get("k") is None
        return ExecuteOutput(best_value=1)
        """
    )
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))


def test_what_a_service_stores_is_limited(device):
    device.outside = replace(device.outside, local_bytes_limit=10_000)
    called = device.call(
        """
        self.local.put("k", bytes(9000))
        self.local.put("k", bytes(8999) + b"2")
        self.local.put("l", bytes(9000))
        for n in range(100):
            self.local.put(str(n), b"")
        return ExecuteOutput(best_value=len(self.local.key_set()))
        """
    )
    with device.database.read() as tx:
        assert key_values.stored_bytes(tx, "local_data", device.owner) <= 10_000
        assert key_values.get_value(tx, "local_data", device.owner, "k").endswith(b"2")
    assert 2 <= called.result.best_value < 5


ATTEMPTS = {
    "another app's folder": "Path(other, 'sample_service.py').read_text()",
    "the list of another app's folder": "os.listdir(other)",
    "the device's database": "open(database, 'rb')",
    "the device's database, to write": "open(database, 'r+b')",
    "the device's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "the device's environment": "open(f'/proc/{os.getppid()}/environ', 'rb')",
    "the device's descriptors": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "the users": "open('/etc/passwd')",
    "a new file": "open(own + '/new', 'w')",
    "its own code": "open(own + '/sample_service.py', 'a')",
    "a temporary file": "open('/tmp/fedcompute-worker', 'w')",
    "shared memory": "open('/dev/shm/fedcompute-worker', 'w')",
    "a link": "os.symlink('/etc/passwd', own + '/link')",
    "a socket": "socket.socket()",
    "a connection": "socket.create_connection(('127.0.0.1', 22), timeout=1)",
    "a fork": "os.fork()",
    "a process": "subprocess.run(['/bin/true'])",
    "another program": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "multiprocessing": "__import__('multiprocessing').Process(target=print).start()",
    "a signal": "os.kill(os.getppid(), signal.SIGTERM)",
    "a signal to all": "os.kill(-1, signal.SIGTERM)",
    "another user": "os.setuid(0 if os.getuid() else 1)",
    "more memory": "__import__('resource').setrlimit(9, (-1, -1))",
}


def test_a_worker_reaches_nothing_of_others(device, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sample_service.py").write_text(SECRET)
    places = {"other": str(other), "own": str(device.code), "database": str(device.database.path)}
    device.write(
        """
        for name, attempt in ATTEMPTS.items():
            try:
                print(name, "succeeded:", eval(attempt, globals() | PLACES))
            except (OSError, ValueError) as error:
                pass
        return ExecuteOutput(best_value=1)
        """
    )
    source = device.code / "sample_service.py"
    text = source.read_text().replace("ATTEMPTS", repr(ATTEMPTS)).replace("PLACES", repr(places))
    source.write_text(text)
    called = asyncio.run(device.calling())
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))
    assert called.printed == ""
    assert source.read_text() == text


def test_what_the_process_is_told_of_the_devices_surroundings_is_little(device, monkeypatch):
    monkeypatch.setenv("FEDCOMPUTE_TEST_TOKEN", SECRET)
    called = device.call("print(sorted(os.environ), sys.argv[1:], os.getcwd()); return ExecuteOutput()")
    assert SECRET not in called.printed
    assert "FEDCOMPUTE_TEST_TOKEN" not in called.printed
