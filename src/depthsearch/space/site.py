"""Sites: the sublayers of a transformer that a mask can keep or drop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from depthsearch.errors import MaskError

Kind = Literal["attention", "cross_attention", "ffn"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_NAME = re.compile(r"^(?P<stack>[A-Za-z_]+)\.(?P<block>\d+)\.(?P<kind>[a-z_]+)$")


@dataclass(frozen=True, slots=True)
class Site:
    """One sublayer: `index` is its place in execution order over the whole model."""

    index: int
    stack: str
    block: int
    kind: Kind

    @property
    def name(self) -> str:
        """The public name, `<stack>.<block>.<kind>`."""
        return f"{self.stack}.{self.block}.{self.kind}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"index": self.index, "stack": self.stack, "block": self.block, "kind": self.kind}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_json`."""
        return cls(int(data["index"]), str(data["stack"]), int(data["block"]), _kind(data["kind"]))


def parse_site_name(name: str) -> tuple[str, int, Kind]:
    """Split `decoder.12.attention` into stack, block and kind; raises MaskError."""
    match = _NAME.match(name)
    if match is None or match["kind"] not in KINDS:
        raise MaskError(
            f"'{name}' is not a site name: expected <stack>.<block>.<kind> with kind one of "
            f"{', '.join(KINDS)}, for example decoder.12.attention"
        )
    return match["stack"], int(match["block"]), _kind(match["kind"])


def _kind(value: object) -> Kind:
    if value not in KINDS:
        raise MaskError(f"'{value}' is not a kind of site: expected one of {', '.join(KINDS)}")
    return value
