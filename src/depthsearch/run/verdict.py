"""The outcome of a comparison in words, with "search did not help here" among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ONE_PASS = (
    "fixed",
    "windows",
    "angular_window",
    "block_influence",
    "similarity",
    "sensitivity",
    "single_removal",
    "additive",
)
"""Methods that rank, slide or add up instead of searching."""


def verdict(summary: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """One to three sentences: which arm is lowest, what it beats, and whether search paid."""
    ranked = sorted(summary, key=lambda row: float(row["heldout_kl_mean"]))
    best = ranked[0]
    text = (
        f"{best['arm']} has the lowest held-out KL, {best['heldout_kl_mean']:.4f} "
        f"[{best['heldout_kl_low']:.4f}, {best['heldout_kl_high']:.4f}]."
    )
    if len(ranked) == 1:
        return text
    others = [str(row["arm"]) for row in ranked[1:]]
    beaten = [arm for arm in others if _worse(arm, str(best["arm"]), pairs)]
    tied = [arm for arm in others if arm not in beaten]
    if beaten:
        text += f" It is better than {_listed(beaten)} (95 % interval excludes zero)."
    if tied:
        text += f" No difference to {_listed(tied)} is shown."
    simple = [row for row in ranked if row["method"] in ONE_PASS]
    if best["method"] in ONE_PASS or any(row["arm"] in tied for row in simple):
        text += " Search did not help over one-pass methods here."
    return text


def _worse(arm: str, than: str, pairs: Sequence[Mapping[str, Any]]) -> bool:
    return any(
        {pair["a"], pair["b"]} == {arm, than} and pair["verdict"] == f"{than} is better"
        for pair in pairs
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
