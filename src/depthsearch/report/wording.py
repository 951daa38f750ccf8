"""Figures and masks in words: amounts with units, losses with errors, stretches of sublayers."""

from __future__ import annotations

from collections.abc import Sequence

from depthsearch.space import Mask, Site

MINUS = "−"
NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"

_NAMES = {
    "params": "Parameters",
    "bytes": "Bytes of weights",
    "flops": "FLOPs per token",
    "kv_bytes": "KV cache per token",
    "sites": "Sublayers",
    "blocks": "Blocks",
}


def metric_name(metric: str, inside: bool = False) -> str:
    """A budget metric as a row title, or as it reads inside a sentence."""
    name = _NAMES.get(metric, metric)
    return name[0].lower() + name[1:] if inside and name[1:2].islower() else name


def amount(value: float, metric: str = "") -> str:
    """A number with an SI prefix and, where it has one, its unit: "79.82 M", "18.43 kB", "46"."""
    unit = {"bytes": "B", "kv_bytes": "B", "flops": "FLOP"}.get(metric, "")
    scaled, prefix = float(value), ""
    for step in ("k", "M", "G", "T"):
        if abs(scaled) < 1000:
            break
        scaled, prefix = scaled / 1000, step
    return f"{scaled:.4g}{SPACE}{prefix}{unit}".rstrip(SPACE)


def loss(value: float | None, stderr: float | None = None) -> str:
    """A loss in nats with its standard error, or a dash for none."""
    if value is None:
        return NONE
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


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


def stretches(mask: Mask, sites: Sequence[Site]) -> str:
    """What a mask drops in short: "blocks 12–18, 20.attention, 22.ffn–23.attention"."""
    several = len({site.stack for site in sites}) > 1
    sizes: dict[tuple[str, int], int] = {}
    for site in sites:
        sizes[site.stack, site.block] = sizes.get((site.stack, site.block), 0) + 1
    parts: list[str] = []
    for start, stop in mask.runs:
        first, last = sites[start], sites[stop - 1]
        whole = sum(
            sizes[key] for key in dict.fromkeys((s.stack, s.block) for s in sites[start:stop])
        )
        a, b = _block(first, several), _block(last, several)
        if whole == stop - start:
            parts.append(f"block {a}" if a == b else f"blocks {a}–{b}")
        elif stop - start == 1:
            parts.append(f"{a}.{first.kind}")
        else:
            parts.append(f"{a}.{first.kind}–{b}.{last.kind}")
    return ", ".join(parts) or "nothing"


def shorten(text: str, most: int = 44) -> str:
    """Text for a picture: printable, on one line, cut with an ellipsis."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def _block(site: Site, several: bool) -> str:
    return f"{site.stack}.{site.block}" if several else str(site.block)
