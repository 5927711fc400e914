"""Metrics readers, plots, and the dashboard; `load_metrics` is what scripts want."""

from fedcompute.monitoring.data_frames import load_metrics

__all__ = ["load_metrics"]
