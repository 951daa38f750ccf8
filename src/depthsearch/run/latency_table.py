"""Latency tables: measured once on the machine that is to serve, then read by any search.

A table says what each sublayer adds to one decoding step, in nanoseconds, and what is left without
any. The latency of a mask is the sum of what it keeps, as in the tables of FBNet (arXiv 1812.03443)
and Puzzle (arXiv 2411.19146). How far that is from a step measured whole is written beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from depthsearch.errors import BudgetError, InputError, ModelError
from depthsearch.model.load import LoadedModel
from depthsearch.space import CostTable, Site, SiteCosts

Nanoseconds = Annotated[int, Field(ge=0)]

_BUSY = 0.25
"""The share of interrupted steps from which on the whole step is no measure of its parts."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Measured(_Part):
    """One measured time: median and quartiles over the repeats."""

    ns: Nanoseconds
    quartiles_ns: tuple[Nanoseconds, Nanoseconds]


class SiteTime(_Part):
    """What a site costs, and what was measured for it alone before sites alike were averaged."""

    name: str
    ns: Nanoseconds
    measured_ns: Nanoseconds
    quartiles_ns: tuple[Nanoseconds, Nanoseconds]


class SharedTime(_Part):
    """What sites share, paid while any of them is kept: the one norm of a parallel block."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    ns: Nanoseconds


class ModelName(_Part):
    """Which model was measured."""

    source: str
    revision: str | None
    fingerprint: str


class TableSignature(_Part):
    """What the times depend on."""

    depthsearch: str
    torch: str
    transformers: str
    python: str
    model: ModelName
    model_class: str
    dtype: str
    device: str
    device_name: str
    threads: Annotated[int, Field(ge=1)]
    context_tokens: Annotated[int, Field(ge=1)]
    repeats: Annotated[int, Field(ge=1)]
    protocol: str


class LatencyTable(_Part):
    """A latency table as its file holds it; times are of one decoding step, in nanoseconds."""

    latency_table: Literal[1]
    signature: TableSignature
    sites: Annotated[tuple[SiteTime, ...], Field(min_length=1)]
    shared: tuple[SharedTime, ...]
    fixed: Measured
    whole: Measured
    interrupted: Annotated[float, Field(ge=0, le=1)]

    def costs(self, sites: Sequence[Site]) -> SiteCosts:
        """The costs of `sites`; raises ModelError where the table has others."""
        places = {site.name: site.index for site in sites}
        named = [site.name for site in self.sites]
        shared = [name for part in self.shared for name in part.names]
        if named != list(places) or not places.keys() >= set(shared):
            raise ModelError(
                f"the latency table lists {len(named)} sites, which are not the model's "
                f"{len(places)} in their order: measure it again with `depthsearch latency`"
            )
        return SiteCosts(
            self.fixed.ns,
            tuple(site.ns for site in self.sites),
            tuple((tuple(places[name] for name in part.names), part.ns) for part in self.shared),
        )

    @property
    def sum_ns(self) -> int:
        """The dense step as the sum of its parts."""
        inside = sum(site.ns for site in self.sites) + sum(part.ns for part in self.shared)
        return self.fixed.ns + inside

    @property
    def additivity_error(self) -> float:
        """How far the sum is above the whole step as measured, as a share of it."""
        return self.sum_ns / self.whole.ns - 1

    @property
    def warnings(self) -> list[str]:
        """What a person should know of how the times were measured."""
        if self.interrupted <= _BUSY:
            return []
        return [
            f"other processes interrupted {100 * self.interrupted:.0f} % of the steps: parts and "
            "their ratios hold better than the whole step; measure on an idle machine"
        ]


@dataclass(frozen=True)
class Latency:
    """A table read from a file: what it holds, the file's name and its sha256."""

    table: LatencyTable
    name: str
    sha256: str

    @property
    def signature(self) -> dict[str, Any]:
        """What the signature of a run says of the table it counted in."""
        names = ("device_name", "dtype", "threads", "context_tokens")
        about = {name: getattr(self.table.signature, name) for name in names}
        return {"sha256": self.sha256, **about}

    def check(self, loaded: LoadedModel) -> None:
        """Raise ModelError for the table of another model."""
        measured = self.table.signature.model
        if measured.fingerprint != loaded.fingerprint:
            raise ModelError(
                f"{self.name} has the times of another model, {measured.source} (its fingerprint "
                f"is not that of {loaded.source}): measure this one with `depthsearch latency "
                "MODEL --out FILE`"
            )

    def added(self, costs: CostTable, sites: Sequence[Site], context_tokens: int) -> CostTable:
        """`costs` with the metric latency; raises BudgetError for another context, ModelError."""
        measured = self.table.signature.context_tokens
        if measured != context_tokens:
            raise BudgetError(
                f"{self.name} was measured behind a context of {measured} tokens, but "
                f"context_tokens is {context_tokens}: set it to {measured} (in a run file "
                "space.budget.context_tokens), or measure again"
            )
        return CostTable({**costs.metrics, "latency": self.table.costs(sites)})


def read_latency(path: str | Path | None) -> Latency | None:
    """The latency table in a file, None for no file; raises InputError."""
    if path is None:
        return None
    hint = "write one with `depthsearch latency MODEL --out FILE`"
    try:
        data = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such latency table; {hint}") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: can't be read: {reason}") from None
    try:
        table = LatencyTable.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{path} is no latency table ({what}); {hint}") from None
    if table.sum_ns < 1 or table.whole.ns < 1:
        raise InputError(f"{path} is no latency table (its step takes no time); {hint}")
    return Latency(table, Path(path).name, hashlib.sha256(data).hexdigest())
