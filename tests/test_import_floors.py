"""The house of the design: a room imports only rooms on a smaller floor, and TensorFlow lives where it may."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedcompute

ROOT = Path(fedcompute.__file__).parent
FLOORS = {
    "protos": 0, "errors": 0,
    "tensors": 1, "crypto": 1, "tracing": 1,
    "privacy": 2,
    "learning": 3,
    "models": 4, "storage": 4,
    "builder": 5, "device": 5,
    "server": 6,
    "fleet": 7, "monitoring": 7,
    "app": 8,
    "cli": 9,
}  # fmt: skip
WITH_TENSORFLOW = {"models", "builder", "device"}
# Of the server, the module that runs plans with server graphs, and only when there is such a plan.
MODULES_WITH_TENSORFLOW = {
    "server/graph_plans/session.py",
    "fleet/simulation/client_records.py",
    "fleet/simulation/local_training.py",
}
# Too slow for the start of a server or a prompt: imported where they are used.
HEAVY = {
    "tensorflow",
    "keras",
    "dp_accounting",
    "matplotlib",
    "sklearn",
    "h5py",
    "plotly",
    "scipy",
    "opentelemetry",
    "ray",
}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not path.name.endswith("_pb2.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_room_has_a_floor():
    assert {room_of(path) for path in SOURCES} - {"__init__"} <= FLOORS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_smaller_floors(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "fedcompute" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room:
            assert FLOORS[parts[1]] < FLOORS[room], f"{room} imports {name}"
        if parts[0] in {"tensorflow", "keras"}:
            module = path.relative_to(ROOT).as_posix()
            assert room in WITH_TENSORFLOW or module in MODULES_WITH_TENSORFLOW, f"{module} imports {name}"


@pytest.mark.parametrize("module", ["fedcompute.app", "fedcompute.cli", "fedcompute.device", "fedcompute.builder"])
def test_importing_an_entry_point_loads_nothing_heavy(module):
    script = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
