"""The pictures and tables of a calibration check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthsearch.report import wording
from depthsearch.report.comparison import sites_from_names
from depthsearch.report.drawing import (
    ACCENT,
    DROPPED,
    GREY,
    INK,
    Picture,
    canvas,
    loss_axis,
    picture,
)
from depthsearch.report.tables import Table
from depthsearch.space import Mask

_SHOWN_MASKS = 30
_NUMBERED = 16
"""Up to so many columns, every cell of the picture of ranks has its rank written in it."""


def ranks_picture(found: Mapping[str, Any]) -> Picture:
    """The rank of every mask on every text, masks by their rank on held-out text."""
    columns = [("held-out", found["heldout"]["losses"])]
    columns += [(row["name"], row["losses"]) for row in found["samples"] if row["kind"] != "fold"]
    ranks = np.array([np.argsort(np.argsort(losses)) + 1 for _, losses in columns]).T
    masks = len(ranks)
    shown = min(masks, _SHOWN_MASKS)
    with canvas(9.6, 0.24 * shown + 1.3) as figure:
        axis = figure.add_subplot()
        axis.imshow(ranks[:shown], aspect="auto", cmap="cividis_r", vmin=1, vmax=masks)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=8)
        axis.xaxis.tick_top()
        names = [wording.shorten(name, 18) for name, _ in columns]
        axis.set_xticks(range(len(names)), names, rotation=35, ha="left")
        axis.set_yticks(range(shown), [f"mask {place + 1}" for place in range(shown)])
        if len(columns) <= _NUMBERED:
            for (y, x), rank in np.ndenumerate(ranks[:shown]):
                first = rank == 1
                axis.text(
                    x,
                    y,
                    str(rank),
                    ha="center",
                    va="center",
                    fontsize=8,
                    weight="bold" if first else "normal",
                    color=DROPPED if first else "white" if rank > masks / 2 else INK,
                )
        winners = "; ".join(
            f"{name}: mask {int(np.argmin(losses)) + 1}" for name, losses in columns
        )
        return picture(figure, f"Ranks of masks by text. Winners: {winners}.")


def sizes_picture(found: Mapping[str, Any]) -> Picture:
    """What a winner loses, and how often it is the same, against the size of the text."""
    rows = found["sizes"]
    tokens = [row["tokens"] for row in rows]
    with canvas(9.6, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        regret = np.array([row["regret"] for row in rows])
        error = np.array([row["regret_stderr"] for row in rows])
        left.fill_between(tokens, regret - error, regret + error, color=ACCENT, alpha=0.18, lw=0)
        left.plot(tokens, regret, color=ACCENT, marker="o", markersize=5)
        left.axhline(0, color=GREY, linewidth=1)
        left.set_ylabel(f"expected held-out regret, {wording.loss_unit(found['objective'])}")
        right.plot(
            tokens,
            [100 * row["favourite_share"] for row in rows],
            color=INK,
            marker="s",
            markersize=5,
            label="the most frequent winner",
        )
        right.plot(
            tokens,
            [100 * row["best_share"] for row in rows],
            color=ACCENT,
            marker="o",
            markersize=5,
            label="the best mask on held-out text",
        )
        right.set_ylim(-3, 103)
        right.set_ylabel("wins, % of texts")
        for axis in (left, right):
            axis.axvline(found["recommended_tokens"], color=DROPPED, linestyle=":", linewidth=1.4)
            axis.set_xscale("log", base=2)
            axis.set_xticks(tokens, [f"{size:,}" for size in tokens], rotation=30, fontsize=8)
            axis.minorticks_off()
            axis.set_xlabel("tokens of calibration text")
        right.plot([], [], color=DROPPED, linestyle=":", label="recommended size")
        figure.legend(loc="outside lower center", ncol=3)
        said = "; ".join(f"{row['tokens']:,} tokens: {row['regret']:.4f}" for row in rows)
        return picture(figure, f"Expected regret by the size of the text. {said}.")


def gaps_picture(found: Mapping[str, Any]) -> Picture:
    """Loss on each draw against loss on held-out text, a dot for each mask."""
    held = found["heldout"]["losses"]
    draws = [row for row in found["samples"] if row["kind"] == "draw"]
    with canvas(9.6, 3.8) as figure:
        axis = figure.add_subplot()
        for row in draws:
            axis.scatter(row["losses"], held, s=14, color=GREY, alpha=0.55, linewidths=0)
        for row in draws:
            chosen = row["winner"]
            axis.scatter(row["losses"][chosen], held[chosen], s=52, color=DROPPED, marker="D")
        ends = [
            min(min(held), *(min(row["losses"]) for row in draws)),
            max(max(held), *(max(row["losses"]) for row in draws)),
        ]
        axis.plot(ends, ends, color="#9aa3ad", linestyle=(0, (2, 3)), label="equal on both")
        axis.scatter([], [], s=14, color=GREY, label="a mask on a sample")
        axis.scatter([], [], s=52, color=DROPPED, marker="D", label="a sample's winner")
        loss_axis(axis, "x", *ends)
        loss_axis(axis, "y", *ends)
        unit = wording.loss_unit(found["objective"])
        axis.set_xlabel(f"loss on a sample ({found['objective']}), {unit}")
        axis.set_ylabel(f"loss on held-out text, {unit}")
        figure.legend(loc="outside right upper")
        return picture(figure, "Held-out loss of every mask against its loss on each sample.")


def samples_table(found: Mapping[str, Any]) -> Table:
    """Every text, its winner, and what trusting it costs."""
    return Table(
        (
            "Text",
            "Tokens",
            "Kendall's tau with held-out",
            "Spearman's rho",
            "Winner",
            "Its loss",
            "Held-out",
            "Gap",
            "Regret",
        ),
        tuple(
            (
                str(row["name"]),
                f"{row['tokens']:,}",
                interval(row["kendall"], 2),
                interval(row["spearman"], 2),
                str(row["winner"] + 1),
                wording.loss(row["loss"]),
                wording.loss(row["heldout_loss"]),
                wording.signed(row["gap"]),
                interval(row["regret"], 4),
            )
            for row in found["samples"]
        ),
    )


def sizes_table(found: Mapping[str, Any]) -> Table:
    """What each size of text comes to."""
    return Table(
        (
            "Tokens",
            "Most frequent winner",
            "It wins",
            "Best on held-out wins",
            "Expected regret",
            "Kendall's tau with held-out",
        ),
        tuple(
            (
                f"{row['tokens']:,}",
                str(row["favourite"] + 1),
                wording.share(row["favourite_share"], 1),
                wording.share(row["best_share"], 1),
                wording.loss(row["regret"], row["regret_stderr"]),
                wording.NONE if row["kendall"] is None else f"{row['kendall']:.2f}",
            )
            for row in found["sizes"]
        ),
    )


def masks_table(found: Mapping[str, Any]) -> Table:
    """The masks, best on held-out text first."""
    sites = sites_from_names(found["sites"])
    held = found["heldout"]
    draws = [row["losses"] for row in found["samples"] if row["kind"] == "draw"]
    return Table(
        ("Mask", "Found by", "Drops", "Held-out loss", "Mean on samples", "Best on held-out"),
        tuple(
            (
                str(place + 1),
                str(entry["origin"]),
                wording.stretches(Mask.from_key(entry["mask"]), sites),
                wording.loss(held["losses"][place]),
                wording.loss(_mean([losses[place] for losses in draws])),
                wording.share(held["wins"][place], 1),
            )
            for place, entry in enumerate(found["masks"])
        ),
    )


def texts_table(found: Mapping[str, Any]) -> Table:
    """The texts that masks were judged on."""
    return Table(
        ("Text", "Windows", "Tokens of a window"),
        tuple(
            (str(text["name"]), str(text["windows"]), str(text["window_tokens"]))
            for text in found["texts"]
        ),
    )


def interval(value: Mapping[str, float] | None, digits: int) -> str:
    """A figure with the ends of its interval, or a dash for none."""
    if value is None:
        return wording.NONE
    mean, low, high = (f"{value[end]:.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
