"""The search loop: ask, evaluate, tell, and at the end choose on fresh data.

Every step is committed to the ledger before anything acts on it, so a killed search is resumed by
running this loop again over its journal. It knows no torch: backends compute the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthsearch.errors import NothingFoundError
from depthsearch.evaluation import Backend, Racing, evaluate
from depthsearch.run.choice import choose
from depthsearch.run.ledger import Ledger
from depthsearch.run.planning import Plan, Purse
from depthsearch.run.points import Contest, Finalists, FrontPoint
from depthsearch.run.replaying import ask_size, searcher_rng
from depthsearch.run.sharing import join, leave, recorded_ask
from depthsearch.searchers import (
    Searcher,
    SharedSearcher,
    build_searcher,
    needs_limit,
    needs_sensitivity,
)
from depthsearch.space import (
    Batch,
    Evaluation,
    Hints,
    Mask,
    Proposal,
    SearchSpace,
    Status,
    front_of,
)

_MOST_FAILURES = 100
"""Failed evaluations in a row after which a search gives up."""


@dataclass(frozen=True)
class Progress:
    """Where a search stands; `fraction` is the best guess of how much of its phase is done.

    It is None where patience alone ends the search: nobody knows when.
    """

    phase: str
    fraction: float | None
    cost_tokens: float
    evaluations: int
    best_loss: float | None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """The chosen mask with its evaluations on search data and on fresh data.

    With a front, `front` holds the answer at each budget that has one, and `archive` what no other
    mask beat in loss and costs on search data, with its origin.
    """

    best: Mask
    origin: str
    search: Evaluation
    finals: Evaluation
    baseline: Mask | None
    reason: str
    cost_tokens: float
    evaluations: int
    front: tuple[FrontPoint, ...] = ()
    archive: tuple[tuple[Evaluation, str], ...] = ()


class SearchLoop:
    """One search from its first record to its last."""

    def __init__(
        self,
        ledger: Ledger,
        space: SearchSpace,
        plan: Plan,
        select: Backend,
        finals: Backend,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._ledger = ledger
        self._space = space
        self._plan = plan
        self._select = select
        self._finals = finals
        self._on_progress = on_progress or (lambda _: None)
        self._known: dict[Mask, Evaluation] = {}
        self._origins: dict[Mask, str] = {}
        self._contest = Contest(space)
        self._spent = 0.0
        self._freed = 0.0
        self._failures = 0
        self._best: dict[int, float] = {}
        self._vain = 0
        self._purse = Purse(plan, space, select, finals)

    def run(self, start: Mapping[str, Any]) -> Outcome:
        """Search; `start` is the first record.

        Raises NothingFoundError, JournalError, StorageError.
        """
        self._ledger.commit({"op": "start", **start})
        hints = self._hints()
        plan = self._plan
        options = dict(plan.options)
        ledger, rng = self._ledger, searcher_rng(plan.seed)
        if ledger.finished and options.get("storage") is not None and not options.get("shared"):
            # What it left there is whole, and by now the name may be another run's.
            options["storage"] = None
        searcher = build_searcher(
            plan.method, self._space, hints, rng, options, ledger.run, resumed=ledger.replaying
        )
        shared = searcher if isinstance(searcher, SharedSearcher) else None
        if shared is not None:
            join(shared, self._ledger, start)
        reason, number = "finished", 0
        while (asked := self._ask(searcher)).proposals:
            batch = self._purse.affordable(
                asked, self._spent, len(self._known), self._finalists, bool(self._contest.masks)
            )
            if len(batch.proposals) < len(asked.proposals):
                reason = "budget"
            if not batch.proposals:
                searcher.tell(())
                break
            evaluations = self._step(number, batch)
            searcher.tell(evaluations)
            number += 1
            if self._only_failures(evaluations):
                reason = "failures"
                break
            if self._in_vain(batch.proposals):
                reason = "patience"
                break
        if shared is not None:
            reason = leave(shared, self._ledger, reason)
        outcome = self._choose(reason)
        self._spent = outcome.cost_tokens
        self._report("done", self._spent, 1.0, ())
        self._ledger.commit(
            {
                "op": "end",
                "reason": outcome.reason,
                "best": outcome.best.key,
                "cost_tokens": outcome.cost_tokens,
            }
        )
        return outcome

    def _hints(self) -> Hints:
        def compute() -> dict[str, Any]:
            hints, cost = self._select.hints()
            cost += self._select.preparation
            if needs_sensitivity(self._plan.method):
                sensitivity, more = self._select.sensitivity()
                hints, cost = replace(hints, sensitivity=sensitivity), cost + more
            return {"op": "hints", **hints.to_json(), "cost_tokens": cost}

        record = self._ledger.recall("hints", compute)
        self._spent = float(record["cost_tokens"])
        return Hints.from_json(record)

    def _ask(self, searcher: Searcher) -> Batch:
        if isinstance(searcher, SharedSearcher):
            followed = recorded_ask(searcher, self._ledger)
            if followed is not None:
                return followed
        return searcher.ask(self._ask_size())

    def _ask_size(self) -> int | None:
        return ask_size(self._plan.ask, self._plan.max_evaluations, len(self._known))

    def _finalists(self) -> Finalists:
        """The masks to re-rank, the best and the best baselines first, and all baselines."""
        plan = self._plan
        return self._contest.finalists(self._known, self._origins, plan.finalists, plan.baselines)

    def _step(self, number: int, batch: Batch) -> list[Evaluation]:
        racing = self._plan.racing
        survivors = batch.survivors if racing and racing.method == "paired" else None
        self._ledger.commit(
            {
                "op": "ask",
                "id": number,
                "survivors": survivors,
                "rivals": [mask.key for mask in batch.rivals],
                "proposals": [proposal.to_json() for proposal in batch.proposals],
                **({"stages": [s.to_json() for s in batch.stages]} if batch.stages else {}),
            }
        )

        once = self._select.prepare([proposal.mask for proposal in batch.proposals])

        def compute() -> dict[str, Any]:
            evaluations, cost = evaluate(
                self._select,
                [proposal.mask for proposal in batch.proposals],
                survivors=survivors,
                rivals=[self._known[mask] for mask in batch.rivals if mask in self._known],
                stages=batch.stages,
                error_rate=(racing or Racing()).error_rate,
                on_unit=lambda done, total, cost: self._report(
                    "search", self._spent + once + cost, done / total, batch.proposals
                ),
            )
            return {
                "op": "tell",
                "id": number,
                "evaluations": [evaluation.to_json() for evaluation in evaluations],
                "cost_tokens": self._spent + once + cost,
            }

        record = self._ledger.recall("tell", compute)
        evaluations = [Evaluation.from_json(entry) for entry in record["evaluations"]]
        self._spent = float(record["cost_tokens"])
        for proposal, evaluation in zip(batch.proposals, evaluations, strict=True):
            self._known[proposal.mask] = evaluation
            self._origins[proposal.mask] = proposal.origin
            if proposal.final:
                self._contest.add(proposal.mask)
        self._freed = max(self._freed, self._freed_by(batch.proposals))
        self._report("search", self._spent, 0.0, batch.proposals)
        return evaluations

    def _only_failures(self, evaluations: Sequence[Evaluation]) -> bool:
        """Whether nothing but failures comes back; raises NothingFoundError if it never was else.

        A search that has found something by then ends with it.
        """
        for evaluation in evaluations:
            self._failures = 0 if evaluation.status.has_loss else self._failures + 1
        if self._failures < _MOST_FAILURES:
            return False
        if any(self._known[mask].status is Status.OK for mask in self._contest.masks):
            return True
        raise NothingFoundError(
            f"the last {self._failures} masks all failed ({evaluations[-1].status}): check the "
            "model's dtype and memory, then start a new run"
        )

    def _in_vain(self, proposals: Sequence[Proposal]) -> bool:
        """Whether as many masks in a row as patience allows were best at no budget.

        It is looked at behind every ask, and begins when a mask is known at each budget.
        """
        for proposal in proposals:
            if not proposal.final:
                continue
            evaluation, better = self._known[proposal.mask], False
            if evaluation.status is Status.OK and evaluation.loss is not None:
                for place in self._contest.places(proposal.mask):
                    if evaluation.loss < self._best.get(place, math.inf):
                        self._best[place], better = evaluation.loss, True
            begun = len(self._best) == len(self._space.points)
            self._vain = 0 if better or not begun else self._vain + 1
        return self._plan.patience is not None and self._vain >= self._plan.patience

    def _choose(self, reason: str) -> Outcome:
        """Re-rank the finalists on fresh data; a challenger must beat the best baseline there."""
        finalists, contest = self._finalists(), self._contest
        masks, baselines = finalists.masks, finalists.baselines
        if self._plan.cost_tokens is not None:
            left = self._plan.cost_tokens - self._spent - self._finals.preparation
            least = finalists.needed
            while len(masks) > least and self._purse.finals_cost(masks, least) > left:
                masks.pop()
        if not any(self._known[mask].status is Status.OK for mask in contest.at(contest.own)):
            if not self._known and self._plan.cost_tokens is not None:
                raise NothingFoundError(
                    f"search.cost_tokens is {self._plan.cost_tokens:,.0f}, which leaves nothing "
                    "for a first mask beside the final ranking: raise it, or lower "
                    f"{' or '.join(self._plan.texts)}"
                )
            raise NothingFoundError(
                f"none of {len(self._known)} evaluated masks met the budget and had a finite loss; "
                "raise search.cost_tokens or search.max_evaluations, or check the model's dtype"
            )

        def compute() -> dict[str, Any]:
            evaluations, cost = evaluate(
                self._finals,
                masks,
                stages=self._purse.final_stages(len(masks), finalists.needed),
                safe=masks[: finalists.needed],
                on_unit=lambda done, total, cost: self._report(
                    "finals", self._spent + cost, done / total, ()
                ),
            )
            safe = [mask for mask in baselines if mask in masks]
            own = set(contest.at(contest.own))
            chosen = choose([e for e in evaluations if e.mask in own], safe)
            front = self._space.front and contest.choices(evaluations, safe, choose)
            return {
                "op": "finals",
                "evaluations": [evaluation.to_json() for evaluation in evaluations],
                "baselines": [mask.key for mask in safe],
                "best": chosen.mask.key,
                **({"front": front} if front else {}),
                "cost_tokens": self._spent + self._finals.preparation + cost,
            }

        record = self._ledger.recall("finals", compute)
        fresh = [Evaluation.from_json(entry) for entry in record["evaluations"]]
        best = Mask.from_key(record["best"])
        own = [key for key in record["baselines"] if self._space.fits(Mask.from_key(key))]
        front = record.get("front", ())
        archive = front_of(self._space, self._known.values()) if front else ()
        return Outcome(
            best=best,
            origin=self._origins[best],
            search=self._known[best],
            finals=next(e for e in fresh if e.mask == best),
            baseline=Mask.from_key(own[0]) if own else None,
            reason=reason,
            cost_tokens=float(record["cost_tokens"]),
            evaluations=len(self._known),
            front=contest.answers(front, fresh, self._known, self._origins) if front else (),
            archive=tuple((e, self._origins[e.mask]) for e in archive),
        )

    def _freed_by(self, proposals: Sequence[Proposal]) -> float:
        dense = self._space.cost(self._space.dense)
        need = max(1, dense - self._space.cap)
        return max((dense - self._space.cost(p.mask)) / need for p in proposals)

    def _report(self, phase: str, spent: float, part: float, proposals: Sequence[Proposal]) -> None:
        plan = self._plan
        fraction: float | None
        if phase in ("finals", "done"):
            fraction = part
        elif plan.cost_tokens is not None:
            fraction = spent / plan.cost_tokens
        elif plan.max_evaluations is not None:
            fraction = (len(self._known) + part * len(proposals)) / plan.max_evaluations
        elif needs_limit(plan.method):
            fraction = None
        else:
            # Without a limit the share of the budget freed so far tells how far greedy has come.
            now = self._freed_by(proposals)
            fraction = self._freed + part * max(0.0, now - self._freed)
        losses = [
            e.loss
            for mask in self._contest.at(self._contest.own)
            if (e := self._known[mask]).status is Status.OK and e.loss is not None
        ]
        fraction = None if fraction is None else min(1.0, fraction)
        self._on_progress(
            Progress(phase, fraction, spent, len(self._known), min(losses, default=None))
        )
