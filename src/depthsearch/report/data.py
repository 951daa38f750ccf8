"""What a run directory says, as one object that the report is drawn from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from depthsearch import __version__
from depthsearch.config import to_yaml
from depthsearch.errors import JournalError, RunDirectoryError
from depthsearch.journal import read_journal
from depthsearch.searchers.baselines import is_baseline
from depthsearch.space import Evaluation, Mask, SearchSpace, Status

_FAMILIES = (
    ("window", "windows"),
    ("block influence", "block influence"),
    ("single removal", "single removal"),
    ("sweep", "single removal"),
    ("completed prefix", "completed prefix"),
    ("dense", "dense"),
    ("greedy", "greedy"),
    ("evolution", "evolution"),
    ("random", "random"),
)


@dataclass(frozen=True)
class Point:
    """One evaluated proposal, and what the search had spent when its loss was known."""

    origin: str
    final: bool
    evaluation: Evaluation
    cost_tokens: float

    @property
    def mask(self) -> Mask:
        """The evaluated mask."""
        return self.evaluation.mask

    @property
    def complete(self) -> bool:
        """Whether the mask meets the budget and was judged on all search data."""
        return self.final and self.evaluation.status is Status.OK

    @cached_property
    def family(self) -> str:
        """The kind of origin, for colours and counts: "window 12-18" -> "windows"."""
        return family(self.origin)


@dataclass(frozen=True)
class FrontEntry:
    """One budget of several with its answer, or the best so far; `number` is that of front.json.

    `fresh` and `baseline` are evaluations on fresh data, None before the finals and where nothing
    meets the budget yet.
    """

    number: int
    space: SearchSpace
    best: Point | None
    fresh: Evaluation | None = None
    baseline: Evaluation | None = None


@dataclass(frozen=True)
class RunData:
    """Everything that the report of one run shows; `end_reason` is None while it is unfinished.

    In a run over several budgets `front` has an entry for each, and all else is about its own.
    """

    name: str
    version: str
    config: Mapping[str, Any]
    config_text: str
    signature: Mapping[str, Any]
    space: SearchSpace
    points: tuple[Point, ...]
    finals: tuple[Evaluation, ...]
    baselines: frozenset[Mask]
    chosen: Mask | None
    end_reason: str | None
    cost_tokens: float
    seconds: float
    export: Mapping[str, Any] | None
    overfit: Mapping[str, Any] | None
    front: tuple[FrontEntry, ...] = ()

    @cached_property
    def objective(self) -> str:
        """The kind of the losses on fresh data, which the finalists are ranked by."""
        return str(_inside(self.config, "objective", "kind") or "kl")

    @cached_property
    def score(self) -> str:
        """The kind of the losses on search data."""
        return str(_inside(self.config, "search", "score") or self.objective)

    @cached_property
    def method(self) -> str | None:
        """The name of the search method."""
        name = _inside(self.config, "search", "method")
        return name if isinstance(name, str) else None

    @cached_property
    def ranked(self) -> tuple[Point, ...]:
        """Every mask on budget that was judged on all search data, best first, each once."""
        found: dict[Mask, Point] = {}
        for point in sorted(
            (p for p in self.points if p.complete), key=lambda p: p.evaluation.order
        ):
            found.setdefault(point.mask, point)
        return tuple(found.values())

    @cached_property
    def by_mask(self) -> Mapping[Mask, Point]:
        """The best-known evaluation of each mask on search data."""
        found: dict[Mask, Point] = {}
        for point in sorted(self.points, key=lambda p: p.evaluation.order):
            found.setdefault(point.mask, point)
        return found

    @cached_property
    def fresh(self) -> Mapping[Mask, Evaluation]:
        """The finalists' evaluations on fresh data."""
        return {evaluation.mask: evaluation for evaluation in self.finals}

    @cached_property
    def best(self) -> Mask | None:
        """The run's answer, or, while it is unfinished, the best mask so far."""
        return self.chosen or (self.ranked[0].mask if self.ranked else None)

    @cached_property
    def best_baseline(self) -> Mask | None:
        """The baseline with the lowest loss on fresh data, or on search data before the finals."""
        fresh = [e for e in self.finals if e.mask in self.baselines and e.loss is not None]
        if fresh:
            return min(fresh, key=lambda e: e.order).mask
        return next((p.mask for p in self.ranked if is_baseline(p.origin)), None)

    @cached_property
    def best_greedy(self) -> Mask | None:
        """The best mask on budget that greedy removal led to."""
        return next((p.mask for p in self.ranked if p.family == "greedy"), None)

    def origin(self, mask: Mask) -> str:
        """Where a mask came from."""
        point = self.by_mask.get(mask)
        return point.origin if point else "dense model" if not mask.dropped else "unknown"

    @cached_property
    def lead_on_baseline(self) -> tuple[float, float] | None:
        """Loss of the best baseline minus loss of the best mask on the same fresh sequences.

        The mean and its standard error; above zero, search won. None before the finals.
        """
        if self.best is None or self.best_baseline is None:
            return None
        ours, theirs = self.fresh.get(self.best), self.fresh.get(self.best_baseline)
        if ours is None or theirs is None or len(ours.losses) != len(theirs.losses):
            return None
        gaps = [b - a for a, b in zip(ours.losses, theirs.losses, strict=True)]
        if len(gaps) < 2:
            return None
        mean = math.fsum(gaps) / len(gaps)
        spread = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
        return mean, math.sqrt(spread / len(gaps))

    def elite(self, share: float = 0.1, least: int = 10) -> tuple[Point, ...]:
        """The best `share` of the ranked masks, at least `least` of them where there are."""
        return self.ranked[: max(least, math.ceil(share * len(self.ranked)))]

    @cached_property
    def by_status(self) -> Mapping[str, int]:
        """Number of evaluations by how they ended."""
        return Counter(str(p.evaluation.status) for p in self.points)

    @cached_property
    def by_family(self) -> Mapping[str, int]:
        """Number of evaluations by kind of origin, most frequent first."""
        return dict(Counter(p.family for p in self.points).most_common())


