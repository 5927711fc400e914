"""Writes docs/plan-operations.md, the operations that a device of this package runs, or checks that it is fresh.

python tools/generate_op_coverage.py          # write the page
python tools/generate_op_coverage.py --check  # exit 1 if it differs
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tensorflow.lite.python import schema_py_generated as schema

from fedcompute.builder.op_check import supported_ops
from fedcompute.device.plans.op_rules import EXTERNAL_DATASET, FILE_OPS, LISTED, runs_builtin, runs_flex

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan-operations.md"
# Why a builtin operation is refused: the first pattern that fits its whole name.
REFUSED = (
    (r"STABLEHLO_\w+|REDUCE_WINDOW|DILATE|DYNAMIC_UPDATE_SLICE", "StableHLO's, and TensorFlow has no kernel for them"),
    (r"(DE)?QUANTIZE|FAKE_QUANT|DENSIFY", "of quantized or compressed models, which do not train"),
    (r"\w*(LSTM|RNN)|SVDF", "recurrent layers in one piece, which have no gradient; the converter writes them out"),
    (
        r"(ASSIGN|READ)_VARIABLE|VAR_HANDLE|CALL_ONCE|HASHTABLE\w*",
        "state beside the graph; a plan keeps all of it in checkpoints",
    ),
    (r"CUSTOM|DELEGATE|CALL|PLACEHOLDER_\w+", "no operations: they stand for code that a plan does not carry"),
    (r"NON_MAX_SUPPRESSION_V\d", "picks boxes behind a detector, has no gradient"),
    (
        r"CONCAT_EMBEDDINGS|EMBEDDING_LOOKUP_SPARSE|L2_POOL_2D|LSH_PROJECTION|SKIP_GRAM",
        "of older formats; converters no longer write them",
    ),
)
FAMILY = "STABLEHLO_"
TEXT = """\
# Operations of client plans

<!-- tools/generate_op_coverage.py writes this page -->

A device of this package runs the flatbuffer that phones run, rebuilt as a TensorFlow graph. Every operation of a plan
is looked at before anything of it runs. A plan with operations that do not run here is refused as `ops_not_supported`,
with all their names. The plans of the reference's task builder have none.

## TFLite's builtin operations

{run} of the {all} that the format has run here. A test compares each with TFLite's own interpreter, those that draw
random numbers with the moments of their distribution. Quantized tensors are refused whatever the operation.

{builtins}

Refused:

| operations | why |
|---|---|
{refused}

## TensorFlow operations

On the list of the published client, which the task builder checks plans against:

| operation | from client version | here |
|---|---|---|
{listed}

Any other TensorFlow operation (`Flex...` in the flatbuffer) runs if TensorFlow's registry describes it as a function of
plain tensors, without state, handles, functions, file names or addresses, and if it has a kernel for processors. Of the
rest, these run, because what they touch belongs to the run:

{own}

Everything else is refused: it could read or write files, speak to other machines, call Python, or stay behind.
"""


def page() -> str:
    """The page of this release. Exits if a refused operation has no reason."""
    names = sorted(name for name in vars(schema.BuiltinOperator) if not name.startswith("_"))
    run = [name for name in names if runs_builtin(name)]
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name not in run:
            reasons.setdefault(reason(name), []).append(name)
    order = [why for _, why in REFUSED if why in reasons]
    versions = supported_ops()
    listed = [
        f"| `{op}` | {version} | {here(op)} |"
        for op, version in sorted(versions.items(), key=lambda item: item[0].lower())
    ]
    return TEXT.format(
        run=len(run),
        all=len(names),
        builtins=wrapped(run),
        refused="\n".join(f"| {named(reasons[why])} | {why} |" for why in order),
        listed="\n".join(listed),
        own=wrapped(sorted(LISTED - versions.keys())),
    )


def reason(name: str) -> str:
    for pattern, why in REFUSED:
        if re.fullmatch(pattern, name):
            return why
    sys.exit(f"{name} is refused; add to {Path(__file__).name} why")


def named(refused: Sequence[str]) -> str:
    """The names of one row, a large family as one."""
    family = sum(name.startswith(FAMILY) for name in refused)
    names = [f"`{name}`" for name in refused if not name.startswith(FAMILY)]
    return ", ".join([*names, f"all {family} `{FAMILY}...`"] if family else names)


def here(op: str) -> str:
    """What becomes of an operation of the published client's list."""
    if not runs_flex(op):
        return "refused"
    if op == EXTERNAL_DATASET:
        return "runs: the examples of the run"
    return "runs: on the run's own files" if op in FILE_OPS else "runs"


def wrapped(names: Sequence[str]) -> str:
    """The names in lines of at most 120 characters."""
    lines = [""]
    for name in names:
        word = f"`{name}`" + ("," if name != names[-1] else "")
        if len(lines[-1]) + 1 + len(word) > 120:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        fresh = PAGE.is_file() and PAGE.read_text() == page()
        sys.exit(None if fresh else f"{PAGE.name} is stale: run python tools/generate_op_coverage.py")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
