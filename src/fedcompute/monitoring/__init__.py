"""Metrics readers, plots, and the dashboard; `load_metrics` is what scripts want."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcompute.monitoring.data_frames import load_metrics

__all__ = ["load_metrics"]


def __getattr__(name: str) -> Any:
    # Found when it is asked for: the commands that live in this package's neighbours need none of it.
    if name != "load_metrics":
        raise AttributeError(name)
    from fedcompute.monitoring.data_frames import load_metrics

    return load_metrics
