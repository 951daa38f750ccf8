"""Tables and sentences that a command ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from depthsearch.report.calibration import interval
from depthsearch.report.wording import correlation_text, shorten, stretches
from depthsearch.run.directory import sections
from depthsearch.run.figures import measures
from depthsearch.space import Mask, Site, cost_text, parse_site_name


def best_table(best: Mapping[str, Any]) -> Table:
    """The result of one run."""
    table = Table(title="Best mask", show_header=False)
    dense, cost = best["dense_cost"], best["cost"]
    table.add_row("found by", str(best["origin"]))
    repair = best.get("repair")
    if repair is not None:
        sites, tokens = len(repair["sites"]), repair["fit_tokens"]
        what = f"{sites} projections ({repair['kind']}), on {tokens:,} tokens"
        table.add_row("refitted", what)
    table.add_row("dropped", dropped_text(best))
    table.add_row("budget", str(best["budget_text"]))
    metric = str(best["metric"])
    table.add_row(
        metric,
        f"{cost_text(metric, cost)} of {cost_text(metric, dense)} ({100 * cost / dense:.1f} %), "
        f"cap {cost_text(metric, best['cap'])}",
    )
    table.add_row("loss on search data", plus_minus(best["loss"], best["stderr"]))
    table.add_row("loss on fresh data", plus_minus(best["finals_loss"], best["finals_stderr"]))
    table.add_row("cost", f"{best['cost_tokens']:,.0f} tokens, {best['evaluations']} masks")
    return table


def _allowed(point: Mapping[str, Any]) -> str:
    """The budget of a point; of two costs a line each, with shares of the dense model."""
    limits = point["limits"]
    if len(limits) == 1:
        return str(point["budget_text"])
    shares = [100 * limit["cap"] / limit["dense_cost"] for limit in limits]
    both = zip(limits, shares, strict=True)
    return "\n".join(f"{limit['metric']} at most {share:.1f} %" for limit, share in both)


def front_table(front: Mapping[str, Any]) -> Table:
    """The answer at each budget, in the order and with the numbers of front.json."""
    table = Table(title="Best mask at each budget")
    table.add_column("point", no_wrap=True)
    table.add_column("budget")
    for title in ("cost", "fresh loss", "ahead of baseline"):
        table.add_column(title, justify="right", no_wrap=title == "cost")
    table.add_column("dropped")
    for point in front["points"]:
        name = f"{point['point']}{', own' if point['own'] else ''}"
        if point["mask"] is None:
            table.add_row(name, _allowed(point), "", "none found", "", "")
            continue
        lead = plus_minus(point["lead"], point["lead_stderr"])
        if point["baseline"] in (None, point["mask"]):
            lead = "is one" if point["baseline"] else ""
        limits = point["limits"]
        shares = [100 * point["costs"][x["metric"]] / x["dense_cost"] for x in limits]
        table.add_row(
            name,
            _allowed(point),
            "\n".join(f"{share:.1f} %" for share in shares),
            plus_minus(point["finals_loss"], point["finals_stderr"]),
            lead,
            dropped_text(point),
        )
    if front["left_out"]:
        names = "; ".join(pair["budget_text"] for pair in front["left_out"])
        table.caption = f"left out, since no mask meets them: {names}"
    return table


def compare_table(result: Mapping[str, Any]) -> Table:
    """The arms of a comparison with their intervals, best first."""
    table = Table(title=f"Held-out figures, {result['budget_text']}")
    table.add_column("arm")
    repaired = any(row["repaired"] for row in result["summary"])
    cut = ("KL as cut",) if repaired else ()
    # In a narrow terminal the interval goes below the mean before the arm's name has no room.
    table.add_column("KL [95 % interval]", justify="right", no_wrap=not repaired)
    for title in (*cut, "CE, nats", "cost", "masks", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    blank = ("0",) if repaired else ()
    table.add_row("dense model", "0", *blank, f"{result['dense']['heldout_ce']:.4f}", "", "", "")
    for row in sorted(result["summary"], key=lambda r: float(r["heldout_kl_mean"])):
        interval = f"[{row['heldout_kl_low']:.4f}, {row['heldout_kl_high']:.4f}]"
        table.add_row(
            row["arm"] + (f", {row['seeds']} seeds" if row["seeds"] > 1 else ""),
            f"{row['heldout_kl_mean']:.4f} {interval}",
            *((f"{row['cut_kl_mean']:.4f}",) if repaired else ()),
            f"{row['heldout_ce_mean']:.4f}",
            f"{row['cost_tokens_mean']:,.0f}",
            f"{row['evaluations_mean']:.0f}",
            f"{row['seconds_mean']:.0f} s",
        )
    return table


def compare_lines(result: Mapping[str, Any]) -> list[Table | str]:
    """A comparison budget by budget, then what its budgets say together."""
    lines: list[Table | str] = []
    parts = sections(result)
    for part in parts:
        if part["summary"]:
            lines += [
                compare_table(part),
                standing_table(part, "Ranks, and held-out loss minus search loss (gap)"),
            ]
            lines += [correlation_text(part["correlation"])] if part["correlation"] else []
        lines += [
            f"{run['name']} failed with seed {run['seed']}, {part['budget_text']}: {run['error']}"
            for run in part["failed"]
        ]
        if len(parts) > 1 and part["summary"]:
            lines.append(f"{part['verdict']}\n")
    if len(parts) > 1 and len(result["ranks"]) > 1:
        ranked = sum(bool(part["summary"]) for part in parts)
        lines.append(standing_table(result, f"Ranks over {ranked} budgets"))
    return [*lines, str(result["verdict"])]


def standing_table(part: Mapping[str, Any], title: str) -> Table:
    """Ranks of arms with intervals; at one budget also how far held-out loss is from search loss.

    With one arm there is nothing to rank.
    """
    table = Table(title=title)
    table.add_column("arm")
    rows = {row["arm"]: row for row in part.get("summary", ())}
    titles = ("mean rank [95 %]", "first", *(("search loss", "gap") if rows else ()))
    for name in titles:
        table.add_column(name, justify="right", no_wrap=True)
    for rank in part["ranks"]:
        cells = [
            f"{rank['rank_mean']:.2f} [{rank['rank_low']:.2f}, {rank['rank_high']:.2f}]",
            f"{100 * rank['first_share']:.0f} %",
        ]
        row = rows.get(rank["arm"])
        if row is not None:
            gap = row["gap_mean"]
            cells += [f"{row['select_loss_mean']:.4f}", "" if gap is None else f"{gap:+.4f}"]
        table.add_row(rank["arm"], *cells)
    return table


def feeding_table(found: Mapping[str, Any]) -> Table:
    """What each number of workers would have reached in a search."""
    table = Table(title=f"{found['masks']} masks in {found['asks']} asks, simulated")
    for title in ("workers", "busy", "sharing", "speed-up"):
        table.add_column(title, justify="right")
    for row in found["workers"]:
        shares = (f"{100 * row[key]:.0f} %" for key in ("busy", "sharing"))
        table.add_row(str(row["workers"]), *shares, f"{row['speed_up']:.1f}")
    return table


def overfit_table(found: Mapping[str, Any]) -> Table:
    """What a repaired mask loses on each text, by the size of the text it was fitted on."""
    table = Table(title=f"Repaired ({found['repair']}), KL / excess cross-entropy in nats")
    table.add_column("fitted on", justify="right")
    texts = {"fit": "that text", "heldout": "held-out", "other": str(found["other"])}
    shown = [name for name in texts if any(name in row for row in found["rows"])]
    for name in shown:
        table.add_column(texts[name], justify="right")
    for row in found["rows"]:
        cells = (
            f"{row[name]['kl']:.4f} / {row[name]['excess']:.4f}" if name in row else ""
            for name in shown
        )
        table.add_row(f"{row['fit_tokens']:,}" if row["fit_tokens"] else "as cut", *cells)
    return table


def calibration_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """What each text says of the masks, what each size of text comes to, and words."""
    title = f"{len(found['masks'])} masks by held-out loss, {found['budget_text']}"
    texts = Table(title=title)
    # Narrow enough for a terminal of 80 characters; the report has the other figures.
    texts.add_column("text", max_width=17)
    for name in ("Kendall's tau", "winner", "held-out", "gap", "regret"):
        texts.add_column(name, justify="right", no_wrap=True)
    for row in found["samples"]:
        texts.add_row(
            shorten(row["name"], 17),
            interval(row["kendall"], 2),
            str(row["winner"] + 1),
            f"{row['heldout_loss']:.4f}",
            f"{row['gap']:+.4f}",
            f"{row['regret']['mean']:.4f}",
        )
    sizes = Table(title="Winners of resampled texts, by size")
    for name in ("tokens", "frequent winner", "wins", "best on held-out wins", "regret"):
        sizes.add_column(name, justify="right")
    for row in found["sizes"]:
        sizes.add_row(
            f"{row['tokens']:,}",
            str(row["favourite"] + 1),
            *(f"{100 * row[name]:.0f} %" for name in ("favourite_share", "best_share")),
            plus_minus(row["regret"], row["regret_stderr"]),
        )
    said = [f"Warning: {warning}" for warning in found["warnings"]]
    return [texts, sizes, *said, *found["notes"], found["verdict"]]


def figures_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Measured models side by side, with the ratio where there are two."""
    table = Table(title="Measured in one run")
    table.add_column("")
    for row in rows:
        table.add_column(str(row["name"]), justify="right")
    if len(rows) == 2:
        table.add_column("ratio", justify="right")
    for phrase, key in measures(rows):
        values = [row[key] for row in rows]
        cells = [
            "not measured" if v is None else f"{v:,.4g}" if v < 1000 else f"{v:,.0f}"
            for v in values
        ]
        if len(rows) == 2:
            first, second = values
            cells.append(f"{second / first:.2f}" if first and second is not None else "")
        table.add_row(phrase, *cells)
    return table


