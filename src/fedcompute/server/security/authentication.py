"""Who may check in and report: the decisions about devices, without HTTP (spec/server.md 3.2)."""

import hmac
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from fedcompute.crypto.sealing import Sealer
from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.server.security.attestation import DevicePolicy, LocalVerifier, read_packages, read_roots
from fedcompute.server.security.attestation_service import AttestationService, read_service_key
from fedcompute.server.security.challenges import Subject, challenge_for, is_open, open_challenges
from fedcompute.server.security.enrolment import EnrolmentProof, proves
from fedcompute.server.security.operators import is_loopback
from fedcompute.server.security.proofs import AttestationProof, Proof, read_proof
from fedcompute.server.security.revocation import RevocationList
from fedcompute.server.security.tokens import TOKEN_LIFE, is_token, owner_hash, token_hash
from fedcompute.server.settings import Settings
from fedcompute.storage import tokens
from fedcompute.storage.assignments import AssignmentRow, rebind_session
from fedcompute.storage.database import Database, Transaction
from fedcompute.storage.enrolments import enrolment_secret

_LOG = logging.getLogger(__name__)
_WRITE_S = 8.0


@dataclass(frozen=True)
class Credentials:
    """What a request shows: its token and its proof, both as the headers have them, None if missing.

    `name`: what the attempts of one request have in common. `may_be_challenged()`: whether the device has not been
    challenged too often.
    """

    token: str | None = field(repr=False)
    proof: str | None = field(repr=False)
    name: str | None = None
    may_be_challenged: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Admitted:
    """A device that may go on, with the hash of its token, and its enrolment if it has one."""

    token_hash: str | None = field(default=None, repr=False)
    participant: str | None = None


@dataclass(frozen=True)
class Challenged:
    """A device that must prove itself first."""

    challenge: bytes = field(repr=False)


@dataclass(frozen=True)
class Refused:
    """A device whose proof was judged bad."""

    reason: Reason


@dataclass(frozen=True)
class Unavailable:
    """A device that nobody could judge: the service failed while it made a challenge, or while it verified a proof."""

    verifying: bool


@dataclass(frozen=True)
class TooOften:
    """A device that would have to be challenged once too often."""


Decision = Admitted | Challenged | Refused | Unavailable | TooOften


