"""What a confined process cannot do, tried by processes that confine themselves first."""

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

MEBIBYTE = 1 << 20


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


NETWORK = {
    "inet": "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "inet6": "import socket; socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "unix": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "raw": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "vsock": "import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "pair that can be sent elsewhere": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "pair of another kind": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "pair connected anew": "import socket; socket.socketpair()[0].connect(given['private'] + '/socket')",
    "pair bound": "import socket; socket.socketpair()[0].bind(given['scratch'] + '/socket')",
    "io_uring": "call(425, 8, ctypes.addressof(ctypes.create_string_buffer(120)))",
}


@pytest.mark.parametrize("attempt", NETWORK.values(), ids=NETWORK)
def test_no_socket_is_made_or_connected(sandbox, needs, attempt):
    needs("network")
    assert sandbox.run(attempt).refused == "PermissionError"


def test_asyncio_reaches_no_listener(sandbox, needs, listener):
    needs("network")
    sandbox.given["port"] = listener.getsockname()[1]
    outcome = sandbox.run("import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', given['port']))")
    assert outcome.refused == "PermissionError"
    assert select.select([listener], [], [], 0)[0] == []


READING = {
    "a file of another directory": "open(given['private'] + '/file').read()",
    "a path through a granted directory": "open(given['data'] + '/../private/file').read()",
    "a link in a granted directory": "open(given['data'] + '/link').read()",
    "another directory's names": "os.listdir(given['private'])",
    "the home directory's names": "os.listdir(given['home'])",
    "the working directory's names": "os.listdir('.')",
    "the root's names": "os.listdir('/')",
    "the temporary directory's names": "os.listdir('/tmp')",
    "the users": "open('/etc/passwd').read()",
    "the users' database": "import pwd; pwd.getpwuid(os.getuid())",
    "the environment of the first process": "open('/proc/1/environ').read()",
    "the environment of the parent": "open(f'/proc/{given[\"parent\"]}/environ').read()",
    "the command line of the parent": "open(f'/proc/{given[\"parent\"]}/cmdline').read()",
    "the memory of the parent": "open(f'/proc/{given[\"parent\"]}/mem', 'rb').read(1)",
    "the descriptors of the parent": "os.listdir(f'/proc/{given[\"parent\"]}/fd')",
    "its own environment as it was": "open('/proc/self/environ').read()",
    "its own root": "open('/proc/self/root/etc/passwd').read()",
    "the processes": "os.listdir('/proc')",
    "the connections of the machine": "open('/proc/net/tcp').read()",
    "shared memory": "os.listdir('/dev/shm')",
    "a terminal": "open('/dev/tty', 'rb')",
    "what happens in a directory": "call({'x86_64': 294, 'aarch64': 26}[os.uname().machine], 0)",
}


@pytest.mark.parametrize("attempt", READING.values(), ids=READING)
def test_nothing_is_read_beyond_the_policy(sandbox, needs, attempt):
    needs("files")
    sandbox.given["home"] = str(Path.home())
    (sandbox.data / "link").symlink_to(sandbox.private / "file")
    # The users' database says KeyError when it cannot be read.
    assert sandbox.run(attempt).refused in ("PermissionError", "KeyError")


