"""Keeping TensorFlow off the terminal, where a command's own words belong."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Sends what native code writes to stderr nowhere while the block runs, and keeps TensorFlow off the accelerator.

    Its libraries write there before anything can configure them. TF_CPP_MIN_LOG_LEVEL=0 in the environment lets all
    of it through.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "0":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
