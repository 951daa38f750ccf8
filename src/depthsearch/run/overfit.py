"""Whether a repair overfits: losses against the amount of text that it was fitted on.

A repair that learns the text it is fitted on, and not what the cut took away, shows as a gap
between the losses on that text and on held-out text. Fit, search, finals and held-out text share no
document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthsearch import __version__
from depthsearch.calibration.text import load_documents
from depthsearch.calibration.windows import Splits, text_windows
from depthsearch.errors import DataError, InputError, UnsupportedModelError
from depthsearch.evaluation import InProcess, Refitted
from depthsearch.evaluation.fitting import HELD_BACK
from depthsearch.evaluation.turns import Repair
from depthsearch.model.anatomy import require_decoder_only
from depthsearch.model.repair import Patch, patched
from depthsearch.run.directory import OVERFIT, write_json
from depthsearch.run.figures import finished_run
from depthsearch.run.session import Session
from depthsearch.space import Mask

SIZES = (1024, 4096, 16384, 65536)
"""The usual sizes of fit text, in tokens."""

FIT, HELDOUT, OTHER = "fit", "heldout", "other"

_KINDS: Mapping[str, Repair] = {"gap": "gap", "sequential": "sequential"}

OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Loss:
    """KL divergence to the dense model and excess cross-entropy over it, nats a token."""

    kl: float
    excess: float

    def to_json(self) -> dict[str, float]:
        """Plain data for JSON."""
        return {"kl": self.kl, "excess": self.excess}


class Judge:
    """What masks lose on one text, against the dense model: `windows` `[n, window]`."""

    def __init__(self, session: Session, windows: Tensor) -> None:
        backend = session.judge(windows)
        assert isinstance(backend, InProcess)
        self.backend = backend
        self._model, self._anatomy = session.loaded.model, session.anatomy
        # Also keeps what the dense model says, before anything is patched.
        self.dense = self.backend.figures([session.space.dense])[1]

    def loss(self, mask: Mask, patches: Sequence[Patch] = ()) -> Loss:
        """The loss of `mask` with `patches`, over all positions of the text."""
        with patched(self._model, self._anatomy, patches):
            kl, cross_entropy = self.backend.figures([mask])
        return Loss(float(kl.mean()), float((cross_entropy - self.dense).mean()))


def overfit(
    run: Path,
    sizes: Sequence[int] = SIZES,
    *,
    other: str | None = None,
    column: str | None = None,
    kind: str | None = None,
    on_stage: OnStage | None = None,
) -> dict[str, Any]:
    """Repair the best mask of a finished run on each of `sizes` tokens, and judge it.

    It is judged on the fit text, on held-out text of the same source and, where given, on `other`
    text (as much of it, without documents of the run's own texts). The usual sizes are raised to
    the least that a fit takes, and end where the text does. `kind` is how it is repaired;
    left out, as the run repairs its result, or `gap`. Returns plain data, also written to
    overfit.json in the run directory for its report. Raises RunDirectoryError for an unfinished
    run, DataError for too little text or a wrong size, UnsupportedModelError for streamed weights.
    """
    stage = on_stage or (lambda *_: None)
    config, best = finished_run(run)
    if config.model.streamed:
        raise UnsupportedModelError("repairs need the whole model: set model.streamed to false")
    documents = None if other is None else load_documents(other, column)
    finished = config.search.finished
    kind = kind or ("gap" if finished == "none" else finished)
    if kind not in _KINDS:
        raise InputError(f"--repair is '{kind}': give {' or '.join(_KINDS)}")
    session = Session.open(config)
    require_decoder_only(session.loaded.model, "depthsearch overfit")
    session.check_model(best, run)
    mask = Mask.from_key(best["mask"])
    window = config.calibration.window_tokens
    usual = tuple(sizes) == SIZES
    sizes = _checked(sizes, window, usual)
    splits = _splits(session, sizes, usual)
    sizes = [size for size in sizes if size // window <= len(splits.fit)]
    texts = {HELDOUT: splits.heldout}
    if documents is not None:
        fitted = session.fit_other
        known = (session.documents, *([] if fitted is None else [fitted.documents]))
        documents, tokens = documents.without(*known), splits.heldout.numel()
        texts[OTHER] = text_windows(documents, session.loaded.tokenizer, window, tokens)
        session.check_text(texts[OTHER])
    with torch.no_grad():
        rows = list(_rows(session, mask, _KINDS[kind], sizes, splits.fit, texts, stage))
    found = {
        "version": __version__,
        "run": run.absolute().name,
        "mask": mask.key,
        "repair": kind,
        "other": None if documents is None else Path(documents.source).name,
        "heldout_tokens": splits.heldout.numel(),
        "rows": rows,
        "verdict": verdict(rows),
        "signature": session.signature(splits, config.search.seed),
    }
    write_json(run / OVERFIT, found)
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows say, in words: the gap of the largest fit, and whether more text would help."""
    cut, *fits = rows
    last = fits[-1]
    here, there = last[FIT]["kl"], last[HELDOUT]["kl"]
    said = (
        f"Fitted on {last['fit_tokens']:,} tokens, the repair lowers held-out KL from "
        f"{cut[HELDOUT]['kl']:.4f} to {there:.4f}; on the text it was fitted on it is {here:.4f}."
    )
    if there > cut[HELDOUT]["kl"]:
        return said + " It does harm: fit it on more text, or leave it out."
    if OTHER in last:
        said += (
            f" On text of another kind it goes from {cut[OTHER]['kl']:.4f} to "
            f"{last[OTHER]['kl']:.4f}."
        )
        rise = last[OTHER]["excess"] - cut[OTHER]["excess"]
        if rise > 0:
            said += (
                f" Its cross-entropy there rises by {rise:.4f}: the repair does not carry over, so "
                "fit it on text such as the model will meet."
            )
    if len(fits) > 1:
        before = fits[-2]
        gain = before[HELDOUT]["kl"] - there
        said += (
            f" From {before['fit_tokens']:,} to {last['fit_tokens']:,} tokens held-out KL "
            f"{'fell' if gain > 0 else 'rose'} by {abs(gain):.4f}"
        )
        much = gain > _WORTH_MORE * there
        said += ": more text would help." if much else ": more text would hardly help."
    return said


_WORTH_MORE = 0.02
"""The share of the loss that the last step must have taken off for another to be worth it."""


def _rows(
    session: Session,
    mask: Mask,
    kind: Repair,
    sizes: Sequence[int],
    fit: Tensor,
    texts: Mapping[str, Tensor],
    stage: OnStage,
) -> Iterator[dict[str, Any]]:
    judges = {name: Judge(session, windows) for name, windows in texts.items()}
    yield {
        "fit_tokens": 0,
        **{name: judge.loss(mask).to_json() for name, judge in judges.items()},
    }
    most = len(texts[HELDOUT])
    for place, tokens in enumerate(sizes):
        stage("repairing", place, len(sizes))
        windows = fit[: tokens // fit.shape[1]]
        # Dense losses first: nothing is patched yet.
        on_fit = Judge(session, windows[:most])
        nats = session.config.search.toward_text
        patches = Refitted(judges[HELDOUT].backend, windows, kind, toward_text=nats).repair(mask)
        yield {
            "fit_tokens": windows.numel(),
            FIT: on_fit.loss(mask, patches).to_json(),
            **{name: judge.loss(mask, patches).to_json() for name, judge in judges.items()},
        }
    stage("repairing", len(sizes), len(sizes))


def _checked(sizes: Sequence[int], window: int, usual: bool) -> list[int]:
    least = HELD_BACK * window
    if usual:
        return sorted({max(size, least) for size in sizes})
    if min(sizes) < least:
        raise DataError(
            f"--fit holds {min(sizes)}: a fit takes {least} tokens or more, {HELD_BACK} windows of "
            f"{window}"
        )
    return sorted(set(sizes))


def _splits(session: Session, sizes: Sequence[int], usual: bool) -> Splits:
    """Those with the largest of `sizes`; of the usual ones, the largest that the text holds."""
    seed = session.config.search.seed
    for size in reversed(sizes[1:] if usual else ()):
        with suppress(DataError):
            return session.splits(seed, size)
    return session.splits(seed, sizes[0] if usual else sizes[-1])


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes such as "1024,4096"; raises InputError."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--fit is '{text}': give numbers of tokens, such as 1024,4096,16384")
    return sizes
