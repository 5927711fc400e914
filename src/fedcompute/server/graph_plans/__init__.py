"""Plans of the reference: their server half is TensorFlow graphs, run here (spec/artifacts.md 6, 7)."""