def dropped_text(best: Mapping[str, Any]) -> str:
    """What a best.json drops, neighbouring blocks folded into ranges."""
    mask = Mask.from_key(best["mask"])
    kept, dropped = iter(best["kept"]), iter(best["dropped"])
    names = [next(kept if flag else dropped) for flag in mask.keep]
    sites = [Site(i, *parse_site_name(name)) for i, name in enumerate(names)]
    return stretches(mask, sites)


def plus_minus(value: float | None, error: float | None) -> str:
    """A figure with its standard error."""
    if value is None:
        return "none"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def inspection_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """A model's figures, and its sites with equal neighbours folded."""
    stacks = found["stacks"]
    blocks = f"{found['blocks']} blocks"
    if len(stacks) > 1:
        blocks = ", ".join(f"{count} {name} blocks" for name, count in stacks.items())
    totals = Table(title=f"{found['model_class']} · {blocks} · {found['dtype']}")
    for title in ("", "model", "in blocks", "outside blocks"):
        totals.add_column(title, justify="right" if title else "left")
    for metric, figures in found["totals"].items():
        totals.add_row(
            _UNITS[metric].format(context=found["context_tokens"]),
            *(cost_text(metric, figures[part]) for part in ("model", "blocks", "outside_blocks")),
        )
    sites = Table(title="Sites")
    # No room for six columns on a terminal of 80 characters; bytes follow from the parameters.
    shown = [m for m in found["totals"] if m != "bytes" or "latency" not in found["totals"]]
    for title in ("site", *(_COLUMNS[metric] for metric in shown)):
        sites.add_column(title, justify="left" if title == "site" else "right")
    for group in _folded(found["sites"]):
        first, last = group[0]["name"], group[-1]["name"]
        name = first if first == last else f"{first} … {last}"
        cells = (cost_text(metric, group[0][metric]) for metric in shown)
        sites.add_row(name, *cells)
    check = found["self_check"]
    replay = {
        "site": "masked models are replayed sublayer by sublayer, bit for bit",
        "block": "masked models are replayed block by block, bit for bit",
        "whole": "replay is not exact here: masked models run whole, without sharing",
    }[check["mode"]]
    packable = (
        "sublayer masks can be re-paired into ordinary blocks (packable: true)"
        if found["packable"]
        else "parallel blocks: only whole blocks can be exported natively"
        if found["parallel_blocks"]
        else "search with 'granularity: block' for masks that can be exported"
    )
    return [totals, sites, f"Self-check passed: {replay}; {packable}."]


