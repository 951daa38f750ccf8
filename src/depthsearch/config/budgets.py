"""Budgets of a run file: what may be dropped, and what the rest must not exceed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from depthsearch.config.section import Count, Section, frozen

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS: Mapping[str, Mapping[str, int]] = {
    "params": {"k": 10**3, "m": 10**6, "b": 10**9},
    "bytes": {f"{p}b": f for p, f in _DECIMAL.items()}
    | {f"{p}ib": 1024**n for n, p in enumerate("kmgt", start=1)},
    "flops": {f"{p}flop": f for p, f in _DECIMAL.items()},
    "latency": {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9},
}
_UNIT_NAMES = {
    "params": "K, M or B, such as '100M'",
    "bytes": "B, kB, MB, GB, KiB, MiB or GiB, such as '180MB'",
    "flops": "FLOP, kFLOP, MFLOP, GFLOP or TFLOP (per token), such as '0.2GFLOP'",
    "latency": "ns, us, ms or s, such as '12ms'",
}
_PROTECTED = re.compile(r"first|last|[a-z_]+\.[0-9]+(\.(attention|cross_attention|ffn))?")


def parse_amount(text: str, metric: str) -> int:
    """An absolute cap such as "100M", "180MB", "0.2GFLOP" or "12ms", in the metric's own unit.

    That of latency is the nanosecond. Upper and lower case are one. Raises ValueError, naming the
    units of the metric.
    """
    kind = "bytes" if metric == "kv_bytes" else metric
    match = _AMOUNT.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if unit not in _UNITS[kind]:
        unit = unit.removesuffix("s")
    if match is None or unit not in _UNITS[kind]:
        raise ValueError(f"a cap is a number with a unit: {_UNIT_NAMES[kind]}")
    cap = float(match[1]) * _UNITS[kind][unit]
    if not math.isfinite(cap):
        raise ValueError("a cap is a finite number")
    amount = math.floor(cap)
    if amount < 1:
        raise ValueError("a cap is at least 1")
    return amount


class BudgetConfig(Section):
    """What the smaller model must not exceed: exactly one key besides `of` and `context_tokens`."""

    keep_params: float | str | None = None
    """parameters to keep: a ratio in (0, 1], or a cap such as '100M'"""
    keep_bytes: float | str | None = None
    """bytes of weights to keep: a ratio in (0, 1], or a cap such as '180MB'"""
    keep_flops: float | str | None = None
    """FLOPs per token to keep: a ratio in (0, 1], or a cap such as '0.2GFLOP'"""
    keep_kv_bytes: float | str | None = None
    """KV-cache bytes per token to keep: a ratio in (0, 1], or a cap such as '12kB'"""
    keep_latency: float | str | None = None
    """time of one decoding step to keep, by the table that space.latency names: a ratio in (0, 1],
    or a cap such as '12ms'"""
    drop_sites: Count | None = None
    """number of sublayers to drop, or more where they go in pairs or blocks"""
    drop_blocks: Count | None = None
    """number of blocks to drop"""
    of: Literal["model", "blocks"] = "model"
    """what a ratio refers to: the whole model, or its blocks without embeddings and head"""
    context_tokens: Count = 2048
    """context length at which FLOPs per token are counted; that of space.latency, where given"""

    @field_validator(
        "keep_params", "keep_bytes", "keep_flops", "keep_kv_bytes", "keep_latency", mode="before"
    )
    @classmethod
    def _check_amount(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return None
        metric = str(info.field_name).removeprefix("keep_")
        if isinstance(value, str):
            parse_amount(value, metric)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            kind = "bytes" if metric == "kv_bytes" else metric
            raise ValueError(
                f"a ratio lies in (0, 1]; an absolute cap carries a unit: {_UNIT_NAMES[kind]}"
            )
        return float(value)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError(
                "a budget takes exactly one of keep_params, keep_bytes, keep_flops, keep_kv_bytes, "
                "keep_latency, drop_sites, drop_blocks; to exchange it, set the whole budget, such "
                "as space.budget={drop_sites: 4}"
            )
        return self

    def _given(self) -> dict[str, float | str]:
        extras = {"of", "context_tokens"}
        return {k: v for k, v in self if k not in extras and v is not None}

    @property
    def metric(self) -> str:
        """What is counted, such as params."""
        (key,) = self._given()
        return key.split("_", 1)[1]

    @property
    def label(self) -> str:
        """A short name for folders, such as keep_params-0.75-of-blocks; equal only for equals."""
        ((key, value),) = self._given().items()
        # A unit means the same in upper and lower case, which not every disk tells apart.
        amount = "".join(value.split()).lower() if isinstance(value, str) else str(value)
        parts = [key, amount]
        if self.of != "model" and isinstance(value, float):
            parts.append(f"of-{self.of}")
        if key == "keep_flops":
            parts.append(f"at-{self.context_tokens}")
        return "-".join(parts)

    def to_budget_json(self) -> dict[str, Any]:
        """The budget as `depthsearch.space.Budget.from_json` reads it."""
        ((key, value),) = self._given().items()
        verb, metric = key.split("_", 1)[0], self.metric
        return {
            "metric": metric,
            "ratio": value if verb == "keep" and isinstance(value, float) else None,
            "cap": parse_amount(value, metric) if isinstance(value, str) else None,
            "drop": value if verb == "drop" else None,
            "of": self.of,
        }


def check_timed(budgets: Sequence[BudgetConfig], table: str | None) -> None:
    """Raise ValueError where one of the budgets needs measured times and there are none."""
    if table is None and any(budget.keep_latency is not None for budget in budgets):
        raise ValueError(
            "keep_latency needs measured times: set space.latency to a file that "
            "`depthsearch latency MODEL --out FILE` wrote on the machine to serve on"
        )


class SpaceConfig(Section):
    """Which sublayers may go, together or one by one, and the budget the rest must meet."""

    granularity: Literal["sublayer", "block", "attention", "ffn"] = "sublayer"
    """what is dropped at once: single sublayers of any kind, whole blocks, one kind only"""
    packable: bool = False
    """keep only what re-pairs into ordinary blocks, so that the result needs no special code"""
    protect: tuple[str | int, ...] = ()
    """never dropped: first, last, a block number, or a site such as decoder.12.attention"""
    latency: Annotated[str, Field(min_length=1)] | None = None
    """times of this model's parts that keep_latency counts in: a file that `depthsearch latency`
    wrote on the machine which is to serve the result; other machines may search"""
    budget: BudgetConfig
    """the budget, such as {keep_params: 0.75, of: blocks}"""

    @field_validator("budget", mode="after")
    @classmethod
    def _check_budget(cls, budget: BudgetConfig, info: ValidationInfo) -> BudgetConfig:
        if "latency" in info.data:
            check_timed([budget], info.data["latency"])
        return budget

    @field_validator("protect", mode="before")
    @classmethod
    def _check_protect(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list, such as [first, 3, decoder.12.attention]")
        for entry in value:
            block = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
            if not block and not (isinstance(entry, str) and _PROTECTED.fullmatch(entry)):
                raise ValueError(
                    f"{entry!r} is none of first, last, a block number from 0, "
                    "or a site such as decoder.12.attention"
                )
        return tuple(value)


class FrontConfig(Section):
    """Further budgets that one search serves besides `space.budget`; for the methods front and
    optuna."""

    budgets: Annotated[tuple[BudgetConfig, ...], BeforeValidator(frozen)] = ()
    """budgets such as {keep_params: 0.9}, of any metrics; what they leave out of `of` and
    `context_tokens` is that of space.budget"""
    second: Annotated[tuple[BudgetConfig, ...], BeforeValidator(frozen)] = ()
    """budgets of a second cost, such as {keep_kv_bytes: 0.6}: masks meet one of these and one of
    space.budget and `budgets`, in every combination that can be met"""

    @model_validator(mode="after")
    def _check_costs(self) -> Self:
        if not (self.budgets or self.second):
            raise ValueError("budgets or second holds at least 1 item, such as {keep_params: 0.9}")
        if len({budget.metric for budget in self.second}) > 1:
            raise ValueError("second takes budgets of one cost, such as keep_kv_bytes")
        if len({budget.label for budget in self.second}) != len(self.second):
            raise ValueError("each budget of second may appear once")
        return self
