"""Named tensors: trees of leaves, and the checkpoint files that carry them."""
