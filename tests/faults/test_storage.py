"""Storage that fails for a while: a database that is gone, a disk that is full, a store that answers 500."""

import subprocess
import threading
import time

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB; making one takes rights that not every machine gives."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def durable_url(postgresql_url):
    """A database that keeps what it committed when its server is killed; those of other tests need not."""
    return f"{postgresql_url}&options=-c%20synchronous_commit%3Don"


def later(seconds, work):
    thread = threading.Timer(seconds, work)
    thread.start()
    return thread


def test_a_database_that_is_down_for_ten_seconds_costs_time_and_nothing_else(
    start, connect, undisturbed, postgresql, durable_url
):
    server = start(database_url=durable_url)
    client = connect(server)
    task_id = client.open_task()
    client.contribute(0.1)
    with postgresql.down():
        time.sleep(10)
    for value in (0.11, 0.12):
        client.contribute(value)
    client.wait(task_id, lambda found: found["iterations"][0]["status"] == "COMPLETED")
    for device in range(3):
        client.contribute(0.2 + 0.01 * device)
    assert client.outcome(task_id) == undisturbed[0]
    assert server.starts == 1


def test_a_database_that_goes_down_again_and_again_while_rounds_run_loses_nothing(
    start, connect, undisturbed, postgresql, durable_url
):
    server = start(database_url=durable_url)
    over = threading.Event()

    def disturb():
        while not over.wait(1.0):
            with postgresql.down():
                over.wait(0.5)

    trouble = threading.Thread(target=disturb)
    trouble.start()
    try:
        outcome = connect(server).run()
    finally:
        over.set()
        trouble.join()
    assert outcome == undisturbed[0]
    assert server.starts == 1


def test_a_full_disk_costs_time_and_nothing_else(start, connect, undisturbed, small_disk):
    server = start(data_dir=str(small_disk / "data"))
    client = connect(server)
    task_id = client.open_task()
    client.contribute(0.1)
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    fill()
    again = later(4, ballast.unlink)
    # Its check-in, its report or its upload meets the full disk, and is repeated.
    for value in (0.11, 0.12):
        client.contribute(value)
    again.join()
    client.wait(task_id, lambda found: found["iterations"][0]["status"] == "COMPLETED")
    for device in range(3):
        client.contribute(0.2 + 0.01 * device)
    assert client.outcome(task_id) == undisturbed[0]
    assert server.starts == 1


def test_a_blob_store_that_answers_500_at_random_costs_time_and_nothing_else(start, connect, undisturbed, s3):
    server = start(environment=s3.environment(), blob_url=f"s3://{s3.bucket()}/fc")
    client = connect(server)
    task_id = client.open_task()
    s3.failure_rate = 0.2
    for number in (1, 2):
        for device in range(3):
            client.contribute(0.1 * number + 0.01 * device)
        client.wait(task_id, lambda found, n=number: sum(1 for one in found["iterations"] if one["completed"]) >= n)
    s3.failure_rate = 0.0
    assert client.outcome(task_id) == undisturbed[0]
