"""How the report's pictures look and how they become part of the page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from depthsearch.report import wording

# The Okabe-Ito colours, told apart with every common colour vision, and a marker each.
INK = "#1b1f24"
GREY = "#8a9099"
PALE = "#dfe5ec"
DROPPED = "#b5380b"
ACCENT = "#0072b2"
CYCLE = (
    ("#d55e00", "D"),
    ("#56b4e9", "v"),
    ("#7a5195", "P"),
    ("#117733", "X"),
    ("#999933", "h"),
    ("#882255", "*"),
)
_STYLES = {
    "windows": ("#0072b2", "s"),
    "block influence": ("#009e73", "^"),
    "single removal": ("#e69f00", "v"),
    "greedy": ("#d55e00", "D"),
    "evolution": ("#aa3377", "o"),
    "random": ("#777777", "P"),
    "dense": ("#000000", "x"),
}
_RC: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "depthsearch",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9edf1",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
MANY_DOTS = 3000
"""Above this, dots are drawn as pixels: thousands of vector dots would make the page heavy."""


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with the words for those who can't see it."""

    source: str
    alt: str


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure in the report's style, `width` by `height` inches; global settings are restored."""
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page's text still shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield Figure(figsize=(width, height), layout="constrained", dpi=150)


def picture(figure: Figure, alt: str) -> Picture:
    """The figure as an inline SVG image, or as PNG where that is smaller."""
    encoded: list[str] = []
    for kind, mime, metadata in (
        ("svg", "svg+xml", {"Date": None, "Creator": None, "Format": None, "Type": None}),
        ("png", "png", {"Software": None}),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        encoded.append(f"data:image/{mime};base64,{text}")
        if len(encoded[0]) < 400_000:
            break
    return Picture(min(encoded, key=len), alt)


def style_of(family: str, known: list[str]) -> tuple[str, str]:
    """Colour and marker of an origin family; one without its own takes the cycle's next."""
    if family in _STYLES:
        return _STYLES[family]
    others = [name for name in known if name not in _STYLES]
    return CYCLE[others.index(family) % len(CYCLE)]


_ARMS = (("#d55e00", "D"), ("#0072b2", "s"), ("#009e73", "^"), ("#aa3377", "o"), *CYCLE[1:])


def arm_names(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms of a comparison, each once, in the order of its runs."""
    return list(dict.fromkeys(str(arm["name"]) for arm in arms))


def arm_style(names: Sequence[str], name: str) -> tuple[str, str]:
    """Colour and marker of an arm among those compared; no two of 81 arms share both."""
    place = names.index(name)
    color = _ARMS[place % len(_ARMS)][0]
    return color, _ARMS[(place + place // len(_ARMS)) % len(_ARMS)][1]


def loss_axis(axis: Axes, which: str, low: float, high: float) -> None:
    """Limits around `low` to `high`; logarithmic where the losses span a factor of four."""
    wide = low > 0 and high > 4 * low
    pad = (high / low) ** 0.06 if wide else 1.0
    span = (high - low) or abs(high) or 1.0
    limits = (low / pad, high * pad) if wide else (low - 0.06 * span, high + 0.06 * span)
    target = axis.yaxis if which == "y" else axis.xaxis
    if which == "y":
        axis.set_ylim(*limits)
    else:
        axis.set_xlim(*limits)
    if wide:
        if which == "y":
            axis.set_yscale("log")
        else:
            axis.set_xscale("log")
        target.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        target.set_minor_locator(NullLocator())


def cost_axis(axis: Axes) -> None:
    """The x axis of search cost."""
    axis.set_xlabel("search cost (dense-equivalent tokens)")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.amount(value)))
    axis.set_xlim(left=0)
