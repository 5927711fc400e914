"""What a process that a plan has taken over may try."""

import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from fedcompute.device.plans.plan_runner import PlanResult
from fedcompute.errors import OperationFailed, Reason

GIBIBYTE = 1 << 30

pytestmark = pytest.mark.usefixtures("confined")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """`hostile(code)` has this code run confined in place of the trainer; it may `say` and `send`."""
    program = """
    import ctypes, msgspec, os, socket, struct, subprocess, sys, time
    from pathlib import Path
    from fedcompute.device.isolation.child import enter
    from fedcompute.device.isolation.messages import *

    def send(body, announced=None):
        os.write(int(sys.argv[1]), struct.pack(">I", len(body) if announced is None else announced) + body)

    def say(kind, **fields):
        send(msgspec.msgpack.encode({"type": kind, **fields}))

    end, start = enter()
    end.receive()
    """
    python = sys.executable

    def take_over(code: str) -> None:
        (tmp_path / "hostile.py").write_text(textwrap.dedent(program) + textwrap.dedent(code))
        wrapper = tmp_path / "python"
        source = shlex.quote((tmp_path / "hostile.py").read_text())
        wrapper.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {shlex.quote(python)} -I -u -c {source} "$last"\n')
        wrapper.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(wrapper))

    yield take_over
    monkeypatch.undo()


LIES = {
    "garbage": ("send(b'\\xc1' * 100)", "an answer that breaks a rule (DecodeError)"),
    "nothing": ("send(b'')", "an answer that breaks a rule (DecodeError)"),
    "4 GiB": ("send(b'', announced=0xFFFFFFFF)", "an answer that breaks a rule: a message of 4294967295 bytes, over "),
    "deep nesting": (
        "send(b'\\x82\\xa4type\\xa7Trained\\xa5other' + b'\\x91' * 100_000 + b'\\xc0')",
        "an answer that breaks a rule (RecursionError)",
    ),
    "text that is none": (
        "send(b'\\x84\\xa4type\\xaeTrainingFailed\\xa6reason\\xa1\\xff\\xa6detail\\xa0\\xa6remedy\\xa0')",
        "an answer that breaks a rule (UnicodeDecodeError)",
    ),
    "a worker's message": ("say('Done', output=1)", "an answer that breaks a rule (ValidationError)"),
    "more examples than there were": (
        "say('Trained', update=b'x', example_count=2, example_bytes=1)",
        "an answer that breaks a rule (ValueError)",
    ),
    "fewer than none": (
        "say('Trained', update=b'x', example_count=-1, example_bytes=1)",
        "an answer that breaks a rule (ValueError)",
    ),
    "more bytes than there were": (
        "say('Trained', update=b'x', example_count=1, example_bytes=2**63)",
        "an answer that breaks a rule (ValueError)",
    ),
    "half a message": ("send(b'abc', announced=10); os._exit(0)", "no update; the process ended with 0"),
    "an end": ("os._exit(7)", "no update; the process ended with 7"),
    "a segmentation fault": ("ctypes.string_at(0)", "no update; the process got SIGSEGV"),
    "a closed connection": (
        "os.close(int(sys.argv[1])); time.sleep(60)",
        "no update; the process let go of its connection",
    ),
    "another's reason": ("say('TrainingFailed', reason='data_in_use', detail='d', remedy='r')", "d"),
    "no reason": ("say('TrainingFailed', reason='', detail='line\\n\\x1b[31mred', remedy='r')", "line  [31mred"),
    "a detail without end": ("say('TrainingFailed', reason='', detail='x' * 10_000_000, remedy='')", "x" * 2000),
}


@pytest.mark.parametrize(("code", "detail"), LIES.values(), ids=LIES)
def test_a_process_that_lies_costs_its_own_training(
    light, hostile, monkeypatch, processes, code, detail, answered, aborted
):
    hostile(f"{code}\ntime.sleep(60)")

    async def scenario(trainer):
        found = await aborted(answered(trainer, 1))
        monkeypatch.undo()
        assert await answered(trainer, 2)
        return found

    found = light(scenario)
    assert found == detail or (detail.endswith("over ") and found.startswith(detail))


