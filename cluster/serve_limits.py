"""What the server accepts: how long a text, how often, from whom; needs neither Ray nor torch."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
from dataclasses import dataclass, field

# Line ends of every system and of Unicode.
_LINE_END = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")

# Control characters, and the mark that some editors put at a file's beginning.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")

# The largest form of a character in JSON: two escapes of six bytes.
_BYTES_A_CHARACTER = 12
# For the other keys of a request.
_BYTES_BESIDES = 1024

# Clients whose allowance is remembered; more than these at once, and the fullest are forgotten.
_CLIENTS = 10_000


@dataclass(frozen=True)
class Limits:
    """How much is accepted.

    ``rate`` is requests a minute of each client, all of which may come at once; None is no limit.
    ``token`` is the digest of what clients must show. ``hosts`` are the names that a request may
    call this server by; None accepts any.
    """

    max_characters: int
    rate: int | None = None
    token: bytes | None = None
    hosts: frozenset[str] | None = None

    @property
    def max_bytes(self) -> int:
        """No text within ``max_characters`` makes a longer request."""
        return self.max_characters * _BYTES_A_CHARACTER + _BYTES_BESIDES


def split_lines(text: str) -> list[str]:
    """The text's lines, control characters replaced by blanks; a line end at the end adds none."""
    lines = [_CONTROL.sub(" ", line) for line in _LINE_END.split(text)]
    if len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines


def digest(token: str) -> bytes:
    """What the server keeps of a token: enough to know it again, not to use it."""
    return hashlib.sha256(token.encode("utf-8")).digest()


def shows_token(authorization: str | None, expected: bytes) -> bool:
    """Whether an ``Authorization`` header holds the token; takes as long for any wrong one.

    Source: RFC 6750, section 2.1.
    """
    scheme, _, token = (authorization or "").partition(" ")
    return hmac.compare_digest(digest(token.strip()), expected) and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port and an IPv6 address' brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def client_of(address: str) -> str:
    """Who shares one allowance: an IPv4 address, or the /64 that one IPv6 subscriber is given."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


@dataclass
class TokenBuckets:
    """Each client's allowance: a bucket of ``rate`` requests that fills up again in a minute."""

    rate: int
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, client: str, now: float) -> int:
        """Take one request of the client's.

        Args:
            client: as of ``client_of``.
            now: seconds of a clock that never goes back.

        Returns:
            0, or how many whole seconds the client has to wait for the next one.
        """
        level = self._level(client, now)
        if level < 1:
            self._buckets[client] = (level, now)
            return max(1, math.ceil((1 - level) * 60 / self.rate))
        if client not in self._buckets and len(self._buckets) >= _CLIENTS:
            self._forget(now)
        self._buckets[client] = (level - 1, now)
        return 0

    def _level(self, client: str, now: float) -> float:
        level, then = self._buckets.get(client, (float(self.rate), now))
        return min(float(self.rate), level + (now - then) * self.rate / 60)

    def _forget(self, now: float) -> None:
        """Drop the half that has used least: to forget them costs the limit least."""
        fullest = sorted(self._buckets, key=lambda client: -self._level(client, now))
        for client in fullest[: max(1, len(fullest) // 2)]:
            del self._buckets[client]