def _unfinished(folder: Path) -> str | None:
    """What was begun in a folder without a run, None where it is neither of the two."""
    if (folder / "calibration.jsonl").is_file():
        return "a calibration check"
    is_compare = (folder / "config.yaml").is_file() and (folder / "arms").is_dir()
    return "a comparison" if is_compare else None


def read_run(run_dir: Path) -> RunData:
    """Read journal.jsonl and, where they exist, best.json and export.json of a run.

    Works at any moment of a run; a torn last line of the journal is left out. Raises
    RunDirectoryError for a directory that holds no run, JournalError for a damaged journal.
    """
    if not (run_dir / "journal.jsonl").is_file():
        unfinished = _unfinished(run_dir)
        if unfinished is not None:
            raise RunDirectoryError(
                f"{run_dir} holds {unfinished} that has not finished: continue it with the "
                "command that began it, which writes the report"
            )
        raise RunDirectoryError(
            f"{run_dir} is not a run directory: it holds no journal.jsonl; give the folder that "
            "`depthsearch search CONFIG --out` wrote"
        )
    records = read_journal(run_dir / "journal.jsonl")
    start = next((r for r in records if r.get("op") == "start"), None)
    if start is None:
        raise JournalError(
            f"{run_dir / 'journal.jsonl'} has no start record yet: there is nothing to report; "
            f"`depthsearch resume {run_dir}` continues the run"
        )
    try:
        return _assemble(run_dir, records, start)
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(
            f"{run_dir / 'journal.jsonl'} can't be read: it was written by depthsearch "
            f"{start.get('version', 'unknown')}, this is {__version__} ({error!r})"
        ) from error