def latency_lines(found: Mapping[str, Any]) -> list[Table | str]:
    """A latency table by kinds of parts, and how far their sum is from the whole step."""
    about, whole, error = found["signature"], found["whole"], 100 * found["additivity_error"]
    where = f"{about['device_name']}, {about['dtype']}"
    table = Table(title=f"One decoding step behind {about['context_tokens']:,} tokens · {where}")
    for title in ("part", "each", "number", "together"):
        table.add_column(title, justify="left" if title == "part" else "right")
    groups: dict[tuple[str, int], int] = {}
    for site in found["sites"]:
        key = site["name"].rpartition(".")[2], site["ns"]
        groups[key] = groups.get(key, 0) + 1
    for part in found["shared"]:
        key = "shared by both", part["ns"]
        groups[key] = groups.get(key, 0) + 1
    groups["outside the blocks", found["fixed"]["ns"]] = 1
    for (name, each), number in groups.items():
        cells = [cost_text("latency", ns) for ns in (each, number * each)]
        table.add_row(name, cells[0], str(number), cells[1])
    table.add_row("sum", "", "", cost_text("latency", found["sum_ns"]))
    low, high = (f"{ns / 1e6:.4g}" for ns in whole["quartiles_ns"])
    said = (
        f"The whole step, measured in turns with its parts: {cost_text('latency', whole['ns'])} "
        f"(quartiles {low} and {high}). The sum of the parts is {abs(error):.1f} % "
        f"{'above' if error > 0 else 'below'} it (additivity error)."
    )
    return [table, said, *(f"Warning: {warning}" for warning in found["warnings"])]


