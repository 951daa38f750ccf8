"""Property tests: whatever the space, what comes out of it is on budget."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthsearch.errors import BudgetError, MaskError
from depthsearch.space import (
    METRICS,
    Budget,
    CostTable,
    Mask,
    SearchSpace,
    Site,
    SiteCosts,
    cost_text,
    is_packable,
)
from depthsearch.space.packing import new_blocks

SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def tables(draw: st.DrawFn, sites: tuple[Site, ...]) -> CostTable:
    """Unequal costs, with a shared norm for each block where blocks are parallel."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    attention, ffn, spread = draw(st.tuples(*[st.integers(1, 5000)] * 3))
    parallel = draw(st.booleans())
    members: dict[tuple[str, int], list[int]] = {}
    for site in sites:
        members.setdefault((site.stack, site.block), []).append(site.index)
    shared = tuple((tuple(m), int(rng.integers(1, 100))) for m in members.values())

    def costs(scale: int) -> SiteCosts:
        amounts = tuple(
            scale * ((ffn if s.kind == "ffn" else attention) + int(rng.integers(spread)))
            for s in sites
        )
        return SiteCosts(int(rng.integers(10_000)), amounts, shared if parallel else ())

    cache = SiteCosts(0, tuple(0 if s.kind == "ffn" else 384 for s in sites))
    return CostTable(
        {
            "params": costs(1),
            "bytes": costs(2),
            "flops": costs(2),
            "kv_bytes": cache,
            "latency": costs(1000),
        }
    )


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces of every granularity and metric, up to 60 sites, that can meet their budget."""
    granularity = draw(st.sampled_from(["sublayer", "block", "attention", "ffn"]))
    packable = granularity in ("sublayer", "block") and draw(st.booleans())
    kinds = ["attention", "cross_attention", "ffn"]
    if packable or draw(st.booleans()):
        kinds.remove("cross_attention")
    names = draw(st.sampled_from([("decoder",), ("encoder", "decoder")]))
    blocks = draw(st.integers(2, 60 // len(kinds) // len(names)))
    layout = [(stack, block, kind) for stack in names for block in range(blocks) for kind in kinds]
    sites = tuple(Site(i, *place) for i, place in enumerate(layout))  # type: ignore[arg-type]
    protected = draw(st.frozensets(st.integers(0, len(sites) - 1), max_size=8))
    table = draw(tables(sites))

    metric = draw(st.sampled_from([*METRICS, "sites", "blocks"]))
    if metric == "blocks" and granularity != "block":
        metric = "sites"
    if metric in ("sites", "blocks"):
        budget = Budget(metric, drop=draw(st.integers(1, blocks)))
    elif draw(st.booleans()):
        budget = Budget(
            metric,
            ratio=draw(st.floats(0.05, 1.0)),
            of=draw(st.sampled_from(["model", "blocks"])),
        )
    else:
        budget = Budget(metric, cap=draw(st.integers(1, max(1, table.total(metric)))))
    try:
        return SearchSpace(sites, table, budget, granularity, protected, packable)
    except (BudgetError, MaskError):
        # Out of reach, or nothing left to drop: one site can always go when none is protected.
        relaxed = Budget("sites", drop=1)
        return SearchSpace(sites, table, relaxed, granularity, frozenset(), packable)


def demand_on_budget(space: SearchSpace, mask: Mask) -> None:
    """On budget from first principles: in the space, within the cap, nothing could come back."""
    assert not space.protected.intersection(mask.dropped)
    for gene in space.genes:
        assert len({mask.keep[i] for i in gene}) == 1
    assert space.cost(mask) <= space.cap
    if space.packable:
        assert is_packable(mask, space.sites)
    gone = [gene for gene in space.genes if not mask.keep[gene[0]]]
    singles = [mask.with_(gene) for gene in gone]
    doubles = [mask.with_(a + b) for n, a in enumerate(gone) for b in gone[n + 1 :]]
    for larger in singles + (doubles if space.packable else []):
        if not space.packable or is_packable(larger, space.sites):
            assert space.cost(larger) > space.cap
    assert space.on_budget(mask)


@SLOW
@given(spaces(), st.integers(0, 2**32 - 1))
def test_decode_repair_fill_and_windows_are_on_budget(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = len(space.genes)
    decoded = space.decode(rng.normal(size=count).tolist())
    demand_on_budget(space, decoded)
    demand_on_budget(space, space.decode([0.0] * count))
    assert space.decode([float(decoded.keep[gene[0]]) for gene in space.genes]) == decoded

    anything = Mask(tuple((rng.random(len(space.sites)) < rng.random()).tolist()))
    demand_on_budget(space, space.repair(anything, rng))
    demand_on_budget(space, space.repair(decoded.without([0]), rng, avoid=frozenset({0})))
    assert space.repair(decoded, rng) == decoded
    demand_on_budget(space, space.fill(space.smallest(), rng.normal(size=count).tolist()))
    for window in space.windows():
        demand_on_budget(space, window)


@SLOW
@given(spaces(), st.integers(0, 2**32 - 1))
def test_units_stay_in_the_space_and_move_the_cost(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = space.decode(rng.normal(size=len(space.genes)).tolist())
    assert space.contains(space.smallest())
    assert space.cost(space.smallest()) <= space.cost(mask) <= space.cap
    for larger in space.additions(mask):
        assert space.contains(larger)
        assert space.cost(larger) > space.cap
        assert mask in space.removals(larger)
    for smaller in space.removals(mask):
        assert space.contains(smaller)
        assert space.cost(smaller) < space.cost(mask)
        assert mask in space.additions(smaller)


@SLOW
@given(spaces())
def test_costs_add_up_and_spaces_survive_json(space: SearchSpace) -> None:
    table = space.costs
    for metric in METRICS:
        costs = table.of(metric)
        assert table.cost(metric, space.dense) == table.total(metric)
        nothing = Mask((False,) * len(space.sites))
        assert table.cost(metric, nothing) == costs.fixed
        assert table.total(metric) - costs.fixed == costs.blocks
    again = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.fingerprint == space.fingerprint


@SLOW
@given(spaces())
def test_a_budget_below_the_smallest_mask_is_refused(space: SearchSpace) -> None:
    least = space.cost(space.smallest())
    metric = space.budget.metric
    if metric not in METRICS or least < 2:
        return
    with pytest.raises(BudgetError, match=re.escape(f"costs {cost_text(metric, least)} ")):
        SearchSpace(
            space.sites,
            space.costs,
            Budget(metric, cap=least - 1),
            space.granularity,
            space.protected,
            space.packable,
        )


@SLOW
@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_a_packable_mask_re_pairs_in_order(blocks: int, seed: int) -> None:
    sites = tuple(
        Site(i, "decoder", i // 2, ("attention", "ffn")[i % 2]) for i in range(2 * blocks)
    )
    rng = np.random.default_rng(seed)
    mask = Mask(tuple((rng.random(2 * blocks) < 0.7).tolist()))
    assert is_packable(mask, sites) == all((b - a) % 2 == 0 for a, b in mask.runs)
    if is_packable(mask, sites):
        (pairs,) = new_blocks(mask, sites)
        assert [i for a, f in pairs for i in (2 * a, 2 * f + 1)] == list(mask.kept)
        assert all(a <= f for a, f in pairs)
    else:
        with pytest.raises(MaskError, match="cannot be re-paired"):
            new_blocks(mask, sites)
