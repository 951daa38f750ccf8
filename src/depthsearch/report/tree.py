"""The tree of a tree search as a picture of bounded size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from depthsearch.report import wording
from depthsearch.report.drawing import DROPPED, GREY, Picture, canvas, picture
from depthsearch.space import Mask, Site

MOST_NODES = 40

_LETTERS = {"attention": "A", "cross_attention": "X", "ffn": "F"}
_SHOWN_SITES = 3


def most_visited(tree: Mapping[str, Any], most: int = MOST_NODES) -> dict[str, str | None]:
    """The `most` most visited nodes that hang together from the root, each with its parent.

    Where removals in another order lead to one node, its parent is the shown one whose edge was
    taken most. Nodes never visited are left out.
    """
    nodes = tree["nodes"]
    children: dict[str, list[Mapping[str, Any]]] = {}
    for edge in tree["edges"]:
        children.setdefault(edge["parent"], []).append(edge)
    shown: dict[str, str | None] = {tree["root"]: None}
    border: dict[str, tuple[int, str]] = {}
    newest = tree["root"]
    while len(shown) < most:
        for edge in children.get(newest, ()):
            child, found = edge["child"], (int(edge["visits"]), newest)
            if child not in shown and nodes[child]["visits"]:
                border[child] = max(border.get(child, found), found)
        if not border:
            break
        newest = min(border, key=lambda key: (-nodes[key]["visits"], _loss(nodes[key]), key))
        shown[newest] = border.pop(newest)[1]
    return shown


def removed_sites(parent: str, child: str, sites: Sequence[Site]) -> str:
    """What an edge removes, in short: "A12" for an attention, "F7" for an FFN, "B3" for a block."""
    gone = [
        site
        for site, before, after in zip(
            sites, Mask.from_key(parent).keep, Mask.from_key(child).keep, strict=True
        )
        if before and not after
    ]
    whole = {
        (site.stack, site.block)
        for site in gone
        if sum((s.stack, s.block) == (site.stack, site.block) for s in sites)
        == sum((s.stack, s.block) == (site.stack, site.block) for s in gone)
        > 1
    }
    names = dict.fromkeys(
        f"B{site.block}"
        if (site.stack, site.block) in whole
        else f"{_LETTERS[site.kind]}{site.block}"
        for site in gone
    )
    more = "…" if len(names) > _SHOWN_SITES else ""
    return " ".join(list(names)[:_SHOWN_SITES]) + more


def tree_picture(tree: Mapping[str, Any], sites: Sequence[Site], score: str) -> Picture | None:
    """The most visited nodes of a search tree, the dense model on the left.

    Lines are removals, dots masks: larger ones were visited more often, and the colour is the
    lowest loss, of the kind `score`, found below. None for a tree in which nothing was selected
    yet, or nothing has a loss.
    """
    shown = most_visited(tree)
    if len(shown) < 2:
        return None
    nodes = tree["nodes"]
    places = _layout(shown, nodes)
    known = [_loss(nodes[key]) for key in shown if nodes[key]["best_loss"] is not None]
    if not known:
        return None
    best = min(
        (node["best_loss"], node["best_mask"])
        for node in nodes.values()
        if node["best_loss"] is not None
    )[1]
    most = max(nodes[key]["visits"] for key in shown)
    rows = max(y for _, y in places.values()) + 1
    with canvas(9.6, min(11.0, 0.23 * rows + 1.3)) as figure:
        axis = figure.add_subplot()
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_yticks([])
        axis.set_ylim(rows - 0.3, -0.7)
        colors = ScalarMappable(Normalize(min(known), max(known)), mpl.colormaps["viridis"])
        for edge in tree["edges"]:
            # Other orders of the same removals.
            parent, child = edge["parent"], edge["child"]
            if parent in shown and child in shown and shown[child] != parent:
                (x, y), (a, b) = places[parent], places[child]
                axis.plot([x, a], [y, b], color="#e3e7ec", linewidth=0.7, zorder=0)
        for key, parent in shown.items():
            node, (x, y) = nodes[key], places[key]
            if parent is not None:
                a, b = places[parent]
                axis.plot([a, a + 0.25, x], [b, y, y], color="#aab4bf", linewidth=0.9, zorder=1)
                label = removed_sites(parent, key, sites)
                axis.text(x - 0.14, y - 0.08, label, ha="right", va="bottom", fontsize=7)
            axis.plot(
                [x],
                [y],
                marker="o",
                markersize=4 + 7 * math.sqrt(node["visits"] / most),
                color=GREY if node["best_loss"] is None else colors.to_rgba(node["best_loss"]),
                markeredgecolor=DROPPED if node["best_mask"] == best else "white",
                markeredgewidth=1.6 if node["best_mask"] == best else 0.5,
                zorder=2,
            )
        deepest = max(x for x, _ in places.values())
        axis.set_xlim(-0.3, deepest + 0.3)
        axis.set_xticks(range(int(deepest) + 1))
        axis.set_xlabel("removals from the dense model")
        bar = figure.colorbar(colors, ax=axis, fraction=0.025, pad=0.01)
        bar.set_label(f"lowest search loss below, {wording.loss_unit(score)}")
        ring = Line2D([], [], linestyle="", marker="o", markersize=7, color="white")
        ring.set_markeredgecolor(DROPPED)
        ring.set_label("leads to the best mask")
        figure.legend(handles=[ring], loc="outside lower right")
        return picture(
            figure,
            f"The {len(shown)} most visited of {len(nodes)} nodes of the search tree; the first "
            f"removals are {', '.join(_first(shown, tree['root'], sites))}.",
        )


def _first(shown: Mapping[str, str | None], root: str, sites: Sequence[Site]) -> list[str]:
    return [removed_sites(root, key, sites) for key, parent in shown.items() if parent == root]


def _layout(
    shown: Mapping[str, str | None], nodes: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """Depth and row of each node: a child stands right of its parent, the first in its row."""
    below: dict[str, list[str]] = {key: [] for key in shown}
    for key, parent in shown.items():
        if parent is not None:
            below[parent].append(key)
    places: dict[str, tuple[float, float]] = {}
    row = 0
    waiting = [(next(iter(shown)), 0)]
    while waiting:
        key, depth = waiting.pop()
        places[key] = (depth, row)
        children = sorted(below[key], key=lambda child: (-nodes[child]["visits"], child))
        waiting += [(child, depth + 1) for child in reversed(children)]
        row += not children
    return places


def _loss(node: Mapping[str, Any]) -> float:
    loss = node["best_loss"]
    return math.inf if loss is None else float(loss)
