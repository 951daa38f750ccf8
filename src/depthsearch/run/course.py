"""What the records of a journal add up to, one record at a time.

The figures are those that the search loop itself reports; nothing here needs a model or torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from depthsearch.space import Mask, SearchSpace, Status


@dataclass(frozen=True)
class Step:
    """One ask with its answer: how long it took, and what it brought and cost."""

    seconds: float
    evaluations: int
    cost_tokens: float


@dataclass
class Course:
    """The course of a search as far as `feed` has seen its records.

    `best_loss` is the lowest loss in nats of a complete evaluation that meets the budget; with
    several budgets, the run's own one, and `front_losses` has the lowest at each, by its text.
    `mean_loss` the mean over the last ask's masks that have one. `statuses` counts evaluated masks
    by how their evaluation ended. `first_time` and `last_time` are Unix seconds.
    """

    op: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    first_time: float | None = None
    last_time: float | None = None
    asks: int = 0
    best_loss: float | None = None
    mean_loss: float | None = None
    cost_tokens: float = 0.0
    finals_loss: float | None = None
    best_mask: str | None = None
    reason: str | None = None
    steps: list[Step] = field(default_factory=list)
    front_losses: dict[str, float | None] = field(default_factory=dict)
    _space: SearchSpace | None = field(default=None, repr=False)
    _ends: dict[str, str] = field(default_factory=dict, repr=False)
    _final: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def evaluations(self) -> int:
        """Masks evaluated, each counted once."""
        return len(self._ends)

    @property
    def statuses(self) -> dict[str, int]:
        """Masks by status, the most frequent first."""
        return dict(Counter(self._ends.values()).most_common())

    def feed(self, record: Mapping[str, Any]) -> None:
        """Take the next record of the journal, with its time stamp."""
        time = float(record["time"])
        cost = float(record.get("cost_tokens", self.cost_tokens))
        self.op = str(record["op"])
        if self.op == "start":
            self.settings = record.get("config", {})
            if record.get("space", {}).get("front"):
                self._space = SearchSpace.from_json(record["space"])
                self.front_losses = {p.budget.text: None for p in self._space.points}
        elif self.op == "ask":
            self._final = frozenset(p["mask"] for p in record["proposals"] if p["final"])
        elif self.op == "tell":
            self._tell(record, time, cost)
        elif self.op == "finals":
            self.best_mask = str(record["best"])
            self.finals_loss = next(
                (e["loss"] for e in record["evaluations"] if e["mask"] == self.best_mask), None
            )
        elif self.op == "end":
            self.reason = str(record["reason"])
        self.cost_tokens = cost
        self.first_time = time if self.first_time is None else self.first_time
        self.last_time = time

    def _tell(self, record: Mapping[str, Any], time: float, cost: float) -> None:
        before = self.evaluations
        losses = []
        for evaluation in record["evaluations"]:
            mask, loss = evaluation["mask"], evaluation["loss"]
            self._ends[mask] = evaluation["status"]
            if loss is None:
                continue
            losses.append(float(loss))
            if evaluation["status"] == Status.OK and mask in self._final:
                self._meet(mask, float(loss))
        self.asks += 1
        self.mean_loss = sum(losses) / len(losses) if losses else None
        seconds = time - (time if self.last_time is None else self.last_time)
        self.steps.append(
            Step(max(0.0, seconds), self.evaluations - before, cost - self.cost_tokens)
        )

    def _meet(self, key: str, loss: float) -> None:
        """Take in the loss of a complete mask that is on budget."""
        space = self._space
        for point in () if space is None else space.points:
            if point.fits(Mask.from_key(key)):
                known = self.front_losses[point.budget.text]
                self.front_losses[point.budget.text] = loss if known is None else min(known, loss)
        if space is None or space.fits(Mask.from_key(key)):
            self.best_loss = loss if self.best_loss is None else min(self.best_loss, loss)
