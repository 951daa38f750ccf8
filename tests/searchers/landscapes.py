"""Synthetic losses and small spaces for the searchers' tests.

The losses have what real ones have: sites that matter by different amounts, gaps that cost less
than the sum of their sites, gaps that hurt each other, and noise that differs by sequence. They are
plain functions of the mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from depthsearch.searchers import Searcher
from depthsearch.space import (
    Batch,
    Budget,
    CostTable,
    Evaluation,
    Hints,
    Mask,
    Proposal,
    SearchSpace,
    Sensitivity,
    Site,
    SiteCosts,
    Status,
)

SEQUENCES = 6
TOKENS_A_SEQUENCE = 64


def sites(blocks: int) -> tuple[Site, ...]:
    """Attention and FFN of every block of one decoder."""
    return tuple(
        Site(2 * block + place, "decoder", block, kind)
        for block in range(blocks)
        for place, kind in enumerate(("attention", "ffn"))
    )


def costs(blocks: int, attention: int = 1, ffn: int = 3) -> CostTable:
    """Parameters in the ratio of SmolLM2 (1 : 3), and a KV cache for attention only."""
    params = SiteCosts(10, (attention, ffn) * blocks)
    return CostTable({"params": params, "kv_bytes": SiteCosts(0, (2, 0) * blocks)})


def toy(
    blocks: int = 6,
    budget: Budget | None = None,
    granularity: str = "sublayer",
    protected: Sequence[int] = (),
    packable: bool = False,
) -> SearchSpace:
    """A space over `blocks` blocks; by default three quarters of the blocks' parameters."""
    return SearchSpace(
        sites(blocks),
        costs(blocks),
        budget or Budget("params", ratio=0.75, of="blocks"),
        granularity,  # type: ignore[arg-type]
        frozenset(protected),
        packable,
    )


def two_stacks(drop: int, blocks: int = 6, packable: bool = False) -> SearchSpace:
    """An encoder and a decoder of attention and FFN, any `drop` sites of which go."""
    encoder = tuple(replace(site, stack="encoder") for site in sites(blocks))
    decoder = tuple(replace(site, index=site.index + 2 * blocks) for site in sites(blocks))
    table = CostTable({"params": SiteCosts(10, (1, 3) * 2 * blocks)})
    budget = Budget("sites", drop=drop)
    return SearchSpace((*encoder, *decoder), table, budget, packable=packable)


SPACES: dict[str, SearchSpace] = {
    "sublayer": toy(6),
    "packable": toy(7, packable=True),
    "packable_protected": toy(8, packable=True, protected=(0, 1, 15)),
    "block": toy(8, granularity="block"),
    "drop_blocks": toy(7, Budget("blocks", drop=2), "block", packable=True),
    "attention_kv": toy(8, Budget("kv_bytes", ratio=0.6), "attention"),
    "sublayer_kv": toy(6, Budget("kv_bytes", ratio=0.6)),
    "ffn": toy(8, Budget("params", ratio=0.7), "ffn"),
    "drop_sites": toy(6, Budget("sites", drop=3), protected=(0, 11)),
    "drop_one": toy(4, Budget("sites", drop=1)),
    "only_one_mask": toy(2, Budget("sites", drop=3), protected=(0,)),
    "dense_fits": toy(3, Budget("params", cap=1000)),
}

_QUARTER = Budget("params", ratio=0.75, of="blocks")
FRONTS: dict[str, SearchSpace] = {
    "one cost": replace(toy(5), front=(Budget("params", ratio=0.6, of="blocks"),)),
    "two costs": replace(
        toy(5),
        front=tuple(
            replace(
                Budget("params", ratio=first, of="blocks"), also=Budget("kv_bytes", ratio=cache)
            )
            for first in (0.75, 0.9)
            for cache in (0.8, 0.5)
        ),
    ),
    "packable pairs": replace(
        toy(6, packable=True),
        front=(
            replace(_QUARTER, also=Budget("kv_bytes", ratio=0.5)),
            Budget("kv_bytes", ratio=0.75),
        ),
    ),
}
"""Spaces with several budgets, for the methods that serve a front."""