def prediction_text(found: Mapping[str, Any]) -> str:
    """The decoding step of an export beside what its latency table said."""
    table, measured, predicted = found["table"], found["measured_ms"], found["predicted_ms"]
    elsewhere = (
        "" if found["device_name"] == table["device_name"] else f" on {table['device_name']}"
    )
    return (
        f"Decoding step behind {table['context_tokens']:,} tokens: predicted"
        f"{elsewhere} {100 * found['predicted_ratio']:.1f} % of the dense model's "
        f"({predicted['pruned']:.4g} of {predicted['dense']:.4g} ms), measured "
        f"{100 * found['measured_ratio']:.1f} % ({measured['pruned']:.4g} of "
        f"{measured['dense']:.4g} ms, in turns)"
    )


_UNITS = {
    "params": "parameters",
    "bytes": "bytes",
    "flops": "FLOPs/token at {context} tokens",
    "kv_bytes": "KV bytes/token at {context} tokens",
    "latency": "decoding step at {context} tokens",
}
_COLUMNS = {
    "params": "parameters",
    "bytes": "bytes",
    "flops": "FLOPs/token",
    "kv_bytes": "KV bytes/token",
    "latency": "step",
}


def _folded(sites: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Sites of one kind and equal costs together, in order of their first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for site in sites:
        kind = site["name"].rpartition(".")[2]
        groups.setdefault(
            (kind, *(site[metric] for metric in _UNITS if metric in site)), []
        ).append(site)
    return list(groups.values())
