import pytest

from fedcompute.crypto.sealing import place, sealer_of
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason

SECRET, OTHER = b"a" * 32, b"b" * 32
HERE = place("enrolment", "phone")


def test_a_value_opens_with_its_secret_at_its_place_only():
    sealer = sealer_of(SECRET)
    sealed, sealed_with = sealer.seal(HERE, b"value")
    assert b"value" not in sealed
    assert sealer.open(HERE, sealed, sealed_with) == b"value"
    assert sealer_of(SECRET + b"\n").open(HERE, sealed, sealed_with) == b"value"
    for context, value in ((place("enrolment", "tablet"), sealed), (place("api_key", "phone"), sealed), (HERE, b"")):
        with pytest.raises(ArtifactInvalid) as raised:
            sealer.open(context, value, sealed_with)
        assert raised.value.reason is Reason.SECRET_UNREADABLE
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(ArtifactInvalid):
            sealer.open(HERE, bytes(changed), sealed_with)


def test_a_value_under_another_secret_is_refused_with_both_ids_and_what_to_do():
    sealed, sealed_with = sealer_of(SECRET).seal(HERE, b"value")
    other = sealer_of(OTHER)
    with pytest.raises(ArtifactInvalid) as raised:
        other.open(HERE, sealed, sealed_with)
    assert raised.value.reason is Reason.SECRET_UNREADABLE
    assert sealed_with in raised.value.detail
    assert other.id in raised.value.detail
    assert "secret" in raised.value.remedy
    # The id alone opens nothing either.
    with pytest.raises(ArtifactInvalid):
        other.open(HERE, sealed, other.id)


def test_a_value_in_plain_is_refused():
    with pytest.raises(ArtifactInvalid) as raised:
        sealer_of(SECRET).open(HERE, b"value", None)
    assert "plain" in raised.value.detail


def test_two_seals_of_one_value_differ_and_the_key_does_not_show_in_print():
    sealer = sealer_of(SECRET)
    assert sealer.seal(HERE, b"value") != sealer.seal(HERE, b"value")
    assert repr(sealer.key) not in repr(sealer)
    assert sealer.id in repr(sealer)


def test_the_id_names_a_secret_and_is_no_part_of_its_key():
    first, again, other = sealer_of(SECRET), sealer_of(SECRET), sealer_of(OTHER)
    assert first == again
    assert first.id != other.id
    assert bytes.fromhex(first.id) not in first.key


@pytest.mark.parametrize("secret", [b"", b"short", b" " * 40, b"a" * 5000, b"CHANGE-ME-to-32-random-bytes-in-base64"])
def test_a_secret_that_is_too_short_too_long_or_a_placeholder_is_refused(secret):
    with pytest.raises(OperationFailed) as raised:
        sealer_of(secret)
    assert raised.value.reason is Reason.SETTINGS_INVALID
