"""Checks of constructor arguments; each raises a ValueError that names the argument, its value and what was expected."""

from __future__ import annotations

from numbers import Integral


# No sequence is longer; products of two such numbers still fit in 64 bits.
LONGEST = 2**31


def integer(name: str, value: object, minimum: int, maximum: int = LONGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} is {value!r}; expected an int of at least {minimum}")
    if value > maximum:
        raise ValueError(f"{name} is {value!r}; expected at most {maximum}")
    return int(value)


def integers(name: str, value: object, minimum: int) -> tuple[int, ...]:
    """A non-empty tuple of ints; lists and other iterables of ints are taken too."""
    if isinstance(value, (str, bytes, Integral, float)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} is {value!r}; expected a tuple of ints, each at least {minimum}")
    items = tuple(value.tolist() if hasattr(value, "tolist") else value)
    if not items:
        raise ValueError(f"{name} is {value!r}; expected at least one entry")
    return tuple(integer(f"{name}[{n}]", item, minimum) for n, item in enumerate(items))


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return value


def set_field(pattern: object, name: str, value: object) -> None:
    """Store a checked value in a frozen dataclass."""
    object.__setattr__(pattern, name, value)
