from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

NUMERIC = [
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16),
]
NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\1/ab\x7f\x80ÿ"), max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(SHAPES)
    size = int(np.prod(shape))
    if draw(st.integers(0, 4)) == 0:
        elements = draw(st.lists(st.binary(max_size=200) | st.just(b"\0"), min_size=size, max_size=size))
        return np.fromiter(elements, dtype=object, count=size).reshape(shape)
    dtype = np.dtype(draw(st.sampled_from(NUMERIC)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(dtype)
    if draw(st.booleans()):
        # Every bit pattern: extremes, infinities, NaNs with payloads.
        return np.frombuffer(random.bytes(size * dtype.itemsize), dtype).reshape(shape)
    return random.integers(0, 300, shape).astype(dtype)


@pytest.fixture(scope="session")
def trees() -> st.SearchStrategy[dict[str, np.ndarray]]:
    """Random named tensors: odd names, ranks 0 to 4, empty dimensions, every type that SaveSlices takes from NumPy."""
    return st.dictionaries(NAMES, arrays(), max_size=20)


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Mapping[str, Any], Mapping[str, Any]], None]:
    """Same names, shapes, dtypes and bits."""

    def check(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            assert actual[name].dtype == value.dtype, name
            if value.dtype == object:
                assert actual[name].tolist() == value.tolist(), name
            else:
                assert actual[name].tobytes() == value.tobytes(), name

    return check
