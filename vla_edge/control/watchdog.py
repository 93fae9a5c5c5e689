"""A watchdog: how long ago something last happened, on the clock its owner passes in."""

from __future__ import annotations


class Watchdog:
    """Expired when not fed for longer than its limit; also expired before the first feed.

    Args:
        limit_ns: longest silence allowed, ns.
    """

    __slots__ = ("limit_ns", "fed_ns")

    def __init__(self, limit_ns: int):
        self.limit_ns = limit_ns
        self.fed_ns: int | None = None

    def feed(self, now_ns: int) -> None:
        self.fed_ns = now_ns

    def forget(self) -> None:
        self.fed_ns = None

    def age_ns(self, now_ns: int) -> int | None:
        """ns since the last feed, None before the first."""
        return None if self.fed_ns is None else now_ns - self.fed_ns

    def expired(self, now_ns: int) -> bool:
        return self.fed_ns is None or now_ns - self.fed_ns > self.limit_ns
