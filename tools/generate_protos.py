"""Generates the Python code of every message in `fedcompute/protos`, or checks that it is fresh.

python tools/generate_protos.py          # write *_pb2.py and *_pb2.pyi beside the sources
python tools/generate_protos.py --check  # exit 1 and name the files that differ
"""

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

SOURCE_ROOT = Path(__file__).resolve().parent.parent / "src"
PACKAGE = Path("fedcompute/protos")


def generate(target: Path) -> list[Path]:
    """Writes the generated modules below `target` and returns their paths relative to it."""
    sources = sorted((SOURCE_ROOT / PACKAGE).glob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{SOURCE_ROOT}",
            f"-I{well_known}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            *(str(PACKAGE / source.name) for source in sources),
        ]
    )
    if status != 0:
        sys.exit(status)
    return sorted(PACKAGE / f"{source.stem}_pb2{suffix}" for source in sources for suffix in (".py", ".pyi"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    if not arguments.check:
        for path in generate(SOURCE_ROOT):
            print(f"wrote {path}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        stale = [
            path
            for path in generate(Path(scratch))
            if not (SOURCE_ROOT / path).is_file()
            or (SOURCE_ROOT / path).read_bytes() != (Path(scratch) / path).read_bytes()
        ]
    for path in stale:
        print(f"stale: {path} (run `python tools/generate_protos.py`)")
    sys.exit(1 if stale else 0)


if __name__ == "__main__":
    main()