@dataclass(frozen=True)
class Landscape:
    """A loss of masks over `sites` sites, drawn from `seed`.

    Each run of dropped sites costs the root of the sum of its squared importances plus a share of
    their plain sum (so a gap is cheaper than its sites alone), gaps add up with a quadratic term
    (so many gaps are worse than one), and pairs of dropped sites interact at random. `scatter` in
    [0, 1] takes the advantage of gaps away.
    """

    sites: int
    seed: int = 0
    scatter: float = 0.0

    @cached_property
    def importance(self) -> np.ndarray:
        """[sites], positive; the ends matter most, FFN (odd) more than attention."""
        rng = np.random.default_rng([self.seed, 1])
        place = np.linspace(-1, 1, self.sites)
        ends = 0.6 * np.abs(place) ** 6
        kind = np.where(np.arange(self.sites) % 2, 1.5, 1.0)
        return 0.05 * kind * rng.lognormal(0.0, 0.5, self.sites) + ends

    @cached_property
    def pairs(self) -> np.ndarray:
        """[sites, sites], symmetric: what two dropped sites cost beyond their own cost."""
        rng = np.random.default_rng([self.seed, 2])
        draws = rng.normal(0.0, 0.006, (self.sites, self.sites))
        return np.triu(draws, 1) + np.triu(draws, 1).T

    @cached_property
    def noise(self) -> np.ndarray:
        """[SEQUENCES, sites]: how much each sequence suffers from each site, around zero."""
        rng = np.random.default_rng([self.seed, 3])
        return rng.normal(0.0, 0.004, (SEQUENCES, self.sites))

    def losses(self, mask: Mask) -> tuple[float, ...]:
        """The loss of each sequence in nats."""
        h = self.importance
        share = 0.25 + 0.75 * self.scatter
        gaps = [
            (1 - share) * float(np.sqrt((h[a:b] ** 2).sum())) + share * float(h[a:b].sum())
            for a, b in mask.runs
        ]
        gone = np.array([not kept for kept in mask.keep], dtype=float)
        total = sum(gaps) + 0.3 * sum(gaps) ** 2 + 0.5 * float(gone @ self.pairs @ gone)
        return tuple(float(x) for x in 0.1 + total + self.noise @ gone)

    def evaluate(self, mask: Mask) -> Evaluation:
        """A complete evaluation."""
        return Evaluation(mask, self.losses(mask), SEQUENCES * TOKENS_A_SEQUENCE)

    def hints(self) -> Hints:
        """Similarities as a real dense model gives them: related to the importances, not equal."""
        rng = np.random.default_rng([self.seed, 4])
        seen = 0.1 * self.importance * rng.lognormal(0.0, 0.3, self.sites)
        before = np.concatenate([[0.0], np.cumsum(seen)])
        distance = np.minimum(np.abs(before[:, None] - before[None, :]) ** 0.9, 1.0)
        return Hints(
            tuple(tuple(float(x) for x in row) for row in np.cos(distance * np.pi / 2)),
            tuple(tuple(float(x) for x in row) for row in distance / 2),
            self.sensitivity(),
        )

    def sensitivity(self) -> Sensitivity:
        """First-order estimates: the importances with much noise, some signed ones below zero."""
        rng = np.random.default_rng([self.seed, 5])
        signed = self.importance * rng.lognormal(0.0, 0.6, self.sites) - 0.03
        magnitude = np.abs(signed) + 0.02 * rng.random(self.sites)
        return Sensitivity(tuple(map(float, signed)), tuple(map(float, magnitude)))


Answer = Callable[[Proposal], Evaluation]


def drive(
    searcher: Searcher,
    answer: Answer,
    n: int | None = None,
    limit: int = 100_000,
) -> list[tuple[Batch, list[Evaluation]]]:
    """Ask and tell until the searcher is finished or `limit` masks were answered."""
    record: list[tuple[Batch, list[Evaluation]]] = []
    asked = 0
    while asked < limit:
        batch = searcher.ask(n)
        if not batch.proposals:
            return record
        evaluations = [answer(proposal) for proposal in batch.proposals]
        searcher.tell(evaluations)
        asked += len(evaluations)
        record.append((batch, evaluations))
    return record


def proposals(record: Sequence[tuple[Batch, list[Evaluation]]]) -> list[Proposal]:
    """Everything that was asked, in order."""
    return [proposal for batch, _ in record for proposal in batch.proposals]


def best_final(record: Sequence[tuple[Batch, list[Evaluation]]]) -> Evaluation:
    """The best complete evaluation on budget."""
    found = [
        evaluation
        for batch, evaluations in record
        for proposal, evaluation in zip(batch.proposals, evaluations, strict=True)
        if proposal.final and evaluation.status is Status.OK
    ]
    return min(found, key=lambda evaluation: evaluation.order)


def unreliable(landscape: Landscape, failing: float) -> Answer:
    """Answers that fail or are eliminated at random, a fixed choice for each mask."""

    def answer(proposal: Proposal) -> Evaluation:
        complete = landscape.evaluate(proposal.mask)
        digest = hashlib.sha256(proposal.mask.key.encode()).digest()
        if digest[0] / 256 >= failing:
            return complete
        status = (
            Status.NON_FINITE,
            Status.FAILED,
            Status.ELIMINATED,
            Status.OUT_OF_MEMORY,
            Status.TIMED_OUT,
        )[digest[1] % 5]
        losses = complete.losses[: 1 + digest[2] % (SEQUENCES - 1)] if status.has_loss else ()
        return replace(complete, losses=losses, tokens=len(losses), status=status)

    return answer


def digest(masks: Sequence[Mask]) -> str:
    """sha256 of a sequence of masks."""
    return hashlib.sha256("\n".join(mask.key for mask in masks).encode()).hexdigest()
