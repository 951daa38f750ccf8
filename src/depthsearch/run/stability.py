"""Whether the order of masks, and the winner, hold on other text: figures from losses alone.

Everything here is regrouped from one table of losses for each text, so nothing is judged twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from depthsearch.run.rank_statistics import (
    Agreement,
    SizeFigures,
    Table,
    above_lowest,
    agreement,
    rival,
    settled,
    size_figures,
    smallest_possible,
    smallest_sufficient,
    winner,
)
from depthsearch.run.statistics import Interval, paired_difference

Kind = Literal["draw", "fold", "length", "other"]

DRAW, FOLD, LENGTH, OTHER = "draw", "fold", "length", "other"


@dataclass(frozen=True)
class Sample:
    """Losses `[masks, windows]` of all masks on one text.

    A `draw` is as much text as a search selects on, a `length` the first draw's text in windows of
    another length, `other` a text of another kind, a `fold` the first draw without a part of it.
    """

    name: str
    kind: Kind
    window_tokens: int
    losses: Table

    @property
    def tokens(self) -> int:
        """The size of the text."""
        return self.window_tokens * int(self.losses.shape[1])


def stability(
    samples: Sequence[Sample],
    heldout: Table,
    sizes: Sequence[int],
    *,
    folds: int,
    select_tokens: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The agreement of `samples` with each other and with `heldout` `[masks, windows]`, as data.

    Masks are numbered as the rows are; `samples` begin with the draws. `sizes` are in tokens, of
    windows such as the draws have. With fewer than two `folds` none are made.
    """
    draws = [sample for sample in samples if sample.kind == DRAW]
    first = draws[0]
    every = [*draws, *_folds(first, folds), *samples[len(draws) :]]
    pool = np.concatenate([draw.losses for draw in draws], axis=1)
    best = winner(heldout.mean(axis=1))
    counts = sorted({size // first.window_tokens for size in sizes})
    curve = [size_figures(pool, heldout, count, rng) for count in counts]
    enough, possible, fixed = smallest_sufficient(curve), smallest_possible(curve), settled(curve)
    pairs = list(_pairs(every, rng))
    asked = select_tokens // first.window_tokens
    return {
        "select_tokens": select_tokens,
        "best": best,
        "heldout": _heldout(heldout, rng),
        "samples": [_sample(sample, first, heldout, rng) for sample in every],
        "pairs": pairs,
        "agreement": {
            kind: _mean_pair([pair for pair in pairs if pair["kind"] == kind])
            for kind in dict.fromkeys(pair["kind"] for pair in pairs)
        },
        "sizes": [
            _size(size, above, first.window_tokens, best)
            for size, above in zip(curve, above_lowest(curve), strict=True)
        ],
        "configured": next((i for i, n in enumerate(counts) if n == asked), None),
        "settled_tokens": None if fixed is None else counts[fixed] * first.window_tokens,
        "possible_tokens": counts[possible] * first.window_tokens,
        "recommended_tokens": counts[enough] * first.window_tokens,
        "recommended_is_largest": enough == len(counts) - 1,
    }


def _folds(first: Sample, folds: int) -> Iterator[Sample]:
    """The first draw without each of `folds` parts; none where it has fewer windows."""
    windows = first.losses.shape[1]
    if not 2 <= folds <= windows:
        return
    for part, left_out in enumerate(np.array_split(np.arange(windows), folds), start=1):
        losses = np.delete(first.losses, left_out, axis=1)
        yield Sample(f"part {part} left out", "fold", first.window_tokens, losses)


def _heldout(heldout: Table, rng: np.random.Generator) -> dict[str, Any]:
    """Mean losses, and how sure the best mask is on text as large as the held-out text."""
    again = size_figures(heldout, heldout, heldout.shape[1], rng)
    return {
        "losses": heldout.mean(axis=1).tolist(),
        "wins": again.shares.tolist(),
        "windows": int(heldout.shape[1]),
    }


def _sample(
    sample: Sample, first: Sample, heldout: Table, rng: np.random.Generator
) -> dict[str, Any]:
    losses, held = sample.losses.mean(axis=1), heldout.mean(axis=1)
    chosen, ours = winner(losses), winner(first.losses.mean(axis=1))
    return {
        "name": sample.name,
        "kind": sample.kind,
        "window_tokens": sample.window_tokens,
        "tokens": sample.tokens,
        "losses": losses.tolist(),
        "winner": chosen,
        "loss": float(losses[chosen]),
        "heldout_loss": float(held[chosen]),
        "gap": float(held[chosen] - losses[chosen]),
        "mean_gap": float((held - losses).mean()),
        "regret": _regret(heldout, chosen, rng),
        "first_winner_excess": _excess(sample.losses, ours, chosen, rng),
        **_correlations(agreement(sample.losses, heldout, rng)),
    }


def _regret(losses: Table, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
    """The loss of `chosen` above that of its `rival` on one text, paired by window."""
    return paired_difference(losses[chosen : chosen + 1], rival(losses)[np.newaxis], rng).to_json()


def _excess(losses: Table, first: int, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
    """The regret of the winner `first` of the first draw on a text that names `chosen`."""
    if first == chosen:
        return Interval(0.0, 0.0, 0.0).to_json()
    return _regret(losses, first, rng)


def _pairs(every: Sequence[Sample], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Draws with each other, and everything else but folds with the first draw."""
    draws = [sample for sample in every if sample.kind == DRAW]
    others = [sample for sample in every if sample.kind in (LENGTH, OTHER)]
    for a, b in (*combinations(draws, 2), *((draws[0], other) for other in others)):
        found = agreement(a.losses, b.losses, rng)
        yield {"a": a.name, "b": b.name, "kind": b.kind, **_correlations(found)}


def _correlations(found: Agreement | None) -> dict[str, Any]:
    if found is None:
        return {"kendall": None, "spearman": None}
    return {"kendall": found.kendall.to_json(), "spearman": found.spearman.to_json()}


def _mean_pair(pairs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The mean correlations of some pairs, without those that have none."""
    return {
        name: float(np.mean(values))
        if (values := [pair[name]["mean"] for pair in pairs if pair[name] is not None])
        else None
        for name in ("kendall", "spearman")
    }


def _size(size: SizeFigures, above: Interval, window_tokens: int, best: int) -> dict[str, Any]:
    return {
        "tokens": size.windows * window_tokens,
        "windows": size.windows,
        "favourite": size.favourite,
        "favourite_share": float(size.shares[size.favourite]),
        "best_share": float(size.shares[best]),
        "shares": size.shares.tolist(),
        "regret": size.regret,
        "regret_stderr": size.regret_stderr,
        "above_lowest": above.to_json(),
        "kendall": size.kendall,
    }
