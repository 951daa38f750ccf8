"""Small spaces against brute force over every subset of their genes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from depthsearch.errors import BudgetError, MaskError
from depthsearch.space import Budget, CostTable, Mask, SearchSpace, Site, SiteCosts


def build(
    blocks: int = 4,
    budget: Budget | None = None,
    granularity: str = "sublayer",
    protected: tuple[int, ...] = (),
    packable: bool = False,
    costs: SiteCosts | None = None,
    stacks: tuple[str, ...] = ("decoder",),
) -> SearchSpace:
    """A space whose attention costs 10 + block and whose FFN costs 30 - block, 100 fixed."""
    sites: list[Site] = []
    for stack in stacks:
        for block in range(blocks):
            sites.append(Site(len(sites), stack, block, "attention"))
            sites.append(Site(len(sites), stack, block, "ffn"))
    amounts = tuple(10 + s.block if s.kind == "attention" else 30 - s.block for s in sites)
    kv = tuple(4 if s.kind == "attention" else 0 for s in sites)
    return SearchSpace(
        tuple(sites),
        CostTable({"params": costs or SiteCosts(100, amounts), "kv_bytes": SiteCosts(0, kv)}),
        budget or Budget("params", ratio=0.6, of="blocks"),
        granularity,  # type: ignore[arg-type]
        frozenset(protected),
        packable,
    )


PARALLEL = SiteCosts(
    50, (7, 20, 8, 19, 9, 18, 10, 17), tuple(((i, i + 1), 3) for i in (0, 2, 4, 6))
)
TWICE_SHARED = SiteCosts(0, (5,) * 8, (((0, 1), 2), ((0, 1), 3), ((2, 3, 4, 5), 6)))
ONE_CACHE = SiteCosts(0, (4, 0, 0, 0, 0, 0, 4, 0), (((2, 4), 4),))

SPACES = {
    "sublayer": build(),
    "five blocks": build(5, Budget("params", ratio=0.75, of="model")),
    "six blocks": build(6, Budget("params", ratio=0.3, of="blocks")),
    "absolute cap": build(4, Budget("params", cap=187)),
    "everything fits": build(3, Budget("params", ratio=1.0)),
    "only the smallest fits": build(3, Budget("params", cap=100)),
    "count of sites": build(5, Budget("sites", drop=4)),
    "all but one site": build(3, Budget("sites", drop=5)),
    "kv bytes": build(5, Budget("kv_bytes", ratio=0.5)),
    "protected": build(5, protected=(0, 1, 9)),
    "blocks": build(6, Budget("blocks", drop=2), "block"),
    "blocks by parameters": build(6, granularity="block", protected=(3,)),
    "blocks by sites": build(6, Budget("sites", drop=5), "block"),
    "attention": build(6, Budget("kv_bytes", ratio=0.6), "attention"),
    "attention, one protected": build(6, Budget("kv_bytes", ratio=0.6), "attention", (4,)),
    "ffn": build(6, Budget("params", cap=250), "ffn", (5,)),
    "packable": build(5, packable=True),
    "packable, counted": build(5, Budget("sites", drop=3), packable=True),
    "packable, odd stretches": build(6, Budget("params", cap=243), protected=(3, 8), packable=True),
    "packable, only the smallest": build(
        6, Budget("params", cap=178), protected=(3, 8), packable=True
    ),
    "packable blocks": build(5, granularity="block", packable=True),
    "packable, two stacks": build(
        3, Budget("params", ratio=0.5, of="blocks"), packable=True, stacks=("encoder", "decoder")
    ),
    "packable, two stacks, protected ends": build(
        3, Budget("sites", drop=5), "sublayer", (0, 11), True, stacks=("encoder", "decoder")
    ),
    "two stacks": build(3, Budget("sites", drop=3), stacks=("encoder", "decoder")),
    "parallel": build(costs=PARALLEL),
    "parallel, packable": build(costs=PARALLEL, packable=True, protected=(3,)),
    "parallel blocks": build(costs=PARALLEL, granularity="block"),
    "two shared parts": build(costs=TWICE_SHARED, budget=Budget("params", ratio=0.55)),
    "one cache for two": build(costs=ONE_CACHE, budget=Budget("params", cap=4)),
}


def members(space: SearchSpace) -> list[Mask]:
    """Every mask of the space, by definition: whole genes dropped, alternating where demanded."""
    found = []
    for choice in product((True, False), repeat=len(space.genes)):
        gone = [i for gene, kept in zip(space.genes, choice, strict=True) if not kept for i in gene]
        mask = Mask.dropping(len(space.sites), gone)
        kinds: dict[str, str] = {}
        for i in mask.kept:
            site = space.sites[i]
            kinds[site.stack] = kinds.get(site.stack, "") + site.kind[0]
        if not space.packable or all(k == "af" * (len(k) // 2) for k in kinds.values()):
            found.append(mask)
    return found


def above(larger: Mask, smaller: Mask) -> bool:
    """Whether `larger` keeps everything that `smaller` keeps, and more."""
    return larger != smaller and set(larger.kept) > set(smaller.kept)


def optimal(space: SearchSpace, masks: list[Mask]) -> set[Mask]:
    """The masks that fit and have no larger mask of the space that fits."""
    fitting = [mask for mask in masks if space.cost(mask) <= space.cap]
    return {m for m in fitting if not any(above(other, m) for other in fitting)}


@pytest.fixture(params=SPACES, name="space")
def each_space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def test_on_budget_and_enumerate_equal_brute_force(space: SearchSpace) -> None:
    masks = members(space)
    wanted = optimal(space, masks)
    every = [Mask(k) for k in product((True, False), repeat=len(space.sites))]
    assert {m for m in every if space.contains(m)} == set(masks)
    assert {m for m in every if space.on_budget(m)} == wanted
    listed = space.enumerate()
    assert listed is not None
    assert set(listed) == wanted
    assert len(listed) == len(set(listed))


def test_smallest_is_the_cheapest_mask_of_the_space(space: SearchSpace) -> None:
    smallest = space.smallest()
    assert space.contains(smallest)
    assert space.cost(smallest) == min(space.cost(mask) for mask in members(space))


def test_units_are_the_covers_of_the_order_of_masks(space: SearchSpace) -> None:
    masks = members(space)
    rng = np.random.default_rng(3)
    for place in rng.choice(len(masks), size=min(25, len(masks)), replace=False):
        mask = masks[place]
        larger = [m for m in masks if above(m, mask)]
        smaller = [m for m in masks if above(mask, m)]
        next_up = {m for m in larger if not any(above(m, other) for other in larger)}
        next_down = {m for m in smaller if not any(above(other, m) for other in smaller)}
        cheaper = {m for m in next_down if space.cost(m) < space.cost(mask)}
        assert set(space.additions(mask)) == next_up
        assert set(space.removals(mask)) == (cheaper or next_down)


def test_decode_reaches_every_mask_on_budget_and_no_other(space: SearchSpace) -> None:
    wanted = optimal(space, members(space))
    for mask in wanted:
        assert space.decode([float(mask.keep[gene[0]]) for gene in space.genes]) == mask
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert space.decode(rng.normal(size=len(space.genes)).tolist()) in wanted


def test_repair_and_fill_end_on_budget(space: SearchSpace) -> None:
    masks = members(space)
    wanted = optimal(space, masks)
    rng = np.random.default_rng(1)
    for _ in range(50):
        any_mask = Mask(tuple(bool(k) for k in rng.integers(0, 2, size=len(space.sites))))
        assert space.repair(any_mask, rng) in wanted
        assert space.repair(space.dense, rng, avoid=frozenset({0, 3})) in wanted
        fitting = [m for m in masks if space.fits(m)]
        start = fitting[int(rng.integers(len(fitting)))]
        filled = space.fill(start, rng.normal(size=len(space.genes)).tolist())
        assert filled in wanted
        assert filled == start or above(filled, start)


def test_windows_come_from_the_shortest_contiguous_run_of_each_start(space: SearchSpace) -> None:
    kinds = {"attention": ("attention",), "ffn": ("ffn",)}.get(
        space.granularity, ("attention", "ffn")
    )
    line = [s.index for s in space.sites if s.kind in kinds]
    runs = []
    for start in range(len(line)):
        for stop in range(start + 1, len(line) + 1):
            mask = Mask.dropping(len(space.sites), line[start:stop])
            if len({space.sites[i].stack for i in line[start:stop]}) > 1:
                break
            if space.contains(mask) and space.fits(mask):
                runs.append(set(mask.dropped))
                break
    windows = space.windows()
    wanted = optimal(space, members(space))
    assert set(windows) <= wanted
    assert len(set(windows)) == len(windows)
    for window in windows:
        assert any(run.issuperset(window.dropped) for run in runs)
    for run in runs:
        assert any(run.issuperset(window.dropped) for window in windows)


def test_windows_of_equal_sites_are_exactly_the_runs() -> None:
    windows = build(5, Budget("sites", drop=3)).windows()
    assert [w.runs for w in windows] == [((s, s + 3),) for s in range(8)]
    even = build(5, Budget("sites", drop=3), packable=True).windows()
    assert [w.runs for w in even] == [((s, s + 4),) for s in range(7)]


def test_windows_lose_their_ends_before_what_is_inside() -> None:
    costs = SiteCosts(0, (5, 5, 30, 12, 30, 100))
    windows = build(3, Budget("params", cap=120), costs=costs).windows()
    # Of the first five 20 too many go: both sites of the first block, or the first and the fourth.
    assert [w.dropped for w in windows] == [(2, 3, 4), (5,)]


def test_a_window_is_filled_inside_where_its_ends_do_not_fit() -> None:
    heavy = SiteCosts(0, (10, 30, 10, 30, 10, 30))
    windows = build(3, Budget("params", cap=60), costs=heavy).windows()
    assert [w.key for w in windows] == ["101011", "111010"]


def test_a_window_of_attentions_does_not_jump_over_a_protected_one() -> None:
    space = build(6, Budget("kv_bytes", ratio=0.67), "attention", protected=(4,))
    assert [w.dropped for w in space.windows()] == [(0, 2), (6, 8), (8, 10)]


def test_enumerate_gives_up_on_a_large_space() -> None:
    assert build(30).enumerate(limit=300) is None
    small = build(5, Budget("sites", drop=4))
    assert small.enumerate(limit=209) is None
    assert len(small.enumerate(limit=210) or ()) == 210


DEEP: dict[str, tuple[SearchSpace, int]] = {
    "two of 24 blocks": (build(24, Budget("blocks", drop=2), "block"), 276),
    "three of 28 blocks": (build(28, Budget("sites", drop=6), "block"), 3276),
    "two of 30 caches": (build(30, Budget("kv_bytes", ratio=28 / 30)), 435),
    "a block's worth of pairs": (
        build(30, Budget("params", ratio=29 / 30, of="blocks"), packable=True),
        59,
    ),
    "two blocks' worth of pairs": (
        build(30, Budget("params", ratio=28 / 30, of="blocks"), packable=True),
        1653,
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_few_masks_are_listed_however_deep_the_model(name: str) -> None:
    space, count = DEEP[name]
    masks = space.enumerate()
    assert masks is not None
    assert len(set(masks)) == len(masks) == count
    assert all(space.on_budget(mask) for mask in masks)
    assert [mask.key for mask in masks] == sorted((mask.key for mask in masks), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "cheapest"),
    [
        ({"budget": Budget("params", cap=99)}, "100"),
        ({"budget": Budget("params", cap=150), "protected": (0, 1, 2)}, "151"),
        ({"budget": Budget("sites", drop=8), "protected": (0,)}, "1"),
        ({"budget": Budget("kv_bytes", ratio=0.2), "granularity": "ffn"}, "16"),
        ({"budget": Budget("params", cap=120), "protected": (1,), "packable": True}, "140"),
        ({"budget": Budget("params", cap=84), "costs": PARALLEL, "protected": (3, 6)}, "85"),
    ],
)
def test_an_unreachable_budget_names_the_cheapest_reachable_cost(
    arguments: dict[str, object], cheapest: str
) -> None:
    with pytest.raises(BudgetError, match=rf"cheapest mask of this space costs {cheapest} \("):
        build(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"granularity": "layer"}, MaskError, "unknown granularity 'layer': expected one of sub"),
        ({"budget": Budget("blocks", drop=1)}, BudgetError, "set 'granularity: block'"),
        ({"granularity": "ffn", "packable": True}, MaskError, "packable space cannot drop only"),
        ({"protected": tuple(range(8))}, MaskError, "every site is protected"),
        ({"protected": (8,)}, MaskError, "protected site 8"),
    ],
)
def test_a_space_that_cannot_exist_is_refused(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(**arguments)  # type: ignore[arg-type]


def test_a_model_that_does_not_alternate_cannot_be_packable() -> None:
    sites = tuple(
        Site(i, "decoder", i // 3, kind)
        for i, kind in enumerate(("attention", "cross_attention", "ffn") * 2)
    )
    costs = CostTable({"params": SiteCosts(0, (1,) * 6)})
    with pytest.raises(MaskError, match=r"does not alternate .* 'packable: false'"):
        SearchSpace(sites, costs, Budget("sites", drop=2), packable=True)
    space = SearchSpace(sites, costs, Budget("sites", drop=2), "attention")
    assert space.genes == ((0,), (1,), (3,), (4,))


def test_keys_and_masks_of_the_wrong_length_are_refused() -> None:
    space = build()
    with pytest.raises(MaskError, match="expected one key for each of 8 genes: got 3"):
        space.decode([0.0] * 3)
    with pytest.raises(MaskError, match="got a mask of 4 sites: the space has 8"):
        space.repair(Mask.dense(4), np.random.default_rng(0))
    assert not space.contains(Mask.dense(4))


def test_equal_keys_and_seeds_give_equal_masks() -> None:
    space = build(6)
    keys = np.random.default_rng(5).normal(size=12).tolist()
    assert space.decode(keys) == space.decode(keys)
    one, other = (space.repair(space.dense, np.random.default_rng(9)) for _ in range(2))
    assert one == other


def test_repair_avoids_what_it_is_told_to_avoid() -> None:
    space = build(5, Budget("sites", drop=4))
    start = Mask.dropping(10, range(7))
    for seed in range(20):
        mask = space.repair(start, np.random.default_rng(seed), avoid=frozenset({0, 1, 2, 3}))
        assert mask.dropped == (0, 1, 2, 3)


def test_json_round_trip_keeps_the_fingerprint(space: SearchSpace) -> None:
    again = SearchSpace.from_json(space.to_json())
    assert again == space
    assert again.fingerprint == space.fingerprint
    assert build(4, Budget("params", cap=186)).fingerprint != build(4).fingerprint
