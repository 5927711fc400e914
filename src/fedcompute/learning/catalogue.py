"""Every kind of aggregation, by the name of its member in the process's oneof."""

from collections.abc import Mapping

from fedcompute.learning.adaptive_aggregator import ADAPTIVE_GAUSSIAN
from fedcompute.learning.aggregators import FIXED_GAUSSIAN, UNIFORM_MEAN, WEIGHTED_MEAN, Aggregator, Process
from fedcompute.learning.banded_aggregator import BANDED_MF
from fedcompute.learning.tree_aggregators import ADAPTIVE_TREE, TREE_AGGREGATION

AGGREGATORS: Mapping[str, Aggregator] = {
    "uniform_mean": UNIFORM_MEAN,
    "weighted_mean": WEIGHTED_MEAN,
    "fixed_gaussian": FIXED_GAUSSIAN,
    "adaptive_gaussian": ADAPTIVE_GAUSSIAN,
    "tree_aggregation": TREE_AGGREGATION,
    "adaptive_tree": ADAPTIVE_TREE,
    "banded_mf": BANDED_MF,
}


def aggregator_of(process: Process) -> Aggregator:
    """The entry of a validated process."""
    return AGGREGATORS[str(process.WhichOneof("aggregator"))]
