"""How many workers a search can feed: what its journal says it asked for, simulated.

Only reads, and needs neither the model nor its text. What no worker computes is left out, and so
are the finals: a few masks on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthsearch.config import RunConfig, SearchConfig, load_config
from depthsearch.errors import InputError, JournalError, MaskError
from depthsearch.evaluation.feeding import (
    BUSY,
    TOTAL,
    Ask,
    Efficiency,
    Fed,
    workers_fed,
)
from depthsearch.journal import Record, read_journal
from depthsearch.run.directory import CONFIG, JOURNAL, check_run_directory
from depthsearch.run.tasks import scores_text
from depthsearch.space import Evaluation, Status

MOST_WORKERS = 4096
"""The largest number of workers that can be tried."""

_MOST_PAIRS = 100_000
"""Masks times batches above which asks are left out, to end in about a quarter of a minute."""

_NEAR = 0.95
"""The part of the greatest speed-up from which on more workers are hardly of use."""

_WIDENS = {
    "evolution": "search.options.offspring",
    "evopress": "search.options.offspring",
    "exhaustive": "search.options.batch",
    "mcts": "search.options.batch",
    "optuna": "search.batch",
    "random": "search.options.batch",
    "surrogate": "search.options.offspring",
}
"""The setting that has a method ask for more masks at once; others ask for all there are."""

OnAsk = Callable[[int, int], None]
"""Called with the asks simulated so far and those that there are, of all numbers of workers."""


@dataclass(frozen=True)
class Asked:
    """What a search asked for as far as its journal goes.

    `batches` are the parts of the search text that are judged one by one: one where candidates are
    repaired for each mask, since then all text is judged at once. `finished` says whether the
    search went to its end.
    """

    asks: tuple[Ask, ...]
    batches: int
    finished: bool
    search: SearchConfig

    @property
    def masks(self) -> int:
        """Masks of all asks."""
        return sum(len(ask.masks) for ask in self.asks)

    @property
    def pairs(self) -> int:
        """Masks times batches, those included that a race saved: they take time to simulate."""
        return self.masks * self.batches

    @property
    def whole(self) -> bool:
        """Whether all text is judged at once."""
        return self.search.repair in ("gap", "sequential")

    @property
    def raced(self) -> bool:
        """Whether a race decided between batches."""
        return self.batches > 1 and any(ask.lasts is not None for ask in self.asks)

    @property
    def for_more(self) -> tuple[str, ...]:
        """What would feed more workers, as settings."""
        search, found = self.search, []
        if search.batch is not None and search.method != "optuna":
            found.append("no search.batch")
        elif search.method in _WIDENS:
            found.append(f"a larger {_WIDENS[search.method]}")
        if self.whole:
            found.append("search.repair=table")
        else:
            found.append("more batches (a larger select_tokens, a smaller batch_tokens)")
        if self.raced:
            found.append("search.racing=false, which computes more")
        return tuple(found)


def feeding(run: Path, counts: Sequence[int], on_ask: OnAsk | None = None) -> dict[str, Any]:
    """How busy each number of workers of `counts`, ascending, would have been in the search `run`.

    Plain data for JSON: the figures by number of workers, how many are `fed`, from how many on more
    make the search `hardly_faster`, and a `verdict` in words. Raises what `read_asked` does, before
    anything is simulated.
    """
    asked = read_asked(run)
    asks = thinned(asked)
    done, total = 0, len(asks) * len(counts)

    def follow() -> None:
        nonlocal done
        done += 1
        if on_ask is not None:
            on_ask(done, total)

    fed = workers_fed(asks, asked.batches, counts, on_ask=follow)
    return {
        "run": run.absolute().name,
        "finished": asked.finished,
        "asks": len(asked.asks),
        "masks": asked.masks,
        "batches": asked.batches,
        "simulated_asks": len(asks),
        "workers": [
            asdict(found) | {"total": found.total, "speed_up": _speed_up(found)}
            for found in fed.tried
        ],
        "fed": {"busy": fed.busy, "total": fed.total},
        "bars": {"busy": BUSY, "total": TOTAL},
        "hardly_faster": hardly_faster(fed).workers,
        "for_more": list(asked.for_more),
        "verdict": verdict(fed, asked.for_more),
        "notes": list(_notes(asked, len(asks))),
    }


def read_asked(run: Path) -> Asked:
    """What the search in the run directory `run` asked for, at any moment of it.

    Raises RunDirectoryError where there is no run, ConfigError or JournalError where it can't be
    read or nothing was evaluated yet, InputError where the weights were streamed.
    """
    check_run_directory(run)
    config = load_config(run / CONFIG)
    if config.model.streamed:
        raise InputError(
            f"{run} streams its weights (model.streamed): workers then take shares of all batches "
            "in one pass over the weights, which is not simulated"
        )
    if scores_text(config.score):
        raise InputError(
            f"{run} judges masks by what they write (chrf): they share no work then, as those do "
            "that are simulated"
        )
    records = read_journal(run / JOURNAL)
    try:
        asked = _asked(config, records)
    except (KeyError, TypeError, ValueError, MaskError) as error:
        raise JournalError(
            f"{run / JOURNAL} does not fit {CONFIG} beside it, or was written by another version "
            f"of depthsearch ({error!r})"
        ) from error
    if not asked.asks:
        raise JournalError(
            f"{run / JOURNAL} holds no evaluations yet: wait for the first, or `depthsearch resume "
            f"{run}` if nothing writes it"
        )
    return asked


def thinned(asked: Asked, most: int = _MOST_PAIRS) -> tuple[Ask, ...]:
    """The asks, or where there are more than `most` pairs evenly chosen ones; one at the least."""
    count, pairs = len(asked.asks), asked.pairs
    kept = count if pairs <= most else max(1, count * most // pairs)
    return tuple(asked.asks[(2 * place + 1) * count // (2 * kept)] for place in range(kept))


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers of workers such as "1,8,64", ascending and each once; raises InputError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or not 1 <= counts[0] <= counts[-1] <= MOST_WORKERS:
        raise InputError(
            f"--workers is '{text}': give whole numbers from 1 to {MOST_WORKERS}, such as 1,8,64"
        )
    return tuple(counts)


def hardly_faster(fed: Fed) -> Efficiency:
    """The fewest workers that come near the greatest speed-up of all that were tried."""
    best = max(_speed_up(found) for found in fed.tried)
    return next(found for found in fed.tried if _speed_up(found) >= _NEAR * best)


def verdict(fed: Fed, for_more: Sequence[str]) -> str:
    """How many workers are fed, how many are of use, and what would feed more."""
    most, last = fed.tried[-1].workers, hardly_faster(fed)
    said = (
        f"This search feeds {_workers(fed, fed.total)} with {100 * TOTAL:.0f} % of the ideal "
        f"speed-up, and keeps {_workers(fed, fed.busy)} busy {100 * BUSY:.0f} % of the time."
    )
    if last.workers < most:
        said += (
            f" More than {_number(last.workers)} make it hardly faster: "
            f"{_speed_up(last):.1f} times one."
        )
    if min(fed.total, fed.busy) < most:
        said += f" For more: {'; '.join(for_more)}."
    return said


def _speed_up(found: Efficiency) -> float:
    """How many times as fast as one worker."""
    return found.workers * found.total


def _workers(fed: Fed, count: int) -> str:
    if count == 0:
        return f"fewer than {_number(fed.tried[0].workers)}"
    if count == fed.tried[-1].workers:
        return f"{_number(count)}, the most tried,"
    return f"{'no more than' if count == 1 else 'up to'} {_number(count)}"


def _number(count: int) -> str:
    return f"{count} {'worker' if count == 1 else 'workers'}"


def _notes(asked: Asked, simulated: int) -> Iterator[str]:
    """What to bear in mind when reading the figures."""
    if not asked.finished:
        yield "The search has not finished: this is what it asked for so far."
    if simulated < len(asked.asks):
        yield f"Simulated with {simulated} of {len(asked.asks)} asks, evenly chosen."
    if asked.search.repair == "table":
        yield "The fits of gaps, which each worker makes for itself, are not counted."


def _asked(config: RunConfig, records: Sequence[Record]) -> Asked:
    """Raises KeyError, TypeError, ValueError or MaskError for records of something else."""
    calibration, search = config.calibration, config.search
    sequences = calibration.select_tokens // calibration.window_tokens
    rows = max(1, calibration.batch_tokens // calibration.window_tokens)
    if search.repair in ("gap", "sequential"):
        rows = sequences
    asks: list[Ask] = []
    raced = False
    for record in records:
        if record["op"] == "ask":
            raced = record["survivors"] is not None or bool(record.get("stages"))
        elif record["op"] == "tell":
            evaluations = [Evaluation.from_json(entry) for entry in record["evaluations"]]
            asks.append(_ask(evaluations, raced, sequences, rows))
    if len({len(mask) for ask in asks for mask in ask.masks}) > 1:
        raise ValueError("masks of different lengths")
    finished = any(record["op"] == "end" for record in records)
    return Asked(tuple(asks), -(-sequences // rows), finished, search)


def _ask(evaluations: Sequence[Evaluation], raced: bool, sequences: int, rows: int) -> Ask:
    """One ask as it was answered; who failed in a race is taken to have failed at once."""
    for evaluation in evaluations:
        judged = len(evaluation.losses)
        if judged > sequences or (evaluation.status is Status.OK and judged != sequences):
            raise ValueError(f"a mask was judged on {judged} of {sequences} sequences")
    masks = tuple(evaluation.mask for evaluation in evaluations)
    if not raced:
        return Ask(masks)
    return Ask(masks, tuple(max(1, -(-len(e.losses) // rows)) for e in evaluations))
