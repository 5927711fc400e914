"""What is reported, and what still holds, where a kernel lacks a mechanism.

Such a kernel is this one behind a filter that refuses the system call, which no process can tell from the real thing.
"""

import os
import re
import sys

import pytest

from fedcompute.device.isolation import landlock
from fedcompute.device.isolation.probe import probe
from fedcompute.device.isolation.sandbox import RESTRICTIONS, Restriction, require
from fedcompute.errors import OperationFailed, Reason

REFUSING_KERNEL = """
def refuse(number, code, first=None):
    program = [(0x20, 0, 0, 0), (0x15, 0, 3 if first else 1, number)]
    if first:
        program += [(0x20, 0, 0, 16), (0x15, 0, 1, first)]
    privileges.renounce()
    seccomp.install([*program, (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)])

refuse({number}, {code}, {first})
"""
PRCTL, UNSHARE = (167, 97) if os.uname().machine == "aarch64" else (157, 272)
SOCKET = "import socket; socket.socket()"


@pytest.mark.parametrize(
    ("kernel", "unenforced", "said"),
    [
        ({"number": 444, "code": 38, "first": None}, {"files"}, "landlock: Function not implemented"),
        ({"number": 444, "code": 95, "first": None}, {"files"}, "landlock: Operation not supported"),
        (
            {"number": PRCTL, "code": 22, "first": 22},
            RESTRICTIONS.keys() - {"signals", "privileges", "file_size"},
            "seccomp: Invalid argument",
        ),
    ],
    ids=["without Landlock", "with Landlock switched off", "without seccomp"],
)
def test_a_kernel_that_lacks_a_mechanism_is_reported_and_refused_in_strict_mode(
    sandbox, needs, kernel, unenforced, said
):
    needs(*RESTRICTIONS)
    outcome = sandbox.run("return 1", before=REFUSING_KERNEL.format(**kernel))
    assert {restriction.name for restriction in outcome.report if not restriction.enforced} == unenforced
    assert said in outcome.by_name("files").why
    with pytest.raises(OperationFailed, match=re.escape(said)) as refused:
        require(outcome.report)
    assert refused.value.reason is Reason.ISOLATION_UNAVAILABLE
    assert "--isolation report" in refused.value.remedy
    assert all(name in refused.value.detail for name in unenforced)


@pytest.mark.parametrize("attempt", [SOCKET, "os.fork() or os._exit(0)", "os.kill(given['parent'], 0)"])
def test_what_is_left_holds_on_a_kernel_without_landlock(sandbox, needs, attempt):
    needs("network", "processes", "signals")
    before = REFUSING_KERNEL.format(number=444, code=38, first=None)
    assert sandbox.run(attempt, before=before).refused == "PermissionError"


@pytest.mark.parametrize("attempt", ["open(given['private'] + '/file')", "open(given['data'] + '/new', 'w')"])
def test_files_are_out_of_reach_on_a_kernel_without_seccomp(sandbox, needs, attempt):
    needs("files")
    before = REFUSING_KERNEL.format(number=PRCTL, code=22, first=22)
    assert sandbox.run(attempt, before=before).refused == "PermissionError"


def test_landlock_alone_keeps_signals_in_where_it_can(sandbox, needs):
    needs("signals")
    outcome = sandbox.run("os.kill(given['parent'], 0)", before=REFUSING_KERNEL.format(number=PRCTL, code=22, first=22))
    assert (outcome.refused == "PermissionError") is outcome.by_name("signals").enforced


def test_without_namespaces_the_network_is_still_out_of_reach(sandbox, needs):
    needs("network")
    before = REFUSING_KERNEL.format(number=UNSHARE, code=1, first=None)
    outcome = sandbox.run(SOCKET, before=before)
    network = outcome.by_name("network")
    assert (network.enforced, network.why) == (True, "network namespace: Operation not permitted")
    assert outcome.refused == "PermissionError"


def test_the_oldest_landlock_lets_no_reader_cut_a_file(sandbox, needs):
    needs("files")
    first_abi = """
    def confine():
        rules = landlock.ruleset(1, [landlock.Grant(Path(given["data"]), landlock.READ)])
        privileges.renounce()
        landlock.enforce(rules)
        seccomp.confine()
        return []
    """
    for attempt in ("os.open(given['data'] + '/file', os.O_TRUNC)", "os.truncate(given['data'] + '/file', 0)"):
        assert sandbox.run(attempt, before=first_abi).refused == "PermissionError"
    assert (sandbox.data / "file").read_text() == "kept"


def test_the_oldest_landlock_is_asked_for_nothing_that_it_does_not_know():
    assert landlock.handled(1) == (0x1FFF, 0, 0)
    assert landlock.handled(3) == (0x7FFF, 0, 0)
    assert landlock.handled(4) == (0x7FFF, 3, 0)
    assert landlock.handled(6) == (0xFFFF, 3, 3)


def test_a_system_without_the_mechanisms_reports_that_and_goes_on(sandbox):
    # The test machines run Linux; only the name of the system is pretended.
    outcome = sandbox.run("return os.listdir('/') != []", before="sys.platform = 'darwin'")
    assert outcome.did is True
    why = "darwin has no such mechanism"
    assert outcome.report == [Restriction(name, False, (), why) for name in RESTRICTIONS]
    with pytest.raises(OperationFailed, match="9 restrictions are not enforced"):
        require(outcome.report)


def test_the_probe_reports_every_restriction_and_is_asked_once():
    report = probe()
    assert [restriction.name for restriction in report] == list(RESTRICTIONS)
    assert probe() is report
    assert all(restriction.enforced or restriction.why for restriction in report)


def test_a_probe_that_cannot_run_reports_that_nothing_holds(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = probe.__wrapped__()
    assert not any(restriction.enforced for restriction in report)
    assert "the probe failed with status 1" in report[0].why
