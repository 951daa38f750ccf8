"""Options of a method: a frozen dataclass each, filled from plain data and checked."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from depthsearch.errors import ConfigError

T = TypeVar("T")


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """A "did you mean" phrase with a leading comma, or nothing where no name is close."""
    close = get_close_matches(name, list(allowed), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def parse_options(kind: type[T], method: str, options: Mapping[str, object]) -> T:
    """Build the options dataclass `kind`; raises ConfigError on an unknown name or a wrong type."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in names:
            allowed = ", ".join(names) if names else "none"
            raise ConfigError(
                f"unknown option '{name}' of the method '{method}'{suggestion(name, names)} "
                f"(its options: {allowed})"
            )
        if isinstance(value, float) and value.is_integer() and not _fits(value, hints[name]):
            # `1e2` stands for a whole number, as in the other settings.
            value = int(value)
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"option '{name}' of the method '{method}' takes {_text(hints[name])}: "
                f"got {value!r}"
            )
        values[name] = float(value) if hints[name] is float else value  # type: ignore[arg-type]
    return kind(**values)


def at_least(options: object, **lowest: float) -> None:
    """Raise ConfigError for a numeric option below its lowest allowed value."""
    for name, bound in lowest.items():
        value = getattr(options, name)
        if value < bound:
            raise ConfigError(f"option '{name}' is at least {bound:g}: got {value!r}")


def within(options: object, **bounds: tuple[float, float]) -> None:
    """Raise ConfigError for a numeric option that is not above the first and at most the second."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if not low < value <= high:
            raise ConfigError(f"option '{name}' is above {low:g}, at most {high:g}: got {value!r}")


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint) and isinstance(value, str)
    if hint is float:
        # What is not finite would not come back from config.yaml.
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _text(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_text(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    named: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return named.get(hint, str(hint))
