"""Lists of who may do what (spec/device.md 7.11)."""

import pytest

from fedcompute.device.allow_lists import allows, allows_pair

CERTIFICATE = "AB" * 32


@pytest.mark.parametrize(
    ("allow_list", "allowed"),
    [
        ("*", True),
        (" * ", True),
        ("com.example.app", True),
        ("com.other,com.example.app", True),
        ("\tcom.other ,\n com.example.app ", True),
        (f"com.example.app:{CERTIFICATE}", True),
        (f"com.other, com.example.app:{CERTIFICATE}", True),
        ("", False),
        (" ", False),
        (",", False),
        ("com.other", False),
        ("com.example", False),
        ("com.example.app2", False),
        ("com.example.App", False),
        (f"com.example.app:{CERTIFICATE.lower()}", False),
        (f"com.example.app:{'CD' * 32}", False),
        ("com.example.app:", False),
        (f"com.example.app :{CERTIFICATE}", False),
        (f":{CERTIFICATE}", False),
        (CERTIFICATE, False),
        ("com.other,*", False),
        ("*,com.other", False),
        ("com.example.*", False),
        ("com.other;com.example.app", False),
    ],
)
def test_a_list_names_packages_with_or_without_their_certificate(allow_list, allowed):
    assert allows(allow_list, "com.example.app", CERTIFICATE) is allowed


def test_a_package_of_unknown_certificate_is_named_by_its_name_only():
    assert allows("com.example.app", "com.example.app", "")
    assert allows("*", "com.example.app", "")
    assert not allows("com.example.app:", "com.example.app", "")
    assert not allows(f"com.example.app:{CERTIFICATE}", "com.example.app", "")


@pytest.mark.parametrize("allow_list", ["", "*", ",", ":", "com.example.app"])
def test_nobody_is_on_no_list(allow_list):
    assert not allows(allow_list, "", "")


@pytest.mark.parametrize(
    ("pair_list", "allowed"),
    [
        ("com.app;com.service", True),
        ("com.other;com.service, com.app;com.service", True),
        (f"com.app;com.service:{CERTIFICATE}", True),
        (f"com.app:{'CD' * 32};com.service:{CERTIFICATE}", True),
        (" com.app ; com.service ", True),
        ("*", True),
        ("*;com.service", True),
        ("com.app;*", True),
        ("*;*", True),
        ("", False),
        (" ", False),
        (";", False),
        ("com.app", False),
        ("com.app;", False),
        (";com.service", False),
        ("com.service;com.app", False),
        ("com.app;com.other,com.other;com.service", False),
        ("com.app;com.service;com.more", False),
        ("*;com.other", False),
        ("com.other;*", False),
        ("com.other,*", False),
        (f"com.app:{CERTIFICATE};com.service", False),
        (f"com.app;com.service:{'CD' * 32}", False),
    ],
)
def test_a_list_of_pairs_names_both_or_none(pair_list, allowed):
    assert allows_pair(pair_list, ("com.app", "CD" * 32), ("com.service", CERTIFICATE)) is allowed
