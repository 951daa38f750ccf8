"""The pictures and tables of a comparison of arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from depthsearch.report import wording
from depthsearch.report.drawing import (
    INK,
    Picture,
    arm_names,
    arm_style,
    canvas,
    cost_axis,
    loss_axis,
    picture,
)
from depthsearch.report.figures import Strip, mask_picture
from depthsearch.report.tables import Table
from depthsearch.space import Mask, Site, parse_site_name


def sites_from_names(names: Sequence[str]) -> tuple[Site, ...]:
    """Sites in execution order from their public names; raises MaskError."""
    return tuple(Site(index, *parse_site_name(name)) for index, name in enumerate(names))


def arms_picture(arms: Sequence[Mapping[str, Any]], sites: Sequence[Site]) -> Picture | None:
    """The masks of all arms side by side, equal masks of several seeds drawn once."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for arm in arms:
        if arm.get("mask"):
            groups.setdefault((str(arm["name"]), str(arm["mask"])), []).append(arm)
    seeds_of: dict[str, int] = {}
    for arm in arms:
        seeds_of[str(arm["name"])] = seeds_of.get(str(arm["name"]), 0) + 1
    strips = []
    for (name, key), members in groups.items():
        seeds = ", ".join(str(arm["seed"]) for arm in members)
        whose = "" if seeds_of[name] == 1 else f", seed{'s' if len(members) > 1 else ''} {seeds}"
        losses = wording.loss(members[0].get("heldout_kl"), members[0].get("heldout_kl_stderr"))
        detail = f"{members[0].get('origin', '')} · held-out KL {losses}"
        strips.append(
            Strip(Mask.from_key(key), wording.shorten(name + whose), wording.shorten(detail, 70))
        )
    return mask_picture(strips, sites) if strips else None


def anytime_picture(arms: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Best search loss against search cost, one curve for each arm and seed."""
    curves = [(arm, arm["anytime"]) for arm in arms if arm.get("anytime")]
    if not curves:
        return None
    names = arm_names(arms)
    end = max(float(arm["cost_tokens"]) for arm, _ in curves)
    with canvas(9.6, 3.7) as figure:
        axis = figure.add_subplot()
        for arm, curve in curves:
            color, _ = arm_style(names, str(arm["name"]))
            xs, ys = [float(x) for x, _ in curve], [float(y) for _, y in curve]
            own_end = float(arm["cost_tokens"])
            axis.plot(
                [*xs, own_end],
                [*ys, ys[-1]],
                drawstyle="steps-post",
                color=color,
                linewidth=1.5,
                alpha=0.9,
            )
            axis.plot([own_end], [ys[-1]], marker="|", markersize=9, color=color)
        losses = [float(y) for _, curve in curves for _, y in curve]
        cost_axis(axis)
        axis.set_xlim(0, end * 1.02)
        axis.set_ylabel(f"best search loss so far, {wording.loss_unit(score_of(curves[0][0]))}")
        loss_axis(axis, "y", min(losses), max(losses))
        figure.legend(
            handles=[
                Line2D(
                    [],
                    [],
                    color=arm_style(names, name)[0],
                    linewidth=1.5,
                    label=wording.shorten(name, 26),
                )
                for name in names
            ],
            loc="outside right upper",
        )
        return picture(figure, f"Best search loss against cost for {', '.join(names)}.")


def transfer_picture(arms: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Held-out KL against the loss that the search saw: what selection gained and what lasts."""
    known = [
        a for a in arms if a.get("select_loss") is not None and a.get("heldout_kl") is not None
    ]
    if not known:
        return None
    names = arm_names(arms)
    with canvas(9.6, 3.9) as figure:
        axis = figure.add_subplot()
        for arm in known:
            color, marker = arm_style(names, str(arm["name"]))
            axis.errorbar(
                [float(arm["select_loss"])],
                [float(arm["heldout_kl"])],
                yerr=[float(arm.get("heldout_kl_stderr") or 0.0)],
                color=color,
                marker=marker,
                markersize=6,
                linewidth=1,
                capsize=2,
                alpha=0.9,
            )
            on_the_way = arm.get("anytime_heldout") or ()
            axis.plot(
                [float(mask["select_loss"]) for mask in on_the_way],
                [float(mask["heldout_kl"]) for mask in on_the_way],
                linestyle="",
                color=color,
                marker=marker,
                markersize=3,
                alpha=0.45,
            )
        dots = [*known, *(mask for arm in known for mask in arm.get("anytime_heldout") or ())]
        xs = [float(dot["select_loss"]) for dot in dots]
        ys = [float(dot["heldout_kl"]) for dot in dots]
        low, high = min(xs + ys), max(xs + ys)
        one_loss = score_of(known[0]) == "kl"
        if one_loss:
            axis.plot(
                [low, high],
                [low, high],
                color="#9aa3ad",
                linewidth=1,
                linestyle=(0, (2, 3)),
                zorder=1,
            )
        unit = wording.loss_unit(score_of(known[0]))
        axis.set_xlabel(f"loss on the data the search selected on, {unit}")
        axis.set_ylabel("held-out KL, nats\n(with standard error)")
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=arm_style(names, name)[1],
                color=arm_style(names, name)[0],
                label=wording.shorten(name, 26),
            )
            for name in names
        ]
        if one_loss:
            handles.append(
                Line2D([], [], color="#9aa3ad", linestyle=(0, (2, 3)), label="equal on both")
            )
        figure.legend(handles=handles, loc="outside right upper")
        return picture(figure, "Held-out KL against the loss on search data, one dot a run.")


