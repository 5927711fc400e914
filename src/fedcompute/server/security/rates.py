"""How often somebody may come: token buckets per caller, for check-ins and challenges (spec/device.md 1.4, 1.10)."""

import hashlib
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from fedcompute.server.settings import Settings

# What one caller may save up, in seconds of its rate.
BURST_S = 10.0
# A device sends a request up to three times at once; the three lie within about 105 s.
ATTEMPTS = 3
ATTEMPTS_SPAN_S = 105.0
# Callers and requests remembered; the longest unseen are forgotten first, which costs at most a few turns too many.
MEMORY = 65_536

V = TypeVar("V")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass
class _Bucket:
    tokens: float
    seen: float


@dataclass
class _Attempts:
    count: int
    since: float
    allowed: bool


@dataclass
class Rate:
    """At most `per_second` turns of each caller in the long run, 0 for any number; safe for threads.

    Memory is bounded whatever callers send: names are hashed, and `MEMORY` of them are kept.
    """

    per_second: float
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _buckets: "OrderedDict[bytes, _Bucket]" = field(default_factory=OrderedDict, repr=False)
    _attempts: "OrderedDict[bytes, _Attempts]" = field(default_factory=OrderedDict, repr=False)

    def allow(self, caller: str, request: str, now: float) -> bool:
        """Whether `caller` may have another turn at `now` (seconds, monotonic).

        `request` names the request: its first three attempts are one turn, and all get the same answer.
        """
        if self.per_second <= 0:
            return True
        who, what = _digest(caller), _digest(caller, request)
        with self._lock:
            attempts = self._attempts.get(what)
            if attempts is not None and attempts.count < ATTEMPTS and now - attempts.since <= ATTEMPTS_SPAN_S:
                attempts.count += 1
                return attempts.allowed
            allowed = self._take(who, now)
            _remember(self._attempts, what, _Attempts(1, now, allowed))
            return allowed

    def _take(self, who: bytes, now: float) -> bool:
        most = max(1.0, self.per_second * BURST_S)
        bucket = self._buckets.get(who) or _Bucket(most, now)
        bucket.tokens = min(most, bucket.tokens + (now - bucket.seen) * self.per_second)
        bucket.seen = now
        allowed = bucket.tokens >= 1
        if allowed:
            bucket.tokens -= 1
        _remember(self._buckets, who, bucket)
        return allowed


@dataclass(frozen=True)
class Rates:
    """Who may come how often, by address and by owner (`fcp-owner-id-digest`: all devices of one app).

    An owner is what the request claims, so its limit protects the server from an app, not from an attacker.
    """

    proxies: tuple[Network, ...] = ()
    check_ins_by_address: Rate = field(default_factory=lambda: Rate(0))
    check_ins_by_owner: Rate = field(default_factory=lambda: Rate(0))
    challenges_by_address: Rate = field(default_factory=lambda: Rate(0))
    challenges_by_owner: Rate = field(default_factory=lambda: Rate(0))

    def may_check_in(self, request: "HTTPConnection") -> bool:
        """Whether this check-in has a turn; its three attempts are one."""
        return self._may(request, self.check_ins_by_address, self.check_ins_by_owner)

    def may_be_challenged(self, request: "HTTPConnection") -> bool:
        """Whether this check-in or report may be answered with a challenge; its three attempts are one."""
        return self._may(request, self.challenges_by_address, self.challenges_by_owner)

    def _may(self, request: "HTTPConnection", by_address: Rate, by_owner: Rate) -> bool:
        owner = request.headers.get("fcp-owner-id-digest")
        now, name = time.monotonic(), _name(request)
        if by_address.per_second > 0:
            peer = request.client.host if request.client else ""
            address = client_address(peer, request.headers.getlist("x-forwarded-for"), self.proxies)
            if not by_address.allow(address, name, now):
                return False
        return owner is None or by_owner.allow(owner, name, now)


def rates_of(settings: "Settings") -> Rates:
    """The limits that an operator has set; raises ValueError for proxies that are no networks."""
    return Rates(
        read_networks(settings.trusted_proxies),
        Rate(settings.check_ins_per_address),
        Rate(settings.check_ins_per_owner),
        Rate(settings.challenges_per_address),
        Rate(settings.challenges_per_owner),
    )


def _name(request: "HTTPConnection") -> str:
    """What the attempts of one request have in common and no other request has; reports carry no key."""
    key = request.headers.get("odp-idempotency-key")
    return key if key is not None else repr((request.url.path, sorted(request.headers.items())))


def read_networks(text: str) -> tuple[Network, ...]:
    """The addresses and networks of a comma-separated list; raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def client_address(peer: str, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """Who sent a request: the peer itself, or whom trusted proxies say they had it from.

    `forwarded`: the values of its `X-Forwarded-For` headers. Each proxy appends the address that it saw, so the list
    is read from its end, and the first address that is no trusted proxy's is believed; nothing before it is.
    An IPv6 caller owns its whole /64, so that is the name returned.
    """
    address = _address(peer)
    hops = [hop.strip() for value in forwarded for hop in value.split(",")]
    while address is not None and hops and any(address in network for network in trusted):
        earlier = _address(hops.pop())
        if earlier is None:
            break
        address = earlier
    if address is None:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _digest(*parts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _remember(memory: "OrderedDict[bytes, V]", key: bytes, value: V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > MEMORY:
        memory.popitem(last=False)
