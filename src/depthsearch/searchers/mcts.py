"""Monte Carlo tree search over removals: which sublayer to drop first, second, third.

Selection by upper confidence bounds with progressive widening (`mask_tree.py`), then a rollout: the
selected node is completed to a mask on budget by greedy removal with noisy keys. Only masks on
budget are evaluated, several at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthsearch.errors import ConfigError
from depthsearch.searchers.baselines import cheap_baselines
from depthsearch.searchers.evolution import Elite
from depthsearch.searchers.mask_tree import MaskTree
from depthsearch.searchers.oneshot import rank_removals, removal_masks, removal_sweep
from depthsearch.searchers.options import at_least
from depthsearch.searchers.random import FreshMasks
from depthsearch.searchers.ranking import influence_keys, per_cost
from depthsearch.searchers.staged import Plan, StagedSearcher
from depthsearch.space import Batch, Evaluation, Hints, Mask, Proposal, SearchSpace

_SURVIVORS = 4
_SELECTIONS_A_LEAF = 10
_ROLLOUTS = 4
_NOISE = 0.2
_WIDTHS = (1, 2, 4, 8)
_FIRST = -1e6


@dataclass(frozen=True)
class MctsOptions:
    """How the tree is searched, and what it starts from.

    `batch` masks are selected one after another before their losses are needed; a search with
    another batch is another search. `exploration` weighs the bound's second term against rewards in
    [0, 1]; a node with v visits may have about v ** `widening` children. `sweep` measures every
    single removal first and lets that guide, instead of the hints alone; `baselines` starts from
    the cheap baselines and the paths to them.
    """

    batch: int = 16
    exploration: float = 0.2
    widening: float = 0.5
    sweep: bool = True
    baselines: bool = True

    def __post_init__(self) -> None:
        at_least(self, batch=1, exploration=0, widening=0)
        if self.widening > 1:
            raise ConfigError(f"option 'widening' is at most 1: got {self.widening!r}")


class MctsSearcher:
    """A `Searcher` whose tree can be looked at."""

    def __init__(
        self, space: SearchSpace, hints: Hints, rng: np.random.Generator, options: MctsOptions
    ) -> None:
        self._tree = MaskTree(space, options.exploration, options.widening)
        self._staged = StagedSearcher("mcts", mcts_plan(space, hints, rng, options, self._tree))

    @property
    def name(self) -> str:
        """The method's public name."""
        return self._staged.name

    def ask(self, n: int | None = None) -> Batch:
        """The next masks, at most `n`; how a batch is cut changes none of them."""
        return self._staged.ask(n)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn the losses of the last ask."""
        self._staged.tell(evaluations)
        for evaluation in evaluations:
            self._tree.learn(evaluation)

    def tree(self) -> dict[str, Any]:
        """The tree as plain data, see `MaskTree.to_json`; looking changes nothing."""
        return self._tree.to_json()


def mcts_plan(
    space: SearchSpace,
    hints: Hints,
    rng: np.random.Generator,
    options: MctsOptions,
    tree: MaskTree,
) -> Plan:
    """Baselines, a sweep of single removals, then batches of leaves until the space is exhausted.

    Every loss told has to be handed to `tree.learn` before the plan goes on.
    """
    fresh, elite = FreshMasks(space, rng), Elite(space, _SURVIVORS)
    keys = influence_keys(space, hints)
    planted: list[Mask] = []

    def take(proposals: Sequence[Proposal]) -> Batch:
        for proposal in proposals:
            fresh.add(proposal.mask)
            tree.wait(proposal.mask)
        return elite.batch(proposals)

    if options.baselines:
        seeds = cheap_baselines(space, hints)
        elite.learn((yield take(seeds)))
        planted += [proposal.mask for proposal in seeds]
    if options.sweep and not space.fits(space.dense):
        sweep = removal_sweep(space)
        # What meets the budget already is no rival of the others.
        final = [proposal for proposal in sweep.proposals if proposal.final]
        larger = [proposal for proposal in sweep.proposals if not proposal.final]
        answers = yield take(final)
        elite.learn(answers)
        survivors = max(_SURVIVORS, len(larger) // 4)
        answers = {**answers, **(yield Batch(take(larger).proposals, survivors))}
        ranking = rank_removals(space, hints, answers)
        keys = ranking.keys
        if options.baselines:
            suggested = removal_masks(space, ranking)
            elite.learn((yield take(suggested)))
            planted += [proposal.mask for proposal in suggested]

    rollouts = Rollouts(space, rng, keys)
    tree.guide(rollouts.order)
    for mask in planted:
        tree.plant(mask)
    best = elite.masks[:1]
    while True:
        found = _leaves(tree, rollouts, fresh, options.batch)
        for mask in fresh.take(options.batch - len(found)):
            found[mask] = "mcts random"
            tree.wait(mask)
        if not found:
            return
        elite.learn((yield elite.batch([Proposal(mask, why) for mask, why in found.items()])))
        tree.forget_waiting()
        if elite.masks[:1] != best:
            best = elite.masks[:1]
            tree.plant(best[0])


def _leaves(tree: MaskTree, rollouts: Rollouts, fresh: FreshMasks, count: int) -> dict[Mask, str]:
    """At most `count` new masks on budget and their origins, each selected knowing the others."""
    found: dict[Mask, str] = {}
    for _ in range(_SELECTIONS_A_LEAF * count):
        path = tree.select() if len(found) < count else None
        if path is None:
            break
        node = path[-1]
        # A completion that overshoots may put back what the node dropped: a second choice.
        mask = None
        for drawn in rollouts.draw(node.mask, node.final):
            if tree.is_new(drawn):
                mask = mask or drawn
                if set(drawn.dropped).issuperset(node.mask.dropped):
                    mask = drawn
                    break
        if mask is None:
            tree.repeat(path)
            continue
        fresh.add(mask)
        tree.wait(mask, path)
        found[mask] = "mcts leaf" if node.final else f"mcts rollout from depth {len(path) - 1}"
    return found


class Rollouts:
    """Greedy removal with noisy keys from a node down to the budget.

    Keys are ranks of the genes' worth, plain or per unit of cost freed, plus noise that
    neighbouring genes share over a random width, so that some rollouts drop runs and others single
    sites. What the node dropped goes first.
    """

    def __init__(self, space: SearchSpace, rng: np.random.Generator, keys: Sequence[float]) -> None:
        self._space = space
        self._rng = rng
        self._rankings = (_ranks(keys), _ranks(per_cost(space, keys)))
        self.order: Sequence[float] = self._rankings[1].tolist()

    def draw(self, mask: Mask, final: bool) -> Iterator[Mask]:
        """A few masks on budget below `mask`, each with more noise; `mask` alone where it is."""
        if final:
            yield mask
            return
        gone = [g for g, gene in enumerate(self._space.genes) if not mask.keep[gene[0]]]
        for attempt in range(_ROLLOUTS):
            keys = self._rankings[int(self._rng.integers(2))] + self._noise(_NOISE * 2**attempt)
            keys[gone] = _FIRST
            yield self._space.decode(keys.tolist())

    def _noise(self, scale: float) -> np.ndarray:
        """[genes]: normal noise of the standard deviation `scale`, averaged over a width."""
        width = _WIDTHS[int(self._rng.integers(len(_WIDTHS)))]
        draws = self._rng.normal(0.0, scale, len(self._space.genes) + width - 1)
        return np.convolve(draws, np.full(width, width**-0.5), mode="valid")


def _ranks(keys: Sequence[float]) -> np.ndarray:
    """[genes]: the place of each key among the distinct ones, in [0, 1)."""
    distinct, places = np.unique(keys, return_inverse=True)
    return places / len(distinct)
