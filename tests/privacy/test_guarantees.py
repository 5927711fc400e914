"""Every public function of the room says what it guarantees, or that it guarantees nothing of its own."""

import importlib
import inspect
import pkgutil

import pytest

from fedcompute import privacy

MODULES = [
    importlib.import_module(f"fedcompute.privacy.{found.name}") for found in pkgutil.iter_modules(privacy.__path__)
]
FUNCTIONS = [
    pytest.param(function, id=f"{module.__name__.rsplit('.', 1)[1]}.{name}")
    for module in MODULES
    # Remembered functions are wrapped.
    for name, function in inspect.getmembers(module, lambda one: inspect.isfunction(inspect.unwrap(one)))
    if function.__module__ == module.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_public_function_of_privacy_states_its_formal_guarantees(function):
    assert "Formal guarantees:" in inspect.getdoc(function)
