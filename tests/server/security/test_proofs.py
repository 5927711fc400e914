"""Whatever a header holds, it is read or refused with a type."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.security.certificates import read_chain
from fedcompute.server.security.enrolment import EnrolmentProof
from fedcompute.server.security.key_description import describe_key
from fedcompute.server.security.proofs import AttestationProof, read_proof

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["enrolment:v1", "AAAA"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_the_two_kinds_of_proof_are_told_apart():
    assert read_proof('["enrolment:v1", "id", "bWFj"]') == EnrolmentProof("id", "bWFj")
    assert read_proof('["AA\\/B", "AAAA"]') == AttestationProof((b"\x00\x0f\xc1", b"\0\0\0"))
    assert read_proof("[]") == AttestationProof(())


@given(st.text() | JSON.map(json.dumps))
def test_every_other_header_is_refused_as_malformed(header):
    with contextlib.suppress(RequestRejected):
        read_proof(header)


@pytest.mark.parametrize("part", ['"\\ud800"', '"\\u0000"', '"' + "x" * 65 + '"', '"\\n"', "1", "null", '"\\u00e9"'])
def test_an_enrolment_whose_parts_are_no_short_texts_is_malformed(part):
    for header in (f'["enrolment:v1", {part}, "bWFj"]', f'["enrolment:v1", "id", {part}]'):
        with pytest.raises(RequestRejected) as refusal:
            read_proof(header)
        assert refusal.value.reason is Reason.MALFORMED_REQUEST


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_damaged_certificates_are_refused_with_a_type(maker, stranger, devices, data):
    chain = _chain(maker)
    damaged = bytearray(chain[0])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        describe_key(read_chain([bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), *chain[1:]]))
    except RequestRejected as refusal:
        assert refusal.reason is Reason.ATTESTATION_MALFORMED


_CHAINS = []


def _chain(maker):
    if not _CHAINS:
        _CHAINS.append(maker.attest(b"c" * 40))
    return _CHAINS[0]
