"""What a calibration check tries: its options, and the texts that it judges masks on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthsearch.calibration.text import Documents
from depthsearch.calibration.windows import draw_windows, opening_tokens, text_windows
from depthsearch.config import CalibrationConfig
from depthsearch.errors import ConfigError, InputError
from depthsearch.model.anatomy import context_window
from depthsearch.run.session import Session
from depthsearch.run.stability import Kind

LENGTHS = (128, 256, 512, 1024)
"""The window lengths that are tried where none are asked for, in tokens."""

SMALLEST = 512
"""The smallest size of text that is tried where none is asked for; the others are its doubles."""

_FEWEST_WINDOWS = 4
"""A length or size that nobody asked for must hold so many windows."""


@dataclass(frozen=True)
class CheckOptions:
    """What a check tries: numbers of masks, draws and folds, window lengths, sizes in tokens.

    Lengths and sizes left out are the usual ones, as far as model and text have room for them.
    Raises InputError for what can't be done.
    """

    masks: int = 24
    draws: int = 4
    folds: int = 4
    lengths: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("masks", 2), ("draws", 2), ("folds", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} is {getattr(self, name)}: give {least} or more")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "masks": self.masks,
            "draws": self.draws,
            "folds": self.folds,
            "lengths": None if self.lengths is None else list(self.lengths),
            "sizes": None if self.sizes is None else list(self.sizes),
        }


@dataclass(frozen=True)
class Text:
    """Windows `[n, window]` of one text; `kind` is None for held-out text."""

    name: str
    kind: Kind | None
    windows: Tensor

    @property
    def window_tokens(self) -> int:
        """Tokens of one window."""
        return int(self.windows.shape[1])

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "kind": self.kind or "heldout",
            "windows": len(self.windows),
            "window_tokens": self.window_tokens,
            "sha256": hashlib.sha256(self.windows.numpy().astype("<i8").tobytes()).hexdigest(),
        }


def check_texts(
    session: Session,
    options: CheckOptions,
    others: Sequence[Documents],
    heldout: Tensor,
    finals_tokens: int = 0,
) -> tuple[Text, ...]:
    """The draws, the first of them in other window lengths, the other texts, and held-out text.

    Left out are the documents of so many `finals_tokens` on which a search would choose its answer.
    None of the draws shares a document with another one, with held-out text or with the others.
    Raises InputError for what the model or the texts don't hold.
    """
    draws = _draws(session, options, finals_tokens)
    texts = (
        *draws,
        *_lengths(session, options, draws[0].windows),
        *_others(session, others),
        Text("held-out", None, heldout),
    )
    for text in texts:
        if len(text.windows) < 2:
            key = "heldout_tokens" if text.kind is None else "select_tokens"
            raise ConfigError(
                f"a check needs at least 2 windows of {text.name} text for its errors: raise "
                f"calibration.{key}, or lower calibration.window_tokens"
            )
        session.check_text(text.windows)
    return texts


def check_sizes(calibration: CalibrationConfig, options: CheckOptions) -> list[int]:
    """The sizes of text to regroup, ascending, the configured one among them.

    Raises InputError for one that the draws don't hold.
    """
    window, draws = calibration.window_tokens, options.draws
    most = calibration.select_tokens // window * window * draws
    sizes = {calibration.select_tokens // window * window}
    if options.sizes is None:
        size = SMALLEST
        while size < most:
            if size >= _FEWEST_WINDOWS * window:
                sizes.add(size)
            size *= 2
        return sorted({*sizes, most})
    for size in options.sizes:
        if not window <= size <= most:
            raise InputError(
                f"--sizes holds {size}: sizes may be {window} (one window) to {most} tokens (all "
                f"{draws} samples)"
            )
    return sorted({*sizes, *options.sizes})


def parse_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Numbers of tokens such as "128,256", None for None; raises InputError."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"--{option} is '{text}': give numbers of tokens, such as 256,512,1024")
    return numbers


def other_texts(texts: Sequence[str], columns: Sequence[str]) -> list[tuple[str, str | None]]:
    """Texts with their columns in order, None where none is named; raises InputError."""
    if len(columns) > len(texts):
        raise InputError(
            f"{len(columns)} columns and {len(texts)} other texts were named: name one --column "
            "for each --other at most, in their order"
        )
    return [
        (text, columns[place] if place < len(columns) else None) for place, text in enumerate(texts)
    ]


def _draws(session: Session, options: CheckOptions, finals_tokens: int) -> tuple[Text, ...]:
    calibration = session.config.calibration
    drawn = draw_windows(
        session.documents,
        session.loaded.tokenizer,
        calibration.window_tokens,
        calibration.select_tokens,
        options.draws,
        calibration.heldout_fraction,
        session.config.search.seed,
        finals_tokens,
    )
    return tuple(
        Text(f"sample {place}", "draw", windows) for place, windows in enumerate(drawn, start=1)
    )


def _lengths(session: Session, options: CheckOptions, first: Tensor) -> Iterator[Text]:
    """The text of the first draw `[n, window]` in windows of other lengths."""
    calibration, asked = session.config.calibration, options.lengths
    opening = opening_tokens(session.loaded.tokenizer)
    stream = first[:, len(opening) :].flatten()
    fewest = 2 if asked is not None else _FEWEST_WINDOWS
    least, longest = len(opening) + 2, len(opening) + len(stream) // fewest
    room = context_window(session.loaded.model)
    if room is not None:
        longest = min(longest, room)
    for length in asked or ():
        if not least <= length <= longest:
            raise InputError(
                f"--lengths holds {length}: windows may have {least} to {longest} tokens, as the "
                f"model takes them and calibration.select_tokens = {calibration.select_tokens} "
                "holds two"
            )
    usual = [length for length in LENGTHS if length <= longest]
    for length in sorted(set(usual if asked is None else asked) - {calibration.window_tokens}):
        windows = _cut(stream, opening, length)
        yield Text(f"windows of {length:,}", "length", windows)


def _cut(stream: Tensor, opening: Sequence[int], length: int) -> Tensor:
    """As many windows `[n, length]` as a stream of tokens holds, each begun by `opening`."""
    body = length - len(opening)
    count = len(stream) // body
    begun = torch.tensor(opening, dtype=stream.dtype).expand(count, len(opening))
    return torch.cat([begun, stream[: count * body].reshape(count, body)], dim=1)


def _others(session: Session, others: Sequence[Documents]) -> Iterator[Text]:
    """As much of each other text as a draw holds, without documents of the calibration text."""
    calibration = session.config.calibration
    names: list[str] = []
    for other in others:
        windows = text_windows(
            other.without(session.documents),
            session.loaded.tokenizer,
            calibration.window_tokens,
            calibration.select_tokens,
        )
        names.append(Path(other.source).name)
        number = names.count(names[-1])
        yield Text(names[-1] if number == 1 else f"{names[-1]} ({number})", "other", windows)
