"""Monte Carlo tree search: selection worked by hand, transpositions, and what it finds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
from landscapes import SPACES, Landscape, best_final, drive, proposals, toy, unreliable

from depthsearch.errors import ConfigError
from depthsearch.searchers import build_searcher, cheap_baselines
from depthsearch.searchers.mask_tree import MaskTree
from depthsearch.searchers.mcts import MctsSearcher, Rollouts
from depthsearch.space import Budget, Evaluation, Hints, Mask, SearchSpace, Status


def mcts(
    space: SearchSpace,
    landscape: Landscape,
    options: Mapping[str, object] | None = None,
    seed: int = 0,
) -> MctsSearcher:
    searcher = build_searcher(
        "mcts", space, landscape.hints(), np.random.default_rng(seed), options or {}
    )
    assert isinstance(searcher, MctsSearcher)
    return searcher


def told(mask: Mask, loss: float) -> Evaluation:
    return Evaluation(mask, (loss,), 1)


def without(space: SearchSpace, *genes: int) -> Mask:
    return space.dense.without([i for gene in genes for i in space.genes[gene]])


@pytest.fixture
def pair() -> SearchSpace:
    """Drop 2 of 4 attention sublayers: six masks."""
    return toy(4, Budget("kv_bytes", ratio=0.5), "attention")


@pytest.fixture
def tree(pair: SearchSpace) -> MaskTree:
    """Two children of the root, A (without gene 0) and B (without gene 1).

    One mask is known below each: without 0 and 3, loss 1, and without 1 and 3, loss 9.
    """
    tree = MaskTree(pair, exploration=0.5, widening=0.0)
    tree.guide([0.0, 1.0, 2.0, 3.0])
    for genes in ((0, 3), (1, 3)):
        path = tree.select()
        assert path is not None
        assert [node.mask for node in path] == [pair.dense, without(pair, genes[0])]
        tree.wait(without(pair, *genes), path)
    tree.learn(told(without(pair, 0, 3), 1.0))
    tree.learn(told(without(pair, 1, 3), 9.0))
    return tree


def test_values_and_bounds_by_hand(pair: SearchSpace, tree: MaskTree) -> None:
    a, b = (tree.root.edges[without(pair, gene)] for gene in (0, 1))
    np.testing.assert_allclose(tree.rewards(), [3 / 4, 1 / 4])
    assert [tree.value(node) for node in (tree.root, a.child, b.child)] == [5 / 8, 3 / 4, 1 / 4]
    root = math.sqrt(math.log(2))
    assert tree.bound(tree.root, a) == pytest.approx(3 / 4 + 0.5 * root)
    assert tree.bound(tree.root, b) == pytest.approx(1 / 4 + 0.5 * root)


def test_a_virtual_loss_sends_the_second_leaf_of_a_batch_elsewhere(
    pair: SearchSpace, tree: MaskTree
) -> None:
    first = tree.select()
    assert first is not None
    assert [node.mask for node in first] == [pair.dense, without(pair, 0), without(pair, 0, 1)]
    tree.wait(first[-1].mask, first)

    a, b = (tree.root.edges[without(pair, gene)] for gene in (0, 1))
    # One selection of three waits below A: its reward of 3/4 is halved, its visits are two.
    # Either change alone would leave A ahead.
    assert tree.bound(tree.root, a) == pytest.approx(3 / 8 + 0.5 * math.sqrt(math.log(3) / 2))
    assert tree.bound(tree.root, b) == pytest.approx(1 / 4 + 0.5 * math.sqrt(math.log(3)))
    second = tree.select()
    assert second is not None
    assert [node.mask for node in second] == [pair.dense, without(pair, 1), without(pair, 1, 2)]
    tree.wait(second[-1].mask, second)

    tree.learn(told(first[-1].mask, 0.5))
    tree.learn(told(second[-1].mask, 10.0))
    assert tree.root.waiting == a.waiting == b.waiting == 0
    # Rewards are now 5/8, 3/8, 7/8 and 1/8; the best is below A and below B.
    assert tree.value(a.child) == pytest.approx((3 / 4 + 7 / 8) / 2)
    assert tree.value(b.child) == pytest.approx((11 / 24 + 7 / 8) / 2)
    assert tree.bound(tree.root, a) == pytest.approx(13 / 16 + 0.5 * math.sqrt(math.log(4) / 2))


def test_two_orders_reach_one_node_and_a_loss_counts_once(
    pair: SearchSpace, tree: MaskTree
) -> None:
    both = without(pair, 0, 1)
    for _ in range(2):
        path = tree.select()
        assert path is not None
        tree.wait(path[-1].mask, path)
    tree.learn(told(both, 0.5))
    tree.forget_waiting()
    data = tree.to_json()
    node = data["nodes"][both.key]
    into = {edge["parent"]: edge["visits"] for edge in data["edges"] if edge["child"] == both.key}
    # B tried the removal too, found the mask proposed, and took another: no visit, no second loss.
    assert into == {without(pair, 0).key: 1, without(pair, 1).key: 0}
    assert (node["visits"], node["evaluated"], node["best_loss"]) == (1, 1, 0.5)
    for key, evaluated, visits in ((pair.dense.key, 3, 3), (without(pair, 0).key, 2, 2)):
        assert (data["nodes"][key]["evaluated"], data["nodes"][key]["visits"]) == (
            evaluated,
            visits,
        )
    other = data["nodes"][without(pair, 1).key]
    assert (other["evaluated"], other["visits"]) == (2, 1)
    assert (other["best_mask"], other["best_loss"]) == (both.key, 0.5)
    assert other["mean_loss"] == pytest.approx((9.0 + 0.5) / 2)


def test_what_is_known_below_reorders_the_untried(pair: SearchSpace) -> None:
    tree = MaskTree(pair, 0.5, 1.0)
    tree.guide([0.0, 0.1, 0.2, 0.3])
    tree.learn(told(without(pair, 2, 3), 1.0))
    tree.learn(told(without(pair, 0, 1), 4.0))
    # Rewards are 3/4 and 1/4, keys weigh 4 masks: 0.75/5, 1.15/5, 1.05/5 and 1.45/5.
    for _ in range(5):
        path = tree.select()
        assert path is not None
        tree.repeat(path)
    assert list(tree.root.edges) == [without(pair, gene) for gene in (0, 2, 1, 3)]


def test_failures_are_worst_and_lost_races_are_paired(pair: SearchSpace) -> None:
    tree = MaskTree(pair, 0.5, 0.5)
    tree.learn(Evaluation(without(pair, 0, 1), (), 0, Status.FAILED))
    tree.learn(Evaluation(without(pair, 0, 2), (), 0, Status.NON_FINITE))
    tree.learn(Evaluation(without(pair, 0, 3), (1.0, 5.0), 2))
    # Lost after the first sequence, where it was 0.5 worse than the best: not a loss of 1.5.
    tree.learn(Evaluation(without(pair, 1, 2), (1.5,), 1, Status.ELIMINATED))
    tree.learn(Evaluation(without(pair, 1, 3), (3.2, 3.2), 2))
    np.testing.assert_allclose(tree.losses(), [np.inf, np.inf, 3.0, 3.5, 3.2])
    np.testing.assert_allclose(tree.rewards(), [0, 0, 0.9, 0.5, 0.7])


def test_a_cut_selection_is_taken_back(pair: SearchSpace, tree: MaskTree) -> None:
    before = tree.to_json()
    path = tree.select()
    assert path is not None
    tree.wait(path[-1].mask, path)
    assert tree.root.waiting == 1
    tree.forget_waiting()
    after = tree.to_json()
    for key, node in before["nodes"].items():
        assert after["nodes"][key] == node


@pytest.mark.parametrize("widening", [0.0, 0.5, 1.0])
def test_a_node_widens_with_its_visits(widening: float) -> None:
    tree = MaskTree(toy(30), 0.5, widening)
    for count in range(30):
        path = tree.select()
        assert path is not None
        tree.repeat(path)
        allowed = math.ceil(2 * max(count, 1) ** widening)
        assert len(tree.root.edges) == min(count + 1, allowed)


@pytest.mark.parametrize("name", SPACES)
def test_rollouts_are_on_budget_and_below_their_node_where_no_removal_overshoots(name: str) -> None:
    space = SPACES[name]
    rollouts = Rollouts(space, np.random.default_rng(0), [0.1] * len(space.genes))
    tree = MaskTree(space, 0.5, 0.5)
    for _ in range(20):
        path = tree.select()
        if path is None:
            break
        for mask in rollouts.draw(path[-1].mask, path[-1].final):
            assert space.on_budget(mask)
            if name not in ("sublayer", "packable", "packable_protected", "sublayer_kv"):
                assert set(mask.dropped).issuperset(path[-1].mask.dropped)
        tree.repeat(path)


@pytest.mark.parametrize("name", SPACES)
def test_the_tree_is_plain_data_that_agrees_with_what_was_told(name: str) -> None:
    space = SPACES[name]
    landscape = Landscape(len(space.sites))
    searcher = mcts(space, landscape, {"batch": 5})
    record = drive(searcher, unreliable(landscape, 0.2), limit=60)
    data = searcher.tree()
    assert searcher.tree() == data == json.loads(json.dumps(data))
    known = {e.mask: e for batch, es in record for e in es if space.on_budget(e.mask)}
    for key, node in data["nodes"].items():
        mask = Mask.from_key(key)
        assert space.contains(mask)
        assert node["final"] == space.on_budget(mask)
        assert node["final"] or not space.fits(mask)
        assert node["waiting"] == 0
        below = [e for m, e in known.items() if set(mask.dropped) <= set(m.dropped)]
        assert node["evaluated"] == len(below)
        best = min((e for e in below if e.status is Status.OK), key=lambda e: e.order, default=None)
        if best is not None and all(e.status is not Status.ELIMINATED for e in below):
            assert (node["best_mask"], node["best_loss"]) == (best.mask.key, best.loss)
    for edge in data["edges"]:
        parent, child = Mask.from_key(edge["parent"]), Mask.from_key(edge["child"])
        assert child in space.removals(parent)
        assert edge["visits"] <= min(data["nodes"][m.key]["visits"] for m in (parent, child))


def test_looking_changes_nothing() -> None:
    space, landscape = SPACES["sublayer"], Landscape(12)
    plain, looked = mcts(space, landscape), mcts(space, landscape)
    for _ in range(8):
        batch = plain.ask()
        looked.tree()
        assert looked.ask() == batch
        looked.tree()
        for searcher in (plain, looked):
            searcher.tell([landscape.evaluate(p.mask) for p in batch.proposals])


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_masks_do_not_depend_on_how_a_batch_is_cut(batch: int) -> None:
    space, landscape = toy(12), Landscape(24)
    asked = []
    for n in (None, 1, 3, 7):
        searcher = mcts(space, landscape, {"batch": batch})
        found = proposals(drive(searcher, unreliable(landscape, 0.2), n=n, limit=140))[:140]
        asked.append(found)
    assert asked[0] == asked[1] == asked[2] == asked[3]


def test_a_batch_holds_as_many_masks_as_the_option_says() -> None:
    space, landscape = toy(12), Landscape(24)
    for size in (1, 6):
        options = {"batch": size, "sweep": False, "baselines": False}
        record = drive(
            mcts(space, landscape, options), lambda p: landscape.evaluate(p.mask), limit=60
        )
        assert {len(batch.proposals) for batch, _ in record} == {size}
        assert all(p.final and p.origin.startswith("mcts ") for p in proposals(record))


def test_starts_from_baselines_and_a_sweep_whose_paths_are_in_the_tree() -> None:
    space, landscape = toy(12), Landscape(24)
    searcher = mcts(space, landscape)
    baselines = cheap_baselines(space, landscape.hints())
    first = searcher.ask()
    assert first.proposals == baselines
    searcher.tell([landscape.evaluate(p.mask) for p in first.proposals])
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=50)
    sweep = [p for p in proposals(record) if not p.final]
    assert [p.mask for p in sweep] == [space.dense, *space.removals(space.dense)]
    nodes = searcher.tree()["nodes"]
    for proposal in baselines:
        assert nodes[proposal.mask.key]["visits"] >= 1
        assert nodes[proposal.mask.key]["best_mask"] == proposal.mask.key


def test_removals_that_meet_the_budget_do_not_race_with_larger_masks() -> None:
    # Any one of four FFNs is enough, or three of the attentions.
    space = toy(4, Budget("params", cap=23))
    searcher = mcts(space, Landscape(8), {"baselines": False})
    record = drive(searcher, lambda p: Landscape(8).evaluate(p.mask), limit=9)
    final, larger = (batch for batch, _ in record)
    assert [p.mask for p in final.proposals] == [without(space, gene) for gene in (1, 3, 5, 7)]
    assert [p.mask for p in larger.proposals] == [
        space.dense,
        *(without(space, gene) for gene in (0, 2, 4, 6)),
    ]
    assert larger.rivals == ()
    assert final.survivors == larger.survivors == 4


def best_loss(
    method: str, space: SearchSpace, landscape: Landscape, hints: Hints, options: dict[str, object]
) -> float:
    rng = np.random.default_rng(landscape.seed)
    searcher = build_searcher(method, space, hints, rng, options)
    record = drive(searcher, lambda p: landscape.evaluate(p.mask), limit=160)
    loss = best_final(record).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("seed", range(3))
def test_beats_random_at_equal_evaluations(seed: int) -> None:
    space, landscape = toy(30), Landscape(60, seed, 0.3)
    hints = landscape.hints()
    search = best_loss("mcts", space, landscape, hints, {"baselines": False})
    assert search < 0.8 * best_loss("random", space, landscape, hints, {})


@pytest.mark.parametrize("seed", range(3))
def test_the_tree_learns_where_guidance_tells_nothing(seed: int) -> None:
    space, landscape = toy(30), Landscape(60, seed, 0.3)
    flat = Hints(((0.5,) * 61,) * 61, ((0.5,) * 61,) * 61)
    options: dict[str, object] = {"baselines": False, "sweep": False}
    search = best_loss("mcts", space, landscape, flat, options)
    assert search < best_loss("random", space, landscape, flat, {}) - 0.1


def test_finds_the_optimum_in_a_twentieth_of_the_space() -> None:
    """Of 1,289 masks, without baselines; random drawing needs about half of them."""
    space = toy(8)
    masks = space.enumerate()
    assert masks is not None
    for seed in range(4):
        landscape = Landscape(16, seed, 0.3)
        best = min(masks, key=lambda mask: landscape.evaluate(mask).order)
        searcher = mcts(space, landscape, {"baselines": False, "batch": 4}, seed)
        record = drive(searcher, unreliable(landscape, 0.0), limit=len(masks) // 20)
        assert best_final(record).mask == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "'batch' is at least 1: got 0"),
        ({"exploration": -0.1}, "'exploration' is at least 0: got -0.1"),
        ({"widening": 1.5}, "'widening' is at most 1: got 1.5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mcts(SPACES["sublayer"], Landscape(12), options)