WRITING = {
    "a new file elsewhere": "open(given['private'] + '/new', 'w')",
    "a new file where it only reads": "open(given['data'] + '/new', 'w')",
    "a module of Python's packages": "os.open(sandbox.__file__, os.O_WRONLY)",
    "a temporary file elsewhere": "import tempfile; tempfile.TemporaryFile(dir='/tmp')",
    "a path out of its directory": "open(given['scratch'] + '/../private/new', 'w')",
    "a file that it may read": "open(given['data'] + '/file', 'a').write('more')",
    "cutting a file that it may read": "os.open(given['data'] + '/file', os.O_RDONLY | os.O_TRUNC)",
    "cutting a file by its name": "os.truncate(given['data'] + '/file', 0)",
    "a link to a file elsewhere": "os.link(given['private'] + '/file', given['scratch'] + '/new')",
    "a link to a file that it may read": "os.link(given['data'] + '/file', given['scratch'] + '/new')",
    "a symbolic link in its directory": "os.symlink(given['private'] + '/file', given['scratch'] + '/new')",
    "moving a file in": "os.rename(given['private'] + '/file', given['scratch'] + '/new')",
    "moving a file out": "os.rename(given['scratch'] + '/file', given['private'] + '/new')",
    "swapping a file": "os.replace(given['scratch'] + '/file', given['data'] + '/file')",
    "removing a file elsewhere": "os.remove(given['private'] + '/file')",
    "removing a file that it may read": "os.remove(given['data'] + '/file')",
    "making a directory elsewhere": "os.mkdir(given['private'] + '/new')",
    "removing the directory itself": "os.remove(given['scratch'] + '/file'); os.rmdir(given['scratch'])",
    "a named pipe in its directory": "os.mkfifo(given['scratch'] + '/new')",
    "a device in its directory": "os.mknod(given['scratch'] + '/new', 0o20600, os.makedev(1, 1))",
    "the mode of a file": "os.chmod(given['data'] + '/file', 0)",
    "the mode of an open file": "os.fchmod(os.open(given['data'] + '/file', os.O_RDONLY), 0)",
    "the owner of a file": "os.chown(given['data'] + '/file', os.getuid(), os.getgid())",
    "the times of a file": "os.utime(given['private'] + '/file', (0, 0))",
    "an attribute of a file": "os.setxattr(given['data'] + '/file', 'user.mark', b'1')",
    "its own memory through /proc": "open('/proc/self/mem', 'r+b')",
    "its own limits through /proc": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
}


@pytest.mark.parametrize("attempt", WRITING.values(), ids=WRITING)
def test_nothing_is_changed_beyond_the_writable_directory(sandbox, needs, attempt):
    needs("files")
    before = {path: path.stat() for path in (sandbox.data / "file", sandbox.private / "file")}
    outcome = sandbox.run(attempt)
    assert outcome.refused in ("PermissionError", "OSError"), outcome.errors
    for path, status in before.items():
        assert path.read_text() == "kept"
        assert (path.stat().st_mode, path.stat().st_mtime) == (status.st_mode, status.st_mtime)
    assert [path.name for path in (*sandbox.data.iterdir(), *sandbox.private.iterdir())] == ["file", "file"]
    assert {path.name for path in sandbox.scratch.iterdir()} <= {"file"}


def test_a_search_path_outside_the_installation_is_not_handed_over(sandbox, needs):
    needs("files")
    (sandbox.private / "someones_module.py").write_text("secret = 1")
    outcome = sandbox.run("import someones_module", environment={"PYTHONPATH": str(sandbox.private)})
    assert outcome.refused == "ModuleNotFoundError"


PROCESSES = {
    "fork": "os.fork() or os._exit(0)",
    "a fork bomb": """
        refused = 0
        for _ in range(200):
            try:
                os.fork() or os._exit(0)
            except PermissionError:
                refused += 1
        if refused == 200:
            raise PermissionError
    """,
    "a program": "import subprocess; subprocess.run(['/bin/true'])",
    "a spawned program": "os.posix_spawn('/bin/true', ['true'], {})",
    "a shell": "if os.system('true'): raise PermissionError",
    "becoming a program": "os.execv(sys.executable, ['python'])",
    "becoming a setuid program": "os.execv('/bin/su', ['su'])",
    "becoming a program in memory": "os.memfd_create('program')",
    "a Python process": "import multiprocessing; multiprocessing.get_context('spawn').Process(target=print).start()",
    "tracing the parent": "call({'x86_64': 101, 'aarch64': 117}[os.uname().machine], 0x4206, given['parent'], 0, 0)",
    "a process descriptor": "os.pidfd_open(given['parent'])",
    "reading the parent's memory": (
        "call({'x86_64': 310, 'aarch64': 270}[os.uname().machine], given['parent'], 0, 0, 0, 0, 0)"
    ),
}