def _assemble(
    run_dir: Path, records: Sequence[Mapping[str, Any]], start: Mapping[str, Any]
) -> RunData:
    finals: Mapping[str, Any] = _last(records, "finals") or {}
    end = _last(records, "end")
    # The journal's configuration names no folders of the machine, so the page can be handed on.
    config = start.get("config") or {}
    times = [float(r["time"]) for r in records if "time" in r]
    answer = _read_json(run_dir / "best.json", f"`depthsearch resume {run_dir}` writes it again")
    best = (end or {}).get("best") or finals.get("best") or (answer or {}).get("mask")
    space = SearchSpace.from_json(start["space"])
    points = tuple(_points(records))
    fresh = tuple(Evaluation.from_json(e) for e in finals.get("evaluations", ()))
    front = tuple(_front(space, points, fresh, finals.get("front"))) if space.front else ()
    if front:
        points = tuple(replace(p, final=p.final and space.fits(p.mask)) for p in points)
        fresh = tuple(e for e in fresh if space.fits(e.mask))
    baselines = (Mask.from_key(key) for key in finals.get("baselines", ()))
    return RunData(
        name=run_dir.resolve().name,
        version=str(start.get("version", "unknown")),
        config=config,
        config_text=to_yaml(config),
        signature=start.get("signature") or {},
        space=space,
        points=points,
        finals=fresh,
        baselines=frozenset(baselines),
        chosen=Mask.from_key(best) if best else None,
        end_reason=str(end["reason"]) if end else None,
        cost_tokens=max(
            (float(r["cost_tokens"]) for r in records if "cost_tokens" in r), default=0
        ),
        seconds=max(times) - min(times) if times else 0.0,
        export=_read_json(run_dir / "export.json", "export the run again"),
        overfit=_read_json(run_dir / "overfit.json", f"`depthsearch overfit {run_dir}` again"),
        front=front,
    )


def _front(
    space: SearchSpace,
    points: Sequence[Point],
    fresh: Sequence[Evaluation],
    choices: Sequence[Mapping[str, Any]] | None,
) -> Iterable[FrontEntry]:
    """The answer at each budget by the finals, or, before them, the best mask so far."""
    ranked = sorted((p for p in points if p.complete), key=lambda p: p.evaluation.order)
    judged = {evaluation.mask.key: evaluation for evaluation in fresh}
    for place, point in enumerate(space.points):
        fitting = [p for p in ranked if point.fits(p.mask)]
        if choices is None:
            yield FrontEntry(place + 1, point, fitting[0] if fitting else None)
            continue
        key = choices[place]["best"]
        yield FrontEntry(
            place + 1,
            point,
            next((p for p in fitting if p.mask.key == key), None),
            judged.get(key),
            judged.get(choices[place]["baseline"]),
        )


def family(origin: str) -> str:
    """The kind of an origin: known kinds by name, others by their first word."""
    for prefix, name in _FAMILIES:
        if origin.startswith(prefix):
            return name
    words = origin.replace(":", " ").replace(",", " ").split()
    return words[0].lower() if words else "unknown"


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, text) pairs, in order."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows.extend(flatten(value, f"{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, text))
    return rows


def _points(records: Sequence[Mapping[str, Any]]) -> Iterable[Point]:
    asked: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("op") == "ask":
            asked[int(record["id"])] = record["proposals"]
        elif record.get("op") == "tell":
            proposals = asked.get(int(record["id"]), [])
            for proposal, told in zip(proposals, record["evaluations"], strict=False):
                yield Point(
                    str(proposal["origin"]),
                    bool(proposal["final"]),
                    Evaluation.from_json(told),
                    float(record["cost_tokens"]),
                )


def _last(records: Sequence[Mapping[str, Any]], op: str) -> Mapping[str, Any] | None:
    return next((r for r in reversed(records) if r.get("op") == op), None)


def _read_json(path: Path, remedy: str) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise RunDirectoryError(f"{path} is damaged: delete it, then {remedy}")
    return data


def _inside(data: Mapping[str, Any], *keys: str) -> object:
    value: object = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
