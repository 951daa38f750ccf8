"""Exact search: everything, in a useful order, or a clear refusal."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from landscapes import SPACES, Landscape, best_final, drive, proposals, toy, unreliable

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher
from depthsearch.space import Mask, SearchSpace


def every_mask(space: SearchSpace) -> set[Mask]:
    """All masks on budget, from all subsets of the genes."""
    found = set()
    for count in range(len(space.genes) + 1):
        for chosen in combinations(space.genes, count):
            mask = space.dense.without([i for gene in chosen for i in gene])
            if space.on_budget(mask):
                found.add(mask)
    return found


@pytest.mark.parametrize("name", [n for n in SPACES if not n.startswith("packable")])
@pytest.mark.parametrize("n", [None, 3])
def test_asks_for_every_mask_once_and_finds_the_best(name: str, n: int | None) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites))
    searcher = build_searcher("exhaustive", space, landscape.hints(), np.random.default_rng(0), {})
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), n=n)
    masks = every_mask(space)
    asked = proposals(record)
    assert len(asked) == len(masks)
    assert {p.mask for p in asked} == masks
    assert best_final(record).mask == min(masks, key=lambda m: landscape.evaluate(m).order)
    assert all(batch.survivors is None for batch, _ in record)


def test_packable_spaces_are_searched_whole() -> None:
    space, landscape = SPACES["packable"], Landscape(14)
    searcher = build_searcher("exhaustive", space, landscape.hints(), np.random.default_rng(0), {})
    asked = proposals(drive(searcher, lambda p: landscape.evaluate(p.mask)))
    assert {p.mask for p in asked} == every_mask(space)


def test_the_likely_masks_come_first() -> None:
    space = toy(8)
    for seed in range(3):
        landscape = Landscape(16, seed)
        hints = landscape.hints()
        searcher = build_searcher("exhaustive", space, hints, np.random.default_rng(0), {})
        asked = [p.mask for p in proposals(drive(searcher, unreliable(landscape, 0.0)))]
        influence = [
            sum(1 - hints.cosine[start][stop] for start, stop in mask.runs) for mask in asked
        ]
        assert influence == sorted(influence)
        order = {mask: place for place, mask in enumerate(asked)}
        best = sorted(asked, key=lambda mask: landscape.evaluate(mask).order)[:20]
        assert np.mean([order[mask] for mask in best]) < len(asked) / 3


def test_a_race_keeps_the_survivors_asked_for() -> None:
    space, landscape = SPACES["sublayer"], Landscape(12)
    options = {"survivors": 3, "batch": 10}
    rng = np.random.default_rng(0)
    searcher = build_searcher("exhaustive", space, landscape.hints(), rng, options)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask))
    known: list[Mask] = []
    for batch, _ in record:
        known.sort(key=lambda mask: landscape.evaluate(mask).order)
        assert batch.survivors == 3
        assert list(batch.rivals) == known[:3]
        known += [proposal.mask for proposal in batch.proposals]


def test_a_space_too_large_to_list_is_refused_with_its_limit() -> None:
    for space, options, limit in (
        (toy(30), {}, "more than 20,000 of"),
        (SPACES["sublayer"], {"most": 135}, "more than 135 of"),
    ):
        hints = Landscape(len(space.sites)).hints()
        with pytest.raises(ConfigError, match=limit) as caught:
            build_searcher("exhaustive", space, hints, np.random.default_rng(0), options)
        assert "\n" not in str(caught.value)
        assert f"2^{len(space.genes)}" in str(caught.value)
    space = SPACES["sublayer"]
    hints = Landscape(12).hints()
    build_searcher("exhaustive", space, hints, np.random.default_rng(0), {"most": 136})


@pytest.mark.parametrize("options", [{"most": 0}, {"batch": 0}, {"survivors": 0}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    space = SPACES["sublayer"]
    with pytest.raises(ConfigError, match="is at least 1: got 0"):
        build_searcher(
            "exhaustive", space, Landscape(12).hints(), np.random.default_rng(0), options
        )
