"""What values of a step are allowed; all raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(name: str, value, allowed: Sequence, booleans: bool = False) -> None:
    if value not in allowed or isinstance(value, bool) is not booleans:
        words = ", ".join("null" if item is None else str(item) for item in allowed)
        raise ValueError(f"{name} is {value!r}, allowed is {words}")


def number(name: str, value, low: float, high: float, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{name} is {value!r}, allowed is {words}")


def whole(name: str, value, more: str = "", least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, allowed is a positive whole number{more}")
