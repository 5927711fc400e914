import uuid

import pytest

from fedcompute.errors import FedComputeError
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.security import rates
from fedcompute.server.security.rates import Rate, client_address, read_networks

Answer = task_assignments_pb2.CreateTaskAssignmentResponse
PROXIES = read_networks("10.0.0.0/8, 192.0.2.7, 2001:db8::/32")


def requests(rate, count, caller="a", now=0.0):
    return [rate.allow(caller, str(uuid.uuid4()), now) for _ in range(count)]


def test_a_caller_saves_ten_seconds_of_turns_and_earns_the_next_ones():
    rate = Rate(2.0)
    assert requests(rate, 21) == [True] * 20 + [False]
    assert requests(rate, 2, now=0.5) == [True, False]
    assert requests(rate, 21, now=1000.0) == [True] * 20 + [False]


def test_callers_do_not_share_their_turns():
    rate = Rate(0.1)
    assert requests(rate, 2, "a") == [True, False]
    assert requests(rate, 2, "b") == [True, False]


def test_no_rate_is_no_limit_and_remembers_nothing():
    rate = Rate(0.0)
    assert all(requests(rate, 100))
    assert not rate._buckets


def test_three_attempts_are_one_turn_and_a_fourth_is_another():
    rate = Rate(0.1)
    assert [rate.allow("a", "same", 0.0) for _ in range(4)] == [True, True, True, False]


def test_attempts_of_a_refused_request_are_refused_although_a_turn_has_come_free():
    rate = Rate(0.1)
    assert rate.allow("a", "first", 0.0)
    assert [rate.allow("a", "second", now) for now in (0.0, 11.0, 11.0)] == [False] * 3
    assert rate.allow("a", "third", 11.0)


def test_an_attempt_after_the_span_of_attempts_is_a_request_of_its_own():
    rate = Rate(0.001)
    assert rate.allow("a", "same", 0.0)
    assert rate.allow("a", "same", rates.ATTEMPTS_SPAN_S - 1)
    assert not rate.allow("a", "same", rates.ATTEMPTS_SPAN_S + 1)


def test_the_same_request_of_two_callers_is_two():
    rate = Rate(0.1)
    assert rate.allow("a", "same", 0.0)
    assert requests(rate, 1, "b") == [True]
    assert not rate.allow("b", "same", 0.0)


def test_memory_is_bounded_whoever_comes(monkeypatch):
    monkeypatch.setattr(rates, "MEMORY", 100)
    rate = Rate(1.0)
    for number in range(1000):
        rate.allow(str(number), "x" * 10_000, 0.0)
    assert len(rate._buckets) == len(rate._attempts) == 100
    assert max(len(key) for key in rate._attempts) == 16


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("198.51.100.1", [], "198.51.100.1"),
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        ("10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.1.1.1", ["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        ("10.1.1.1", ["6.6.6.6", "203.0.113.9, 192.0.2.7"], "203.0.113.9"),
        ("10.1.1.1", ["10.2.2.2"], "10.2.2.2"),
        ("10.1.1.1", ["not an address"], "10.1.1.1"),
        ("10.1.1.1", ["6.6.6.6, , 10.3.3.3"], "10.3.3.3"),
        ("::ffff:10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        ("2001:db8::1", ["2a02:1:2:3:4:5:6:7"], "2a02:1:2:3::/64"),
        ("unix", ["203.0.113.9"], "unix"),
        ("", [], ""),
    ],
)
def test_only_trusted_proxies_say_whom_they_speak_for(peer, forwarded, expected):
    assert client_address(peer, forwarded, PROXIES) == expected


def reason(response):
    assert response.status_code == 200, response.text
    return Answer.FromString(response.content).rejection_info.reason


def test_too_many_check_ins_of_one_address_are_told_to_come_back_and_their_repetitions_are_not_counted(
    run_server, hand_made
):
    api = run_server(check_ins_per_address=0.1).api
    api.open_task("rated", hand_made.process_of())
    headers = {"odp-idempotency-key": "1 - a"}
    first = [api.check_in("rated", headers=headers) for _ in range(3)]
    assert [one.status_code for one in first] == [201] * 3
    assert len({one.content.split(b"?")[0] for one in first}) == 1
    assert reason(api.check_in("rated")) == federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE


@pytest.fixture
def behind_proxy(run_server, hand_made):
    """Servers behind a proxy on this machine, where operators need keys, with a task that was opened before."""

    def start(population, **rates):
        first = run_server()
        first.api.open_task(population, hand_made.process_of())
        first.stop()
        return run_server(trusted_proxies="127.0.0.1, ::1", **rates).api

    return start


def test_an_owner_has_its_own_limit_across_addresses(behind_proxy):
    api = behind_proxy("owned", check_ins_per_owner=0.1)

    def check_in(owner, address):
        key = f"1 - {uuid.uuid4()}"
        named = {"odp-idempotency-key": key, "fcp-owner-id-digest": owner, "x-forwarded-for": address}
        return api.check_in("owned", headers=named).status_code

    assert check_in("app/one-AB", "203.0.113.1") == 201
    assert check_in("app/one-AB", "203.0.113.2") == 200
    assert check_in("app/two-AB", "203.0.113.2") == 201


def test_addresses_behind_a_trusted_proxy_are_told_apart_and_others_are_not_believed(behind_proxy):
    api = behind_proxy("proxied", check_ins_per_address=0.1)
    statuses = [
        api.check_in("proxied", headers={"odp-idempotency-key": f"1 - {uuid.uuid4()}", "x-forwarded-for": address})
        for address in ("203.0.113.1", "203.0.113.1", "203.0.113.2", "6.6.6.6, 203.0.113.2")
    ]
    assert [one.status_code for one in statuses] == [201, 200, 201, 200]


def test_a_proxy_that_is_no_network_is_refused_at_the_start(hand_made, tmp_path):
    with pytest.raises(FedComputeError, match="trusted_proxies"):
        hand_made.settings_of(tmp_path, trusted_proxies="10.0.0.0/8, nearby")
