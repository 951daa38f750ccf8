"""What the parts of a run file have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)


def whole(value: object) -> object:
    """Let `1e4` stand where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def frozen(value: object) -> object:
    """Let a YAML list stand where a tuple is wanted."""
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, BeforeValidator(whole)]
LEAST_RESOURCE = 1e-4
"""The smallest share of a resource that Ray tells apart from none."""
MOST_THREADS = 4096
"""More than any machine has; starting so many more would end in a crash."""

Count = Annotated[Whole, Field(ge=1)]
Tokens = Annotated[Whole, Field(ge=2)]


class Section(BaseModel):
    """What every part of a run file shares: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
