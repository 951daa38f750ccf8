"""The tree that Monte Carlo tree search grows over removals: selection, widening and backup.

A node is a mask, so the same sites removed in another order are the same node, and the tree is a
directed acyclic graph. No model, no randomness: which masks are drawn from a node is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthsearch.searchers.ranking import Unit, difference
from depthsearch.space import Evaluation, Mask, SearchSpace, Status

BEST_SHARE = 0.5
"""What the best reward below a node counts in its value; the mean has the rest."""

PRIOR = 4.0
"""How many evaluated masks below a child weigh as much as its place in the guidance."""

CHILDREN = 2.0
"""The factor of progressive widening."""


@dataclass(eq=False)
class Edge:
    """One removal out of a node: how many selections took it, and how many of them wait."""

    child: Node
    visits: int = 0
    waiting: int = 0


@dataclass(eq=False)
class Node:
    """A mask above the budget, or on it (`final`).

    `below` numbers the evaluated masks that keep nothing but what this one keeps. `visits` and
    `waiting` count selections that passed here. A `closed` node leads to no mask that is still to
    be proposed. `untried` are the removals without an edge, None before they are listed.
    """

    mask: Mask
    bits: int
    final: bool
    below: list[int]
    visits: int = 0
    waiting: int = 0
    closed: bool = False
    edges: dict[Mask, Edge] = field(default_factory=dict)
    untried: list[Mask] | None = None


Path = tuple[Node, ...]
"""Nodes from the dense mask downwards, each one removal below the one before."""


class MaskTree:
    """A tree of removals from the dense mask down to masks on budget.

    The reward of an evaluated mask lies in [0, 1]: the share of evaluated masks that are worse, by
    loss, its equals counted half (a mid-rank); a failed one has 0. Ranks mean the same for every
    model, objective and budget, and one broken mask with a huge loss can't squeeze the differences
    between good ones together, as scaling by the worst loss would.

    A loss counts once in every node above its mask, whatever the order of removals that led to it.
    Visits count along the path of the selection alone: with several parents a node has more visits
    than any of its edges, and exploration goes by the edges (UCT2 of Childs, Brodeur and Kocsis,
    "Transpositions and Move Groups in Monte Carlo Tree Search", 2008).
    """

    def __init__(self, space: SearchSpace, exploration: float, widening: float) -> None:
        self._space = space
        self._exploration = exploration
        self._widening = widening
        self._order = dict.fromkeys(space.free, 0.0)
        self._nodes: dict[Mask, Node] = {}
        self._leaves: dict[Mask, Evaluation] = {}
        self._leaf_bits: list[int] = []
        self._proposed: set[Mask] = set()
        self._paths: dict[Mask, Path] = {}
        self._scored: tuple[int, np.ndarray] = (0, np.zeros(0))
        self.root = self._node(space.dense)

    def guide(self, keys: Sequence[float]) -> None:
        """Try removals with low keys first, one key a gene, in [0, 1] as ranks are."""
        genes = zip(self._space.genes, keys, strict=True)
        self._order = {i: float(key) for gene, key in genes for i in gene}

    def select(self) -> Path | None:
        """Walk down by upper confidence bounds until a node is new, or on budget.

        A node with v visits that has fewer than CHILDREN * v ** widening children gets the next one
        (progressive widening, Coulom 2007): that with the least of key and one minus mean reward of
        what is known below it, the key weighing PRIOR evaluated masks. None when every mask that
        the tree leads to was proposed.
        """
        path = [self.root]
        while path:
            node = path[-1]
            if node.final and not self._is_closed(node):
                return tuple(path)
            seen = node.visits + node.waiting
            ready = [edge for edge in node.edges.values() if not self._is_closed(edge.child)]
            wide = len(node.edges) >= CHILDREN * max(seen, 1) ** self._widening
            if not node.final and node.untried != [] and not (ready and wide):
                child, new = self._expand(node)
                if child is not None:
                    if new and not child.final:
                        return (*path, child)
                    if not self._is_closed(child):
                        path.append(child)
                    continue
            if not ready:
                node.closed = True
                path.pop()
                continue
            path.append(max(ready, key=lambda edge: self.bound(node, edge)).child)
        return None

    def is_new(self, mask: Mask) -> bool:
        """Whether the mask was neither proposed nor told."""
        return mask not in self._proposed

    def wait(self, mask: Mask, path: Path = ()) -> None:
        """Note that `mask` was proposed; its selection is a virtual loss on `path` until told.

        Leaf-parallel search with virtual loss (Chaslot, Winands and van den Herik, 2008).
        """
        self._proposed.add(mask)
        self._paths[mask] = path
        self._count(path, waiting=1)

    def repeat(self, path: Path) -> None:
        """Count a selection that led to no new mask, so that the next one looks elsewhere."""
        self._count(path, visits=1)

    def learn(self, evaluation: Evaluation) -> None:
        """Take in the loss of a mask; its virtual loss ends. Masks off budget are no leaves."""
        mask = evaluation.mask
        path = self._paths.pop(mask, ())
        self._count(path, visits=1, waiting=-1)
        if mask in self._leaves or not self._space.on_budget(mask):
            return
        self._proposed.add(mask)
        self._leaves[mask] = evaluation
        bits = int(mask.key, 2)
        self._leaf_bits.append(bits)
        for node in self._nodes.values():
            if not bits & ~node.bits:
                node.below.append(len(self._leaf_bits) - 1)

    def forget_waiting(self) -> None:
        """Take back the selections whose masks were cut and will never be told."""
        for path in self._paths.values():
            self._count(path, waiting=-1)
        self._paths.clear()

    def plant(self, mask: Mask) -> None:
        """Add the path to an evaluated mask, lowest keys removed first, as one more visit.

        Ends early where the space offers no removal towards the mask; a mask that was not told is
        passed over.
        """
        if mask not in self._leaves:
            return
        path = [self.root]
        gone = frozenset(mask.dropped)
        while path[-1].mask != mask:
            node = path[-1]
            units = (u for u in self._space.removable(node.mask) if gone.issuperset(u))
            # Sorted before they are looked at, which costs more.
            towards = map(node.mask.without, sorted(units, key=self._rank))
            child = next((m for m in towards if m == mask or not self._space.fits(m)), None)
            if child is None:
                break
            path.append(self._link(node, child)[0])
        self._count(tuple(path), visits=1)

    def bound(self, node: Node, edge: Edge) -> float:
        """The upper confidence bound of an edge (UCT: Kocsis and Szepesvari 2006).

        Selections that wait count as visits, and as losses of reward 0 below the child.
        """
        seen = node.visits + node.waiting
        taken = max(edge.visits + edge.waiting, 1)
        known = len(edge.child.below)
        value = self.value(edge.child) * known / max(known + edge.child.waiting, 1)
        return value + self._exploration * math.sqrt(math.log(max(seen, 1)) / taken)

    def value(self, node: Node) -> float:
        """Mean and best reward of the evaluated masks below a node, mixed; 0 without any."""
        if not node.below:
            return 0.0
        rewards = self.rewards()[node.below]
        return float((1 - BEST_SHARE) * rewards.mean() + BEST_SHARE * rewards.max())

    def rewards(self) -> np.ndarray:
        """[evaluated masks] in the order they were told, in [0, 1], higher is better."""
        if self._scored[0] != len(self._leaves):
            losses = self.losses()
            ordered = np.sort(losses)
            worse = len(losses) - np.searchsorted(ordered, losses, side="right")
            equal = len(losses) - worse - np.searchsorted(ordered, losses, side="left")
            rewards = np.where(np.isfinite(losses), (worse + equal / 2) / len(losses), 0.0)
            self._scored = (len(self._leaves), rewards)
        return self._scored[1]

    def losses(self) -> np.ndarray:
        """[evaluated masks] in nats, infinite after a failure.

        A mask that lost its race has the best mask's loss plus their paired difference on the
        sequences that it was evaluated on.
        """
        complete = [e for e in self._leaves.values() if e.status is Status.OK]
        best = min(complete, key=lambda e: e.order, default=None)
        return np.array([e.estimate(best) for e in self._leaves.values()])

    def to_json(self) -> dict[str, Any]:
        """The tree as plain data: nodes by mask key in the order of their creation, and edges.

        A node has `visits`, `waiting`, `final`, `evaluated` (masks below), `value` in [0, 1],
        `mean_loss` of those without a failure and `best_loss` in nats, and `best_mask`; the last
        three are None where nothing is known.
        """
        losses, keys = self.losses(), [mask.key for mask in self._leaves]
        nodes: dict[str, Any] = {}
        for node in self._nodes.values():
            good = [i for i in node.below if math.isfinite(losses[i])]
            best = min(good, key=lambda i: (losses[i], keys[i]), default=None)
            nodes[node.mask.key] = {
                "visits": node.visits,
                "waiting": node.waiting,
                "final": node.final,
                "evaluated": len(node.below),
                "value": self.value(node),
                "mean_loss": float(losses[good].mean()) if good else None,
                "best_loss": None if best is None else float(losses[best]),
                "best_mask": None if best is None else keys[best],
            }
        edges = [
            {"parent": node.mask.key, "child": mask.key, "visits": edge.visits}
            for node in self._nodes.values()
            for mask, edge in node.edges.items()
        ]
        return {"root": self.root.mask.key, "nodes": nodes, "edges": edges}

    def _is_closed(self, node: Node) -> bool:
        if node.final and node.mask in self._proposed:
            node.closed = True
        return node.closed

    def _expand(self, node: Node) -> tuple[Node | None, bool]:
        """The next untried child and whether its node is new; None where none is left."""
        if node.untried is None:
            # What fits without being on budget would have to put something back.
            node.untried = [
                child
                for child in self._space.removals(node.mask)
                if not self._space.fits(child) or self._space.on_budget(child)
            ]
        node.untried = [child for child in node.untried if child not in node.edges]
        if node.untried:
            child = min(node.untried, key=lambda child: self._prospect(node, child))
            node.untried.remove(child)
            return self._link(node, child)
        return None, False

    def _link(self, node: Node, mask: Mask) -> tuple[Node, bool]:
        new = mask not in self._nodes
        child = self._node(mask)
        node.edges.setdefault(mask, Edge(child))
        return child, new

    def _node(self, mask: Mask) -> Node:
        if mask not in self._nodes:
            bits = int(mask.key, 2)
            below = [i for i, leaf in enumerate(self._leaf_bits) if not leaf & ~bits]
            self._nodes[mask] = Node(mask, bits, self._space.on_budget(mask), below)
        return self._nodes[mask]

    def _prospect(self, node: Node, child: Mask) -> tuple[float, tuple[int, ...]]:
        """How late a child is tried; what is known below it came from other orders and rollouts."""
        place, unit = self._place(node.mask, child)
        bits = int(child.key, 2)
        below = [i for i in node.below if not self._leaf_bits[i] & ~bits]
        if not below:
            return place, unit
        found = 1 - self.rewards()[below].mean()
        return (PRIOR * place + len(below) * found) / (PRIOR + len(below)), unit

    def _place(self, mask: Mask, smaller: Mask) -> tuple[float, tuple[int, ...]]:
        return self._rank(difference(mask, smaller))

    def _rank(self, unit: Unit) -> tuple[float, Unit]:
        return sum(self._order[i] for i in unit) / len(unit), unit

    def _count(self, path: Path, visits: int = 0, waiting: int = 0) -> None:
        for place, node in enumerate(path):
            node.visits += visits
            node.waiting += waiting
            if place:
                edge = path[place - 1].edges[node.mask]
                edge.visits += visits
                edge.waiting += waiting
