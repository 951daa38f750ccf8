"""What the masks of a comparison lose on held-out text, which no decision has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from depthsearch.evaluation import InProcess, Streamed
from depthsearch.model.patches import load_patches
from depthsearch.model.repair import Patch, patched
from depthsearch.run.directory import REPAIR
from depthsearch.run.session import Session
from depthsearch.space import Mask

OnHeldout = Callable[[int, int], None]
"""Called with the batches scored so far and all there are."""

_MASKS_AT_ONCE = 64
"""Masks of one pass: each keeps its last states of a batch until the heads have run."""


@dataclass(frozen=True)
class Figures:
    """KL divergence and cross-entropy in nats, one of each a held-out window."""

    kl: tuple[float, ...]
    ce: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One finished run to measure: its answer, and masks that it had found on the way.

    `session` is that of the run, `repair` what its best.json says of a repair, None without one.
    """

    name: str
    session: Session
    run: Path
    answer: str
    found: tuple[str, ...]
    repair: Mapping[str, Any] | None

    @property
    def masks(self) -> tuple[str, ...]:
        """The answer and the others, each once."""
        return tuple(dict.fromkeys((self.answer, *self.found)))


@dataclass(frozen=True)
class Heldout:
    """Figures by mask key as cut, and by run and mask where the run repairs."""

    cut: Mapping[str, Figures]
    repaired: Mapping[tuple[str, str], Figures] = field(default_factory=dict)

    def of(self, run: str, mask: str) -> Figures:
        """What `mask` is worth as a result of `run`."""
        return self.repaired.get((run, mask), self.cut[mask])

    def finite(self, run: str, mask: str) -> bool:
        """Whether every figure of `mask` is a number, as cut and as a result of `run`."""
        figures = (self.cut[mask], self.of(run, mask))
        return all(math.isfinite(loss) for found in figures for loss in (*found.kl, *found.ce))


def measure(
    session: Session, windows: Tensor, runs: Sequence[Measured], on_heldout: OnHeldout | None
) -> Heldout:
    """Measure the dense model and every mask of `runs` on `windows`, the dense model recorded once.

    Masks of all arms, seeds and budgets share their passes. Those of runs that repair are measured
    as cut and, one by one, as that run would have repaired them.
    """
    judge = session.judge(windows)
    keys = [session.space.dense.key, *sorted({mask for run in runs for mask in run.masks})]
    parts = [keys[i : i + _MASKS_AT_ONCE] for i in range(0, len(keys), _MASKS_AT_ONCE)]
    mended = [(run, mask) for run in runs if run.repair is not None for mask in run.masks]
    follow = _Follow(on_heldout, len(judge.sequences), len(parts) + len(mended))
    cut: dict[str, Figures] = {}
    for part in parts:
        cut.update(zip(part, _figures(judge, part, follow), strict=True))
    repaired: dict[tuple[str, str], Figures] = {}
    for run in (run for run in runs if run.repair is not None):
        for mask, patches in _patches(run):
            with patched(session.loaded.model, session.anatomy, patches):
                (repaired[run.name, mask],) = _figures(judge, [mask], follow)
    return Heldout(cut, repaired)


def _patches(run: Measured) -> Iterator[tuple[str, tuple[Patch, ...]]]:
    """The weights that each mask of a run is repaired with; those of its answer are on disk."""
    assert run.repair is not None
    session, answer = run.session, Mask.from_key(run.answer)
    model, digest = session.loaded.model, run.repair["sha256"]
    yield run.answer, load_patches(run.run / REPAIR, model, session.anatomy, answer, digest)
    others = [mask for mask in run.masks if mask != run.answer]
    if not others:
        return
    seed = session.config.search.seed
    splits = session.splits(seed)
    # One backend for all of them records the dense model on the fit text once.
    here = session.config.cluster.backend == "in-process"
    finals = session.backends(splits, seed)[1] if here else None
    for mask in others:
        yield mask, session.repair(Mask.from_key(mask), splits, seed, finals)


def _figures(
    judge: InProcess | Streamed, keys: Sequence[str], on_batch: Callable[[int, int], None]
) -> list[Figures]:
    kl, ce = judge.figures([Mask.from_key(key) for key in keys], on_batch)
    return [Figures(tuple(a), tuple(b)) for a, b in zip(kl.tolist(), ce.tolist(), strict=True)]


class _Follow:
    """Counts batches over several passes."""

    def __init__(self, on_heldout: OnHeldout | None, batches: int, passes: int) -> None:
        self._on_heldout = on_heldout
        self._total = batches * passes
        self._done = 0

    def __call__(self, _batch: int, _batches: int) -> None:
        self._done += 1
        if self._on_heldout is not None:
            self._on_heldout(self._done, self._total)
