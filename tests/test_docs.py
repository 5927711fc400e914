"""The commands of the documentation, run as printed: `<!-- file: NAME -->`, `<!-- run -->` stand before their blocks.

Ports and the directory /srv are replaced, so that a test needs neither free ports of its own choice nor rights.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedcompute.device.isolation.probe import probe
from fedcompute.server.api.operations import OPERATIONS

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"<!-- (?P<kind>run|file: (?P<name>[\w.]+)) -->\n```\w*\n(?P<text>.*?)\n```", re.DOTALL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture
def shell(tmp_path):
    """`shell(command)` runs a command line; one that ends in `&` goes on until the end of the test."""
    running = []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": tmp_path, "text": True, "env": {**os.environ, "PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}}

    def run(command):
        if command.endswith("&"):
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command[:-1]}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options
            )
            running.append(process)
            assert process.stdout.readline(), f"{command} says nothing"
        else:
            done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, **options)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    yield run
    for process in reversed(running):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    "page", ["task-builder.md", "management-api.md", "storage.md", "operations.md", "devices.md", "simulation.md"]
)
def test_the_commands_of_a_page_work_as_printed(page, shell, tmp_path):
    missing = [one.name for one in probe() if not one.enforced] if page == "devices.md" else []
    if missing:
        pytest.skip(f"this machine does not enforce {', '.join(missing)}, which devices ask for")
    replaced = {port: str(free_port()) for port in ("8080", "5000", "8000")} | {"/srv": str(tmp_path / "srv")}
    (tmp_path / "srv").mkdir()
    blocks = list(BLOCK.finditer((DOCS / page).read_text()))
    assert blocks
    for block in blocks:
        text = block["text"]
        for word, value in replaced.items():
            text = text.replace(word, value)
        if block["name"]:
            (tmp_path / block["name"]).write_text(text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                shell(line[2:].strip())


def test_the_table_of_settings_is_that_of_this_release():
    tool = DOCS.parent / "tools" / "generate_settings.py"
    checked = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_every_management_route_is_in_its_page():
    page = (DOCS / "management-api.md").read_text()
    paths = {operation.path for operation in OPERATIONS if operation.path.startswith("/api/v1/")}
    names = {re.sub(r"/\{\w+\}$", "", path).rsplit("/", 1)[-1] for path in paths}
    assert {name for name in names if not re.search(rf"/{re.escape(name)}[`?/]", page)} == set()
