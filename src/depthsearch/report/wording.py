"""Figures and masks in words: amounts with units, losses with errors, stretches of sublayers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from depthsearch.space import KINDS, Kind, Mask, Site, cost_text

MINUS = "−"
NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
KIND_NAMES: Mapping[Kind, str] = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "ffn": "FFN",
}
_NAMES = {
    "params": "Parameters",
    "bytes": "Bytes of weights",
    "flops": "FLOPs per token",
    "kv_bytes": "KV cache per token",
    "latency": "Decoding step",
    "sites": "Sublayers",
    "blocks": "Blocks",
}
_LOSSES = {
    "kl": ("KL divergence to the dense model", "nats"),
    "cross_entropy": ("cross-entropy", "nats"),
    "angular": ("angle to the dense model's logits", "half turns"),
    "norm": ("distance to the dense model's logits", "logits"),
    "js": ("Jensen-Shannon divergence to the dense model", "nats"),
    "chrf": ("100 less chrF++ of the texts written", "points"),
}


def metric_name(metric: str, inside: bool = False) -> str:
    """A budget metric as a row title, or as it reads inside a sentence."""
    name = _NAMES.get(metric, metric)
    return name[0].lower() + name[1:] if inside and name[1:2].islower() else name


def amount(value: float, metric: str = "") -> str:
    """A number with an SI prefix and, where it has one, its unit: "79.82 M", "18.43 kB", "46".

    Latencies are nanoseconds and shown in milliseconds: "12.5 ms".
    """
    if metric == "latency":
        return cost_text(metric, round(value)).replace(" ", SPACE)
    unit = {"bytes": "B", "kv_bytes": "B", "flops": "FLOP"}.get(metric, "")
    scaled, prefix = float(value), ""
    for step in ("k", "M", "G", "T"):
        if abs(scaled) < 1000:
            break
        scaled, prefix = scaled / 1000, step
    return f"{scaled:.4g}{SPACE}{prefix}{unit}".rstrip(SPACE)


def loss(value: float | None, stderr: float | None = None) -> str:
    """A loss with its standard error, or a dash for none."""
    if value is None:
        return NONE
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def loss_name(kind: str) -> str:
    """What a loss of that kind measures, such as an axis says it."""
    return _LOSSES.get(kind, (kind, ""))[0]


def loss_unit(kind: str) -> str:
    """The unit of a loss of that kind: nats but for the angle, the norm and chrF++."""
    return _LOSSES.get(kind, (kind, ""))[1]


def signed(value: float) -> str:
    """A difference with its sign always shown."""
    return f"{'+' if value >= 0 else MINUS}{abs(value):.4f}"


def share(part: float, whole: float) -> str:
    """A share in per cent, or a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else NONE


def duration(seconds: float) -> str:
    """A length of time in at most two units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def correlation_text(found: Mapping[str, Any]) -> str:
    """Whether search loss and held-out loss rank masks alike."""
    return (
        f"Rank correlation of search loss and held-out loss: {found['spearman']:.2f} "
        f"[{found['low']:.2f}, {found['high']:.2f}], Spearman over {found['masks']} masks."
    )


def stretches(mask: Mask, sites: Sequence[Site]) -> str:
    """What a mask drops in short: "blocks 12–18", "attention 4, 9–12; FFN 10–11"."""
    several = len({site.stack for site in sites}) > 1
    parts: list[str] = []
    for stack in dict.fromkeys(site.stack for site in sites):
        blocks: dict[Kind, tuple[int, ...]] = {}
        for kind in KINDS:
            mine = [s for s in sites if s.stack == stack and s.kind == kind]
            if mine:
                blocks[kind] = tuple(s.block for s in mine if not mask.keep[s.index])
        if len(set(blocks.values())) == 1:
            whole = next(iter(blocks.values()))
            groups = [("block" if len(whole) == 1 else "blocks", whole)]
        else:
            groups = [(KIND_NAMES[kind], found) for kind, found in blocks.items()]
        parts += [
            f"{stack} {name} {_ranges(found)}" if several else f"{name} {_ranges(found)}"
            for name, found in groups
            if found
        ]
    return "; ".join(parts) or "nothing"


def shorten(text: str, most: int = 44) -> str:
    """Text for a picture: printable, on one line, cut with an ellipsis."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def folded(text: str, width: int) -> str:
    """Text for a picture over several lines of about `width` characters."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return "\n".join(textwrap.wrap(line, width))


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "4, 9–12"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