def interval_picture(summary: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Held-out KL of each arm with its interval, best on top."""
    known = [row for row in summary if row.get("heldout_kl_mean") is not None]
    if not known:
        return None
    ordered = sorted(known, key=lambda row: -float(row["heldout_kl_mean"]))
    with canvas(9.6, 0.36 * len(ordered) + 0.75) as figure:
        axis = figure.add_subplot()
        for y, row in enumerate(ordered):
            mean, low, high = (float(row[f"heldout_kl_{end}"]) for end in ("mean", "low", "high"))
            axis.plot([low, high], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
            axis.plot([mean], [y], marker="o", color=INK, markersize=6)
        axis.set_yticks(range(len(ordered)), [wording.shorten(str(r["arm"]), 30) for r in ordered])
        axis.set_ylim(-0.6, len(ordered) - 0.4)
        axis.set_xlabel("held-out KL divergence to the dense model, nats (95 % interval)")
        return picture(figure, "Held-out KL of each arm with its 95 per cent interval.")


def summary_table(compare: Mapping[str, Any]) -> Table:
    """The dense model and every arm with intervals, best first."""
    dense = compare.get("dense") or {}
    repaired = any(row.get("repaired") for row in compare.get("summary") or ())
    cut: tuple[str, ...] = ("0",) if repaired else ()
    rows: list[tuple[str, ...]] = [
        ("dense model", "", "0", "", *cut, wording.loss(dense.get("heldout_ce")), "")
    ]
    ordered = sorted(
        compare.get("summary") or (),
        key=lambda r: (r.get("heldout_kl_mean") is None, r.get("heldout_kl_mean") or 0.0),
    )
    for row in ordered:
        low, high = row.get("heldout_kl_low"), row.get("heldout_kl_high")
        cost = row.get("cost_tokens_mean")
        seeds = row.get("seeds", "")
        rows.append(
            (
                str(row["arm"]),
                str(len(seeds) if isinstance(seeds, list) else seeds),
                wording.loss(row.get("heldout_kl_mean")),
                f"{low:.4f} to {high:.4f}"
                if low is not None and high is not None
                else wording.NONE,
                *((wording.loss(row.get("cut_kl_mean")),) if repaired else ()),
                wording.loss(row.get("heldout_ce_mean")),
                wording.amount(cost) if cost is not None else wording.NONE,
            )
        )
    return Table(
        (
            "Arm",
            "Seeds",
            "Held-out KL",
            "95 % interval",
            *(("Held-out KL as cut",) if repaired else ()),
            "Held-out cross-entropy",
            "Search cost, tokens",
        ),
        tuple(rows),
    )


def pairs_table(compare: Mapping[str, Any]) -> Table:
    """Paired differences between arms, with intervals and what they say."""
    return Table(
        ("Pair", "Difference in held-out KL", "95 % interval", "Verdict"),
        tuple(
            (
                f"{pair['a']} {wording.MINUS} {pair['b']}",
                wording.signed(float(pair["difference"])),
                f"{wording.signed(float(pair['low']))} to {wording.signed(float(pair['high']))}",
                str(pair["verdict"]),
            )
            for pair in compare.get("pairs") or ()
        ),
    )


def runs_table(arms: Sequence[Mapping[str, Any]], sites: Sequence[Site]) -> Table:
    """Every run of the comparison on one line."""
    rows = []
    mixed = len(searched_alike(arms)) < len(arms)
    for arm in arms:
        mask = Mask.from_key(arm["mask"]) if arm.get("mask") else None
        seconds, evaluations = arm.get("seconds"), arm.get("evaluations")
        rows.append(
            (
                str(arm["name"]),
                str(arm["seed"]),
                wording.stretches(mask, sites) if mask else wording.NONE,
                wording.loss(arm.get("select_loss")) + (f" ({score_of(arm)})" if mixed else ""),
                wording.loss(arm.get("finals_loss")),
                wording.loss(arm.get("heldout_kl"), arm.get("heldout_kl_stderr")),
                str(evaluations) if evaluations is not None else wording.NONE,
                wording.amount(float(arm["cost_tokens"]))
                if arm.get("cost_tokens") is not None
                else wording.NONE,
                wording.duration(float(seconds)) if seconds is not None else wording.NONE,
            )
        )
    return Table(
        (
            "Arm",
            "Seed",
            "Dropped",
            "Search loss",
            "Fresh loss",
            "Held-out KL",
            "Evaluations",
            "Cost, tokens",
            "Time",
        ),
        tuple(rows),
    )


def score_of(arm: Mapping[str, Any]) -> str:
    """The kind of an arm's search losses."""
    return str(arm.get("score") or "kl")


def searched_alike(arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs whose search losses are of the kind that most have: others have no common axis."""
    kinds = [score_of(arm) for arm in arms]
    most = max(dict.fromkeys(kinds), key=kinds.count, default="kl")
    return [arm for arm, kind in zip(arms, kinds, strict=True) if kind == most]
