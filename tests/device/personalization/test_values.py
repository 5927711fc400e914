"""The best value of an execution: who gets it, and how it is noised."""

import random

import pytest

from fedcompute.device.owner import Owner

OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
CALLER = "org.example.caller"


def valued(bench, value, noise="0.1", seen=True):
    bench.install(f"def on_execute(self, request): return ExecuteOutput(best_value={value})")
    bench.flag("output_data_allow_list", f"{CALLER};{OWNER.package}:{OWNER.certificate_digest}")
    bench.flag("noise_for_execute_best_value", noise)
    bench.flag("platform_data_for_execute_allowlist", OWNER.package if seen else "")


@pytest.mark.parametrize(
    ("pairs", "caller", "maximum", "expected"),
    [
        (f"{CALLER};org.example.app", CALLER, 9, 5),
        (f"a;b, {CALLER};org.example.app:{'AB' * 32}", CALLER, 9, 5),
        ("*", CALLER, 9, 5),
        (f"{CALLER};org.example.app", CALLER, None, -1),
        (f"{CALLER};org.example.app", "org.example.other", 9, -1),
        (f"{CALLER};org.example.app:{'CD' * 32}", CALLER, 9, -1),
        ("", CALLER, 9, -1),
        # Of a service that does not see the device's apps the value passes as it is.
        (f"{CALLER};org.example.app", CALLER, 3, 5),
    ],
)
def test_a_value_reaches_only_apps_on_the_list_of_pairs_that_ask_for_one(bench, pairs, caller, maximum, expected):
    valued(bench, 5, noise="1", seen=False)
    bench.flag("output_data_allow_list", pairs)
    assert bench.execute(maximum, caller).best_value == expected


class Chance(random.Random):
    """Draws `first` where a probability is asked for."""

    def __init__(self, first):
        super().__init__(1)
        self.first = first

    def random(self):
        return self.first


@pytest.mark.parametrize(("first", "noised"), [(0.0999, True), (0.1, False)])
def test_the_value_of_a_service_that_sees_apps_is_noised_with_the_probability_of_the_flag(bench, first, noised):
    valued(bench, 5)
    bench.operations = bench.made(chance=Chance(first))
    assert (bench.execute(9).best_value != 5) == noised


@pytest.mark.parametrize(
    ("value", "maximum", "others"),
    [(1, 3, {0, 2}), (3, 3, {0, 1, 2}), (0, 2, {1}), (0, 1, {0}), (0, 0, {0}), (1, 1, {0}), (4, 3, {-1})],
)
def test_noise_draws_from_the_other_values_below_the_maximum(bench, value, maximum, others):
    valued(bench, value, noise="1")
    bench.operations = bench.made(chance=random.Random(4))
    drawn = {bench.execute(maximum).best_value for _ in range(8 if len(others) > 1 else 2)}
    assert drawn == others


def test_the_largest_value_is_bounded_by_its_flag_and_a_large_bound_takes_no_memory(bench):
    valued(bench, 5, noise="1")
    for maximum in (-1, 101):
        with pytest.raises(ValueError, match="not 0 to 100"):
            bench.execute(maximum)
    bench.flag("max_int_values_limit", (1 << 31) - 1)
    assert 0 <= bench.execute((1 << 31) - 1).best_value < (1 << 31) - 1
