"""What canaries prove about epsilon, mechanism by mechanism, beside what is claimed: one training run per line.

    python benchmarks/audit.py [--canaries 7850] [--delta 1e-5] [--confidence 0.95]

Prints one table; asserts nothing about time. Every run trains softmax regression on scikit-learn's digits with the
server's own code and the operating system's noise. "rounds" are those that a canary takes part in; "noise" is the
multiplier that is claimed, "drawn" the share of it that the run really drew: below 1 the mechanism is broken, and the
audit should say so. "claimed" is epsilon by the run's events, without amplification; "at least" its lower bound for
any mechanism, "if Gaussian" the one that assumes a Gaussian release.
"""

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

from fedcompute.cli.privacy_audit import HONEST_DEVICES, Mechanism, audit_digits
from fedcompute.learning.audit import WeakenedNoise
from fedcompute.privacy.noise import SystemNoise


@dataclass(frozen=True)
class Line:
    mechanism: Mechanism
    noise_multiplier: float
    rounds: int
    separation: int = 1
    drawn: float = 1.0


LINES = (
    Line(Mechanism.FIXED_GAUSSIAN, 0.0, 5),
    # What the tutorial's task gets when its noise is calibrated to epsilon 10 over 1000 sampled rounds.
    Line(Mechanism.FIXED_GAUSSIAN, 0.42, 5),
    Line(Mechanism.FIXED_GAUSSIAN, 2.0, 5),
    Line(Mechanism.FIXED_GAUSSIAN, 5.0, 5),
    Line(Mechanism.FIXED_GAUSSIAN, 5.0, 5, drawn=0.1),
    Line(Mechanism.ADAPTIVE_GAUSSIAN, 5.0, 5),
    Line(Mechanism.ADAPTIVE_GAUSSIAN, 5.0, 5, drawn=0.1),
    Line(Mechanism.TREE_AGGREGATION, 12.0, 6),
    Line(Mechanism.TREE_AGGREGATION, 12.0, 6, drawn=0.1),
    Line(Mechanism.TREE_AGGREGATION, 4.0, 8, separation=8),
    Line(Mechanism.ADAPTIVE_TREE, 4.0, 8, separation=8),
    Line(Mechanism.ADAPTIVE_TREE, 4.0, 8, separation=8, drawn=0.1),
    Line(Mechanism.BANDED_MF, 3.0, 8, separation=4),
    Line(Mechanism.BANDED_MF, 3.0, 8, separation=4, drawn=0.1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=7850)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console(width=max(120, Console().width))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    start = time.perf_counter()
    console.print(audit_table(arguments.canaries, arguments.delta, arguments.confidence))
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s in all")
    note = f"{arguments.canaries} canaries, delta {arguments.delta:g}"
    write_rows(arguments.json, [Row("audit", f"{len(LINES)} mechanisms audited", seconds, "s", note=note)])


def audit_table(canaries: int, delta: float, confidence: float) -> Table:
    """Audits every line; a verdict stands where the claim is refuted."""
    table = Table(
        "mechanism", "rounds", "noise", "drawn", "claimed", "at least", "if Gaussian", "right guesses", "accuracy",
        "verdict",
        title=f"{canaries} canaries among {HONEST_DEVICES} devices, delta {delta:g}, confidence {confidence:g}",
    )  # fmt: skip
    for line in LINES:
        result, score = audit_digits(
            line.mechanism,
            line.noise_multiplier,
            line.rounds,
            canaries,
            delta,
            confidence=confidence,
            separation=line.separation,
            noise=WeakenedNoise(SystemNoise(), line.drawn),
        )
        table.add_row(
            line.mechanism, f"{-(-line.rounds // line.separation)} of {line.rounds}", f"{line.noise_multiplier:g}",
            f"{line.drawn:g}", f"{result.claimed_epsilon:.2f}", f"{result.epsilon:.2f}",
            f"{result.gaussian_epsilon:.2f}", f"{result.correct} of {result.guesses}", f"{score:.2f}",
            "refuted" if result.refuted else "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