@pytest.mark.parametrize("attempt", PROCESSES.values(), ids=PROCESSES)
def test_no_process_is_made_or_looked_into(sandbox, needs, attempt):
    needs("processes")
    assert sandbox.run(attempt).refused == "PermissionError"


SIGNALS = {
    "the parent": "os.kill(given['parent'], 0)",
    "the first process": "os.kill(1, 0)",
    "its own group": "os.kill(0, 0)",
    "everybody": "os.kill(-1, 0)",
    "a thread of the parent": (
        "call({'x86_64': 234, 'aarch64': 131}[os.uname().machine], given['parent'], given['parent'], 0)"
    ),
    "a thread of anybody": "call({'x86_64': 200, 'aarch64': 130}[os.uname().machine], given['parent'], 0)",
    "with a value": "call({'x86_64': 129, 'aarch64': 138}[os.uname().machine], given['parent'], 0, 0)",
    "by way of a descriptor": "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, given['parent'])",
    "the parent's processor time": "import resource; resource.prlimit(given['parent'], resource.RLIMIT_CPU)",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, given['parent'], os.getpriority(0, 0))",
    "the parent's processors": "os.sched_setaffinity(given['parent'], os.sched_getaffinity(0))",
}


@pytest.mark.parametrize("attempt", SIGNALS.values(), ids=SIGNALS)
def test_no_other_process_is_signalled_or_slowed(sandbox, needs, attempt):
    needs("signals")
    assert sandbox.run(attempt).refused == "PermissionError"


PRIVILEGES = {
    "any capability": "if not privileges.capabilities(): raise PermissionError",
    "root's id": "os.setuid(0)",
    "another user": "os.setresuid(1, 1, 1)",
    "another group": "os.setgroups([1])",
    "a user namespace": "call({'x86_64': 272, 'aarch64': 97}[os.uname().machine], 0x10000000)",
    "another root": "os.chroot(given['scratch'])",
    "a mount": "call({'x86_64': 165, 'aarch64': 40}[os.uname().machine], 0, 0, 0, 0, 0)",
    "being read by others": "if libc.prctl(4, 1, 0, 0, 0): raise PermissionError",
    "outliving its parent": "if libc.prctl(1, 0, 0, 0, 0): raise PermissionError",
}


@pytest.mark.parametrize("attempt", PRIVILEGES.values(), ids=PRIVILEGES)
def test_no_privilege_is_held_or_regained(sandbox, needs, attempt):
    needs("privileges", "processes")
    assert sandbox.run(attempt).refused == "PermissionError"


MEMORY = {
    "the heap": "bytearray(400 << 20)",
    "many small objects": "[bytes(1000) for _ in range(400_000)]",
    "numpy": "import numpy; numpy.ones(50_000_000)",
    "threads with stacks": """
        import threading
        threading.stack_size(64 << 20)
        wait = threading.Event()
        try:
            for _ in range(20):
                threading.Thread(target=wait.wait).start()
        except RuntimeError:
            raise MemoryError
        finally:
            wait.set()
    """,
}


@pytest.mark.parametrize("attempt", MEMORY.values(), ids=MEMORY)
def test_private_memory_ends_at_the_limit(sandbox, needs, attempt):
    needs("memory")
    assert sandbox.run(attempt).refused == "MemoryError"


UNCOUNTED = {
    "shared": "import mmap; mmap.mmap(-1, 1 << 20)",
    "growing like a stack": "import mmap; mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100)",
    "in a file of memory": "os.ftruncate(os.memfd_create('memory'), 1 << 30)",
    "of System V": "call({'x86_64': 29, 'aarch64': 194}[os.uname().machine], 0, 1 << 20, 0o1600)",
}


@pytest.mark.parametrize("attempt", UNCOUNTED.values(), ids=UNCOUNTED)
def test_memory_that_no_limit_counts_is_not_made(sandbox, needs, attempt):
    needs("memory")
    assert sandbox.run(attempt).refused == "PermissionError"