class Counts:
    """How often each thing was decided since the start, refusals by reason and failures apart; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def __call__(self, decision: str) -> None:
        with self._lock:
            self._counts[decision] += 1

    def all(self) -> dict[str, int]:
        """Every decision that was ever made and its number."""
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True)
class Authentication:
    """Decides for one server. `takes_enrolments`: whether enrolled devices are taken; `attestation`: who judges
    attestations, None if attested devices are not taken. `challenge_key`: the server's secret of its challenges.
    """

    database: Database
    sealer: Sealer
    challenge_key: bytes = field(repr=False)
    takes_enrolments: bool
    attestation: LocalVerifier | AttestationService | None
    counts: Counts = field(default_factory=Counts)

    def close(self) -> None:
        """Closes connections to a service."""
        if isinstance(self.attestation, AttestationService):
            self.attestation.close()

    def check_in(self, shown: Credentials, population: str, owner_digest: str, now: datetime) -> Decision:
        """Decides on a check-in; blocks. Raises RequestRejected(MALFORMED_REQUEST) for a proof or token of no form.

        Formal guarantees: ADMITTED only with a token that is live and bound to this owner, or with one that a proof in
        this request has earned for this owner: an attestation that no token was granted for before, or the MAC of a
        live enrolment over this token and an open challenge for this owner and population.
        """
        owner = owner_hash(owner_digest)
        if shown.token is not None and is_token(shown.token):
            with self.database.read() as tx:
                known = self._live(tx, token_hash(shown.token), now)
            if known is not None and hmac.compare_digest(known.owner_hash, owner):
                return self._counted(Admitted(known.token_hash, known.participant))
        return self._counted(self._prove(shown, ("check-in", population, owner_digest), owner, None, now))

    def report(
        self, shown: Credentials, session_id: str, session: AssignmentRow | None, *, failed: bool, now: datetime
    ) -> Decision:
        """Decides on a report about `session`, None if it is unknown; `failed` says that it reports a failure. Blocks.

        Raises RequestRejected(MALFORMED_REQUEST) for a proof or token of no form.

        Formal guarantees: ADMITTED for a known session only with its own token while that is live, or with a token
        that a proof in this request has earned, by the same enrolment if the session has one; the session is bound to
        that token from then on. A failure may also be reported with the session's own expired token, or without any
        once that has expired: it can cost the session, which nobody can do to a session whose token lives. A session
        that was assigned while devices did not have to authenticate has its random id as its only secret. An unknown
        session grants nothing.
        """
        given = token_hash(shown.token) if shown.token is not None and is_token(shown.token) else None
        with self.database.read() as tx:
            known = None if given is None else self._live(tx, given, now)
            bound = None if session is None or session.token_hash is None else session.token_hash
            own = None if bound is None else tokens.find_token(tx, bound)
        if session is None:
            if known is not None:
                return self._counted(Admitted(known.token_hash, known.participant))
            return self._counted(self._prove(shown, ("report", session_id), None, None, now))
        if bound is None:
            return self._counted(Admitted())
        is_own = given is not None and hmac.compare_digest(given, bound)
        if is_own and (known is not None or failed):
            return self._counted(Admitted(bound, session.participant))
        if failed and given is None and (own is None or own.expires <= now):
            return self._counted(Admitted(bound, session.participant))
        owner = None if own is None else own.owner_hash
        return self._counted(self._prove(shown, ("report", session_id), owner, session, now))

    def _live(self, tx: Transaction, hashed: str, now: datetime) -> tokens.TokenRow | None:
        found = tokens.live_token(tx, hashed, now)
        if found is None:
            return None
        # What was granted before the operator decided otherwise counts no more than a new proof would.
        is_taken = self.attestation is not None if found.participant is None else self.takes_enrolments
        return found if is_taken else None

    def _prove(
        self, shown: Credentials, subject: Subject, owner: str | None, session: AssignmentRow | None, now: datetime
    ) -> Decision:
        if shown.proof is None or shown.token is None:
            return self._challenge(shown, subject, now)
        if not is_token(shown.token):
            raise RequestRejected(
                Reason.MALFORMED_REQUEST,
                "odp-authorization-key is no token of 16 to 64 characters",
                remedy="send a random UUID",
            )
        proof = read_proof(shown.proof)
        try:
            participant, earned_by = self._verify(proof, shown.token, subject, now)
            return self._grant(shown.token, owner, participant, earned_by, session, now)
        except RequestRejected as error:
            _LOG.info("a device is refused: %s", error)
            return Refused(error.reason)
        except OperationFailed as error:
            if error.reason is not Reason.ATTESTATION_UNAVAILABLE:
                raise
            _LOG.error("a device cannot be judged: %s", error)
            return Unavailable(verifying=True)

    def _challenge(self, shown: Credentials, subject: Subject, now: datetime) -> Decision:
        if not shown.may_be_challenged():
            return TooOften()
        if not isinstance(self.attestation, AttestationService):
            return Challenged(challenge_for(self.challenge_key, subject, now))
        try:
            return Challenged(self.attestation.challenge(None if shown.name is None else repr((subject, shown.name))))
        except OperationFailed as error:
            _LOG.error("a device cannot be challenged: %s", error)
            return Unavailable(verifying=False)

    def _verify(self, proof: Proof, token: str, subject: Subject, now: datetime) -> tuple[str | None, str]:
        """Returns the enrolment that proves itself, None for an attestation, and the hash of the proof."""
        if isinstance(proof, EnrolmentProof):
            return self._verify_enrolment(proof, token, subject, now)
        return None, self._verify_attestation(proof, subject, now)

    def _verify_enrolment(
        self, proof: EnrolmentProof, token: str, subject: Subject, now: datetime
    ) -> tuple[str | None, str]:
        if not self.takes_enrolments:
            raise RequestRejected(Reason.PROOF_NOT_TAKEN, "enrolments are not taken")
        with self.database.read() as tx:
            secret = enrolment_secret(tx, self.sealer, proof.enrolment_id)
        if not proves(secret, proof, open_challenges(self.challenge_key, subject, now), token):
            raise RequestRejected(Reason.ENROLMENT_REFUSED, "no live enrolment has answered an open challenge")
        return proof.enrolment_id, token_hash(f"{proof.enrolment_id}/{proof.mac}")

    def _verify_attestation(self, proof: AttestationProof, subject: Subject, now: datetime) -> str:
        if self.attestation is None:
            raise RequestRejected(Reason.PROOF_NOT_TAKEN, "attestations are not taken")
        if not proof.chain:
            raise RequestRejected(Reason.ATTESTATION_MALFORMED, "the device could not attest")
        if isinstance(self.attestation, AttestationService):
            return self.attestation.verify(proof.chain)
        return self.attestation.verify(
            proof.chain, lambda challenge: is_open(self.challenge_key, subject, challenge, now), now
        )

    def _grant(
        self,
        token: str,
        owner: str | None,
        participant: str | None,
        earned_by: str,
        session: AssignmentRow | None,
        now: datetime,
    ) -> Decision:
        hashed = token_hash(token)
        if session is not None and session.participant != participant:
            raise RequestRejected(Reason.ENROLMENT_REFUSED, "the session is another device's")
        if owner is None and session is None:
            return Admitted(hashed, participant)
        with self.database.write(_WRITE_S) as tx:
            # Without an owner, that of a session whose own token was cleaned away, the proof is good for the session.
            granted = owner is None or tokens.grant_token(
                tx, tokens.TokenRow(hashed, owner, participant, earned_by, now, now + TOKEN_LIFE), now
            )
            if granted and session is not None:
                rebind_session(tx, session, hashed)
        if not granted:
            raise RequestRejected(Reason.TOKEN_TAKEN, "the token, or the proof that came with it, was used before")
        return Admitted(hashed, participant)

    def _counted(self, decision: Decision) -> Decision:
        match decision:
            case Refused(reason):
                self.counts(f"refused: {reason.value}")
            case Unavailable(verifying):
                self.counts(f"service failed: {'verification' if verifying else 'challenge'}")
            case TooOften():
                self.counts("challenged too often")
            case _:
                self.counts(type(decision).__name__.lower())
        return decision


def open_authentication(
    settings: Settings, database: Database, sealer: Sealer, challenge_key: bytes
) -> Authentication | None:
    """What the settings ask for; None if every device is taken. Raises OperationFailed(SETTINGS_INVALID)."""
    if settings.authentication == "off":
        if not is_loopback(settings.host):
            _LOG.warning("every device that reaches this server is taken; see --authentication")
        return None
    judge = _judge(settings) if settings.authentication in ("attestation", "both") else None
    return Authentication(database, sealer, challenge_key, settings.authentication != "attestation", judge)


def _judge(settings: Settings) -> LocalVerifier | AttestationService:
    try:
        policy = DevicePolicy(read_packages(settings.attestation_packages), settings.allow_rooted_devices)
    except ValueError as error:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"setting attestation_packages: {error}") from None
    if settings.attestation_service_url is not None:
        assert settings.attestation_service_key_file is not None, "the settings demand both"
        key = read_service_key(settings.attestation_service_key_file)
        return AttestationService(settings.attestation_service_url, key, policy)
    assert settings.attestation_roots is not None, "the settings demand roots or a service"
    revoked = settings.attestation_revocation_list
    return LocalVerifier(
        read_roots(settings.attestation_roots), None if revoked is None else RevocationList(revoked), policy
    )
