"""A program that starts servers at once: everything is imported, and each server is a fork.

Reads one JSON object a line and answers each with the process id of a new server. Its servers do their jobs in threads,
with noise that follows from a seed, so that a kill ends all of a server and two undisturbed runs are alike bit for bit.
A fault point is a write: `{module}.{function} {what}:{before|after}`. A server notes the points that it reaches in a
file, and kills or stops itself when it reaches the one that it was told for the so many-th time. A fault may also be
the so many-th line of a release; noise is the system's then.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

# What a server imports only when it migrates its database and when its first round ends, for longer than either takes.
import alembic.context  # noqa: F401
import dp_accounting  # noqa: F401

import fedcompute.app
import fedcompute.learning.catalogue
import fedcompute.server.rounds.aggregate
from fedcompute.privacy.noise import SeededNoise
from fedcompute.server.rounds import passes, release
from fedcompute.server.rounds.update import UpdateJob, update
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage import budgets, iterations, releases
from fedcompute.storage.blobs import BlobStore
from fedcompute.storage.database import Database

_OURS = ("fedcompute.storage.database", "fedcompute.storage.blobs")


class Seeded:
    """An executor of threads whose updates draw from a seed that their round decides."""

    capacity = 4

    def __init__(self, seeded=True):
        self._pool = ThreadPoolExecutor(2)
        self._seeded = seeded

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        if self._seeded and isinstance(argument, UpdateJob) and job is update:
            return update(replace(argument, draws=()), SeededNoise(argument.key.iteration_id))
        return job(argument)

    def warm_up(self):
        pass

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)


class Points:
    """Counts the points that a server reaches."""

    def __init__(self, trace, fault):
        self._trace = trace
        self._fault = fault
        self._lock = threading.Lock()
        self._counts = collections.Counter()

    def reached(self, name):
        with self._lock:
            self._counts[name] += 1
            with pathlib.Path(self._trace).open("a") as file:
                file.write(f"{name}\n")
            if self._fault and self._fault.get("point") == name and self._fault["count"] == self._counts[name]:
                self._fail()

    def _fail(self):
        with contextlib.suppress(FileExistsError):
            # Of several servers that are told the same, the first one fails.
            os.close(os.open(self._fault["mark"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), getattr(signal, self._fault["how"]))


def caller():
    """The function of ours that asked for a write."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("fedcompute.") and module not in _OURS:
            return f"{module.removeprefix('fedcompute.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"


def watch(points):
    """Puts a point before and after every write of this process."""
    write, put, put_stream, delete = Database.write, BlobStore.put, BlobStore.put_stream, BlobStore.delete
    delete_folder = BlobStore.delete_folder

    @contextlib.contextmanager
    def watched_write(self, *arguments, **options):
        name = f"{caller()} commit"
        with write(self, *arguments, **options) as tx:
            yield tx
            points.reached(f"{name}:before")
        points.reached(f"{name}:after")

    def watched_put(self, bucket, path, data, **options):
        name = f"{caller()} put {path.rpartition('/')[2]}"
        points.reached(f"{name}:before")
        result = put(self, bucket, path, data, **options)
        points.reached(f"{name}:after")
        return result

    async def watched_put_stream(self, bucket, path, chunks, limit):
        name = f"{caller()} put {path.rpartition('/')[2]}"
        points.reached(f"{name}:before")
        result = await put_stream(self, bucket, path, chunks, limit)
        points.reached(f"{name}:after")
        return result

    def watched_delete(self, bucket, path):
        points.reached(f"{caller()} delete:before")
        result = delete(self, bucket, path)
        points.reached(f"{caller()} delete:after")
        return result

    def watched_delete_folder(self, bucket, prefix, **options):
        points.reached(f"{caller()} delete {bucket}:before")
        result = delete_folder(self, bucket, prefix, **options)
        points.reached(f"{caller()} delete {bucket}:after")
        return result

    Database.write, BlobStore.put = watched_write, watched_put
    BlobStore.delete_folder = watched_delete_folder
    BlobStore.put_stream, BlobStore.delete = watched_put_stream, watched_delete


def kill_at_line(number):
    """Kills this process at the so many-th line of the modules that close rounds, once a round is applied."""
    lines = {module.__file__ for module in (release, iterations, releases, budgets)}
    step = passes._STEPS[passes.IterationStatus.APPLYING]
    left = itertools.count(number, -1)

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in lines:
            return None if frame.f_code.co_filename.startswith("<") else trace
        if event == "line" and next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced(context, iteration):
        outcome = context.jobs._flights.get(iteration.key)
        if outcome is None or outcome.future is None or not outcome.future.done():
            return step(context, iteration)
        sys.settrace(trace)
        try:
            return step(context, iteration)
        finally:
            sys.settrace(None)

    passes._STEPS[passes.IterationStatus.APPLYING] = traced


def serve(order):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(order["environment"])
    watch(Points(order["trace"], order["fault"]))
    line = (order["fault"] or {}).get("line")
    if line:
        kill_at_line(line)
    fast = RetryWindow(0.01, 0.02)
    settings = Settings(
        **{**order["settings"], "data_dir": pathlib.Path(order["settings"]["data_dir"])},
        retry_no_task=fast,
        retry_no_active_task=fast,
    )
    running = fedcompute.app.server(settings, Seeded(order["seeded"]))
    running.run()


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(0)
            try:
                serve(order)
            finally:
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