def test_pages_made_read_only_escape_the_limit_only_as_far_as_the_address_space_goes(sandbox, needs):
    needs("memory")
    outcome = sandbox.run(
        """
        import mmap
        libc.mmap.restype = ctypes.c_void_p
        for count in range(100):
            size = 64 << 20
            at = libc.mmap(None, ctypes.c_size_t(size), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            if at == ctypes.c_void_p(-1).value:
                return count * 64
            libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(size), mmap.PROT_READ)
        """
    )
    assert outcome.did is not None
    assert 256 <= outcome.did <= 256 + 1024


BUSY = {
    "that ends when told": ("while True: pass", signal.SIGXCPU),
    "that ignores being told": (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        signal.SIGKILL,
    ),
    "in threads": (
        "import threading\ndef spin():\n    while True: pass\n"
        "[threading.Thread(target=spin).start() for _ in range(3)]\nspin()",
        signal.SIGXCPU,
    ),
}


@pytest.mark.parametrize(("attempt", "ending"), BUSY.values(), ids=BUSY)
def test_a_process_over_its_processor_time_is_ended(sandbox, needs, attempt, ending):
    needs("cpu_time")
    assert sandbox.run(attempt, cpu_seconds=1).status == -ending


def test_a_file_ends_at_the_limit(sandbox, needs):
    needs("file_size")
    outcome = sandbox.run(
        """
        with open(given["scratch"] + "/large", "wb", buffering=0) as file:
            for _ in range(4):
                file.write(bytes(700_000))
        """
    )
    assert (outcome.refused, outcome.errno) == ("OSError", errno.EFBIG)
    assert (sandbox.scratch / "large").stat().st_size == MEBIBYTE


def test_files_that_it_makes_are_for_its_user_alone(sandbox, needs):
    needs("processes")
    sandbox.run("libc.umask(0); open(given['scratch'] + '/new', 'w')")
    assert (sandbox.scratch / "new").stat().st_mode & 0o777 == 0o600


def test_without_a_writable_directory_not_even_an_open_file_grows(sandbox, needs):
    needs("file_size")
    with (sandbox.private / "file").open("r+b") as file:
        sandbox.given["open"] = file.fileno()
        outcome = sandbox.run(
            "os.lseek(given['open'], 0, os.SEEK_END); os.write(given['open'], b'more')",
            options={"keep": [file.fileno()]},
            pass_fds=(file.fileno(),),
            writable=[],
        )
    assert outcome.refused == "OSError"
    assert (sandbox.private / "file").read_text() == "kept"


def test_the_number_of_descriptors_is_limited(sandbox):
    outcome = sandbox.run("for _ in range(1000): os.dup(0)")
    assert outcome.refused == "OSError"


def test_an_inherited_descriptor_is_closed_unless_kept(sandbox):
    mine, theirs = socket.socketpair()
    with mine, theirs, (sandbox.private / "file").open() as file:
        sandbox.given |= {"file": file.fileno(), "socket": theirs.fileno()}
        mine.sendall(b"question")
        outcome = sandbox.run(
            """
            import socket
            kept = socket.socket(fileno=given["socket"])
            question = kept.recv(100)
            kept.sendall(b"answer")
            os.write(given["socket"], b" and more")
            kept.detach()
            try:
                os.read(given["file"], 10)
            except OSError as error:
                return question.decode(), error.strerror
            """,
            options={"keep": [theirs.fileno()]},
            pass_fds=(file.fileno(), theirs.fileno()),
        )
        assert outcome.did == ["question", "Bad file descriptor"], outcome.errors
        assert mine.recv(100) == b"answer and more"


def test_what_a_worker_needs_works(sandbox):
    outcome = sandbox.run(
        """
        import asyncio, hashlib, random, sqlite3, ssl, tempfile, threading, zoneinfo
        import numpy
        made = []
        thread = threading.Thread(target=lambda: made.append("thread"))
        thread.start()
        thread.join()
        made.append(asyncio.run(asyncio.to_thread(lambda: "loop")))
        made.append(open(given["data"] + "/file").read())
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "a")
            path.write_text("written")
            made.append(path.rename(Path(given["scratch"], "b")).read_text())
            Path(given["scratch"], "b").unlink()
            made.append(Path(directory).parent == Path(given["scratch"]))
        made.append(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 5)())
        made.append(float(numpy.ones((300, 300)).dot(numpy.ones((300, 300)))[0, 0]))
        made.append(str(zoneinfo.ZoneInfo("Asia/Jakarta")))
        made.append(sqlite3.connect(":memory:").execute("select 1").fetchone()[0])
        made.append(len(hashlib.sha256(os.urandom(10)).hexdigest()))
        open(os.devnull, "w").write("nothing")
        os.kill(os.getpid(), 0)
        return made
        """
    )
    assert outcome.did == ["thread", "loop", "kept", "written", True, 5, 300.0, "Asia/Jakarta", 1, 64], outcome.errors


