"""Whether the ranking of masks, and the winner, are stable over the sample of calibration text.

One set of masks is judged once on every window of several texts: as many draws as asked for of the
size that the search selects on, the first draw in windows of other lengths, texts of other kinds,
and held-out text. Sizes and folds are regrouped from those losses. What is known of each batch is
in a journal, so that the same command continues a check that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from depthsearch import __version__
from depthsearch.calibration.text import Documents, load_documents
from depthsearch.calibration.windows import batches
from depthsearch.config import RunConfig, load_config, resolved_yaml
from depthsearch.errors import NothingFoundError, RunDirectoryError
from depthsearch.evaluation import Backend
from depthsearch.journal import Journal
from depthsearch.model.anatomy import require_decoder_only
from depthsearch.run.calibration_masks import check_heldout, check_masks, mask_set, run_masks
from depthsearch.run.calibration_texts import CheckOptions, Text, check_sizes, check_texts
from depthsearch.run.directory import (
    CALIBRATION,
    CALIBRATION_JOURNAL,
    CONFIG,
    create_directory,
    occupied,
    write_json,
)
from depthsearch.run.ledger import Ledger
from depthsearch.run.search import shareable_config
from depthsearch.run.session import Session, opened
from depthsearch.run.stability import Sample, stability
from depthsearch.run.stability_words import verdict, warnings
from depthsearch.run.tasks import refuse_task
from depthsearch.space import Mask, Proposal, Status

_MASKS_SEED = 1
_FIGURES_SEED = 2

OnStage = Callable[[str, int, int], None]


def check_calibration(
    config: RunConfig,
    out: Path,
    options: CheckOptions | None = None,
    *,
    run: Path | None = None,
    others: Sequence[tuple[str, str | None]] = (),
    session: Session | None = None,
    on_stage: OnStage | None = None,
) -> dict[str, Any]:
    """Judge masks on several samples of calibration text, and tell how stable their order is.

    `run` is a run directory of the same model, space and text, whose best masks are taken in;
    `others` are texts of other kinds, each with its column. Masks are judged as cut, by the
    configured objective, on all positions of held-out text. An `out` that holds the same check,
    unfinished, is continued. Returns what calibration.json, written last, holds. Raises InputError
    before anything is created where something asked for is wrong, RunDirectoryError where `out`
    holds anything else, NothingFoundError where fewer than two masks can be judged.
    """
    _check_out(config, out)
    refuse_task(config, "a calibration check")
    documents = [load_documents(text, column) for text, column in others]
    stage = on_stage or (lambda *_: None)
    with opened(config, session) as session:
        require_decoder_only(session.loaded.model, "depthsearch calibrate-check")
        return _Check(session, out, options or CheckOptions(), run, documents, stage).run()


@dataclass(frozen=True)
class _Check:
    session: Session
    out: Path
    options: CheckOptions
    known_run: Path | None
    others: Sequence[Documents]
    stage: OnStage
    backends: dict[tuple[str | None, str], Backend] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        session, config = self.session, self.session.config
        check_masks(session.space)
        splits = session.splits(config.search.seed)
        finals = 0 if self.known_run is None else config.calibration.finals_tokens
        texts = check_texts(session, self.options, self.others, splits.heldout, finals)
        sizes = check_sizes(config.calibration, self.options)
        known: tuple[Proposal, ...] = ()
        if self.known_run is not None:
            held = config.calibration.heldout_fraction
            check_heldout(self.known_run, session.documents.fingerprint, held)
            known = run_masks(self.known_run, session.space, session.loaded.fingerprint)
            known = known[: self.options.masks]
        start = {
            "op": "start",
            "version": __version__,
            "signature": session.signature(splits, config.search.seed),
            "config": shareable_config(session),
            "space": session.space.to_json(),
            "options": self.options.to_json(),
            "known": [proposal.mask.key for proposal in known],
            "texts": [text.to_json() for text in texts],
        }
        if not self.out.exists():
            create_directory(self.out, {CONFIG: resolved_yaml(config), CALIBRATION_JOURNAL: ""})
        with Journal(self.out / CALIBRATION_JOURNAL) as journal:
            ledger = Ledger(journal)
            ledger.commit(start)
            proposals, chosen = self._masks(ledger, texts[0], known)
            losses, judged, failed = self._losses(ledger, texts, proposals)
        found = self._found(proposals, texts, losses, failed, sizes) | {
            "texts": start["texts"],
            "cost_tokens": chosen + judged,
            "signature": start["signature"],
        }
        write_json(self.out / CALIBRATION, found)
        return found

    def _masks(
        self, ledger: Ledger, text: Text, known: Sequence[Proposal]
    ) -> tuple[tuple[Proposal, ...], float]:
        """What is judged, and what it cost to choose it."""
        session, options = self.session, self.options
        rng = np.random.default_rng([session.config.search.seed, _MASKS_SEED])

        def choose() -> Mapping[str, Any]:
            hints, cost = self._backend(text).hints()
            found = mask_set(session.space, hints, options.masks, rng, known)
            proposed = [proposal.to_json() for proposal in found]
            return {"op": "masks", "proposals": proposed, "cost_tokens": cost}

        record = ledger.recall("masks", choose)
        proposals = tuple(Proposal.from_json(entry) for entry in record["proposals"])
        return proposals, float(record["cost_tokens"])

    def _losses(
        self, ledger: Ledger, texts: Sequence[Text], proposals: Sequence[Proposal]
    ) -> tuple[list[list[list[float]]], float, dict[int, str]]:
        """Losses by text, mask and window; the cost; and how masks failed, by number.

        A mask that failed is left out of what follows, and its losses have an end.
        """
        tokens = self.session.config.calibration.batch_tokens
        counts = [len(batches(text.windows, tokens)) for text in texts]
        done, title = 0, f"{len(proposals)} masks, {len(texts)} texts"
        losses: list[list[list[float]]] = [[[] for _ in proposals] for _ in texts]
        cost, failed = 0.0, dict[int, str]()
        for place, text in enumerate(texts):
            for batch in range(counts[place]):
                self.stage(title, done, sum(counts))
                active = [i for i in range(len(proposals)) if i not in failed]
                if len(active) < 2:
                    raise NothingFoundError(_all_failed(failed))
                masks = [proposals[i].mask for i in active]
                ahead = range(batch + 1, counts[place])
                record = ledger.recall("losses", partial(self._unit, text, batch, masks, ahead))
                cost += record["cost_tokens"]
                rows = zip(active, record["statuses"], record["losses"], strict=True)
                for i, status, row in rows:
                    losses[place][i].extend(row)
                    if status != Status.OK:
                        failed[i] = status
                done += 1
        self.stage(title, done, sum(counts))
        return losses, cost, failed

    def _unit(
        self, text: Text, batch: int, masks: Sequence[Mask], ahead: Sequence[int]
    ) -> Mapping[str, Any]:
        backend = self._backend(text)
        unit = backend.run(batch, masks, ahead)
        return {
            "op": "losses",
            "text": text.name,
            "batch": batch,
            "losses": [list(row) for row in unit.losses],
            "statuses": [str(status) for status in unit.statuses],
            "cost_tokens": unit.cost_tokens + (0.0 if batch else backend.preparation),
        }

    def _backend(self, text: Text) -> Backend:
        """The configured backend; held-out text is judged on every position.

        Made when a batch is missing, since one that is recorded needs neither states nor workers,
        and dropped for that of the next text.
        """
        key = (text.kind, text.name)
        if key not in self.backends:
            session, config = self.session, self.session.config
            if text.kind is None:
                objective = config.objective.model_copy(update={"positions": 1.0})
                changed = config.model_copy(update={"objective": objective})
                session = replace(session, config=changed)
            self.backends.clear()
            self.backends[key] = session.backend(text.windows, config.search.seed)
        return self.backends[key]

    def _found(
        self,
        proposals: Sequence[Proposal],
        texts: Sequence[Text],
        losses: Sequence[Sequence[Sequence[float]]],
        failed: Mapping[int, str],
        sizes: Sequence[int],
    ) -> dict[str, Any]:
        """All figures, masks numbered from the best on held-out text."""
        session, calibration = self.session, self.session.config.calibration
        usable = [i for i in range(len(proposals)) if i not in failed]
        if len(usable) < 2:
            raise NothingFoundError(_all_failed(failed))
        tables = [np.array([rows[i] for i in usable], dtype=np.float64) for rows in losses]
        order = np.argsort(tables[-1].mean(axis=1), kind="stable")
        tables = [table[order] for table in tables]
        samples = [
            Sample(text.name, text.kind, text.window_tokens, table)
            for text, table in zip(texts, tables, strict=True)
            if text.kind is not None
        ]
        figures = stability(
            samples,
            tables[-1],
            sizes,
            folds=self.options.folds,
            select_tokens=calibration.select_tokens,
            rng=np.random.default_rng(_FIGURES_SEED),
        )
        return {
            "version": __version__,
            "budget_text": session.space.budget.text,
            "objective": session.config.objective.kind,
            "window_tokens": calibration.window_tokens,
            "options": self.options.to_json(),
            "run": None if self.known_run is None else self.known_run.absolute().name,
            "sites": [site.name for site in session.space.sites],
            "masks": [
                {"mask": proposals[i].mask.key, "origin": proposals[i].origin}
                for i in (usable[place] for place in order)
            ],
            **figures,
            "warnings": warnings(figures),
            "verdict": verdict(figures),
            "notes": self._notes(proposals, failed),
        }

    def _notes(self, proposals: Sequence[Proposal], failed: Mapping[int, str]) -> list[str]:
        notes = [
            f"{proposals[i].mask.key} ({proposals[i].origin}) is left out: {status}."
            for i, status in failed.items()
        ]
        if self.session.config.search.repair != "none":
            notes.append(
                "Masks were judged as cut; the configured search judges them repaired, which may "
                "put them in another order."
            )
        notes.append(
            "Without --run the masks are baselines and offspring that nobody has judged, and "
            "differ more than the finalists of a search do, whose winner may be less stable."
            if self.known_run is None
            else "The run chose its masks on text of its own: with the same seed and sizes that is "
            "sample 1, where they look better than they are, and text that no sample holds."
        )
        return notes


def _all_failed(failed: Mapping[int, str]) -> str:
    reasons = ", ".join(sorted(set(failed.values())))
    return (
        f"fewer than two masks could be judged ({reasons}): lower calibration.batch_tokens where "
        "memory ran out, or try another model.dtype where losses are not finite"
    )


def _check_out(config: RunConfig, out: Path) -> None:
    """Refuse an `out` that is neither new nor this very check, unfinished."""
    if not occupied(out):
        return
    if occupied(out / CALIBRATION):
        raise RunDirectoryError(
            f"{out} holds a finished check and is never overwritten: choose another --out"
        )
    if not (out / CONFIG).is_file() or not (out / CALIBRATION_JOURNAL).is_file():
        raise RunDirectoryError(f"{out} exists and is no calibration check: choose another --out")
    if load_config(out / CONFIG) != config:
        raise RunDirectoryError(
            f"{out} holds an unfinished check with another configuration: continue it with "
            f"`depthsearch calibrate-check {out / CONFIG} --out {out}`, or choose another --out"
        )