def test_a_process_that_admits_not_to_be_confined_is_not_used(light, hostile, answered):
    hostile("")
    # In place of `enter`, which tells the truth.
    lie = """
    from fedcompute.device.isolation.frames import ChildEnd
    from fedcompute.device.isolation.sandbox import Restriction

    end = ChildEnd(int(sys.argv[1]))
    end.receive()
    end.send(Confined((Restriction("files", False, (), "no Landlock"),)))
    end.receive()
    """
    wrapper = Path(sys.executable)
    wrapper.write_text(wrapper.read_text().replace("end, start = enter()\nend.receive()\n", textwrap.dedent(lie)))

    async def scenario(trainer):
        with pytest.raises(OperationFailed, match="no Landlock") as caught:
            await answered(trainer, 1)
        assert caught.value.reason is Reason.ISOLATION_UNAVAILABLE

    light(scenario)


def test_a_process_that_is_taken_over_reaches_its_own_folder_and_nothing_else(
    light, hostile, tmp_path, answered, aborted
):
    secret = tmp_path / "device.db"
    secret.write_text("a user's data")
    other = tmp_path / "scratch" / "training-other"
    hostile(
        f"""
        attempts = {{
            "users": lambda: open("/etc/passwd"),
            "database": lambda: open({str(secret)!r}, "rb"),
            "write database": lambda: open({str(secret)!r}, "ab"),
            "list": lambda: os.listdir({str(tmp_path)!r}),
            "other training": lambda: open({str(other)!r} + "/checkpoint"),
            "write beside": lambda: open({str(tmp_path / "scratch")!r} + "/new", "w"),
            "device memory": lambda: open(f"/proc/{{os.getppid()}}/mem", "rb"),
            "device command line": lambda: open(f"/proc/{{os.getppid()}}/cmdline", "rb"),
            "socket": lambda: socket.socket(),
            "unix socket": lambda: socket.socket(socket.AF_UNIX),
            "fork": lambda: os.fork(),
            "program": lambda: subprocess.run(["/bin/true"]),
            "signal": lambda: os.kill(os.getppid(), 15),
            "link": lambda: os.symlink("/etc/passwd", start.writable[0] + "/link"),
            "hard link": lambda: os.link({str(secret)!r}, start.writable[0] + "/link"),
            "pipe": lambda: os.mkfifo(start.writable[0] + "/pipe"),
            "memory": lambda: bytearray(start.memory),
        }}
        succeeded = []
        for name, attempt in attempts.items():
            try:
                attempt()
                succeeded.append(name)
            except (OSError, MemoryError):
                pass
        own = Path(start.writable[0], "file")
        own.write_text("mine")
        try:
            with own.open("wb") as file:
                file.seek(start.file_bytes)
                file.write(b"x")
                file.flush()
            succeeded.append("a file over its limit")
        except OSError:
            pass
        say("TrainingFailed", reason="", detail=f"succeeded: {{succeeded}}, {{own.exists()}}", remedy="")
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        other.mkdir()
        (other / "checkpoint").write_text("another's")
        try:
            return await aborted(answered(trainer, 1))
        finally:
            (other / "checkpoint").unlink()
            other.rmdir()

    assert light(scenario, memory=GIBIBYTE // 2) == "succeeded: [], True"
    assert secret.read_text() == "a user's data"


def test_what_a_process_leaves_in_its_folder_goes_however_deep_it_is(light, hostile, answered, aborted):
    hostile(
        """
        os.chdir(start.writable[0])
        for depth in range(1100):
            os.mkdir("directory")
            Path("file").write_text("x")
            os.chdir("directory")
        os.mkdir("shut", 0)
        say("TrainingFailed", reason="", detail="made", remedy="")
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        assert await aborted(answered(trainer, 1)) == "made"

    light(scenario)


def test_what_a_process_prints_is_dropped(light, hostile, processes, query_plan):
    hostile(
        """
        for _ in range(64):
            os.write(1, bytes(1 << 20))
        say("Trained", update=b"u", example_count=1, example_bytes=1)
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        with processes.bounded_memory(32 << 20):
            assert await trainer.train("owner", query_plan, b"", [b"x"]) == PlanResult(b"u", 1, 1)

    light(scenario)