def test_tensorflow_trains_and_writes_its_checkpoint(sandbox):
    outcome = sandbox.run(
        """
        import numpy, tensorflow as tf
        graph = tf.Graph()
        with graph.as_default():
            path = tf.compat.v1.placeholder(tf.string, [])
            square = tf.linalg.matmul(tf.ones([200, 200]), tf.ones([200, 200]))
            save = tf.raw_ops.SaveSlices(
                filename=path, tensor_names=["x"], shapes_and_slices=[""], data=[square]
            )
            restore = tf.raw_ops.RestoreV2(
                prefix=path, tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32]
            )
        with tf.compat.v1.Session(graph=graph) as session:
            file = given["scratch"] + "/update"
            session.run(save, {path: file})
            return float(session.run(restore, {path: file})[0][7, 7])
        """,
        trains=True,
        memory=1024 * MEBIBYTE,
    )
    assert outcome.did == 200.0, outcome.errors


def test_a_users_threads_are_limited(sandbox, needs):
    needs("processes")
    become_a_user = """
    import threading
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    """
    outcome = sandbox.run(
        """
        threading.stack_size(32768)
        try:
            for count in range(9000):
                threading.Thread(target=threading.Event().wait, daemon=True).start()
        except RuntimeError:
            return count
        """,
        before=become_a_user,
        readable=[],
        writable=[],
        memory=2048 * MEBIBYTE,
    )
    assert "thread limit" in outcome.by_name("processes").by
    assert outcome.did is not None
    assert outcome.did < 8192


def test_a_call_of_a_foreign_architecture_ends_the_process(sandbox, needs):
    needs("processes")
    if os.uname().machine != "x86_64":
        pytest.skip("only x86_64 has calls of an older architecture")
    outcome = sandbox.run(
        """
        import mmap
        # mov eax, 20 (getpid of i386); int 0x80; ret
        code = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        code.write(bytes.fromhex("b814000000cd80c3"))
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        """
    )
    assert outcome.status in (-signal.SIGSYS, -signal.SIGSEGV)


def test_an_isolated_process_ends_with_its_parent(sandbox, needs):
    needs("lifetime")
    wait = "sys.stdout.write('.'); sys.stdout.flush(); time.sleep(60)"
    command = sandbox.command(wait, "", {}, {})
    parent = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"."
        process.kill()
        started = time.monotonic()
        assert process.stdout.read() == b""
        assert time.monotonic() - started < 30


def test_a_process_whose_parent_has_already_ended_ends_at_once(sandbox, needs):
    needs("lifetime")
    assert sandbox.run("return 1", options={"parent": 1 << 22}).status == -signal.SIGKILL


REFUSED_CALLS = {
    "several threads": (
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "confining a process that has 2 threads already",
    ),
    "an absent path to read": (
        "given['policy']['readable'] = ['/absent']",
        "/absent, which the policy grants, is not there",
    ),
    "a file to write into": (
        "given['policy']['writable'] = [given['data'] + '/file']",
        "/file, which the policy grants, is not there",
    ),
}


@pytest.mark.parametrize(("before", "detail"), REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_a_call_that_cannot_confine_restricts_nothing(sandbox, before, detail):
    before += """
confine_at_last = confine
def confine():
    try:
        return confine_at_last()
    except sandbox.OperationFailed as error:
        os.listdir("/")
        raise
"""
    assert f"{detail} [isolation_unavailable]" in sandbox.run("pass", before=before).errors
