"""What a configuration names, loaded: the model, its text, the space and the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthsearch.calibration.chrf import has_sacrebleu
from depthsearch.calibration.objectives import OBJECTIVES, KLDivergence, Objective
from depthsearch.calibration.pair_rows import PairRows
from depthsearch.calibration.parallel import Pair
from depthsearch.calibration.tasks import Task
from depthsearch.calibration.text import Documents
from depthsearch.calibration.windows import Other, Splits, check_windows, make_splits
from depthsearch.config import RunConfig, SearchConfig
from depthsearch.errors import ConfigError, RunDirectoryError
from depthsearch.evaluation import Backend, InProcess, Racing, Refitted, Streamed, Written
from depthsearch.evaluation.fitting import HELD_BACK
from depthsearch.evaluation.refitted import repairing
from depthsearch.evaluation.turns import Repair
from depthsearch.model.anatomy import Anatomy, context_window, describe
from depthsearch.model.load import LoadedModel
from depthsearch.model.repair import Patch
from depthsearch.model.selfcheck import SelfCheck, self_check
from depthsearch.model.streaming import StreamedModel
from depthsearch.run import tasks
from depthsearch.run.fits import load_fit, text_name
from depthsearch.run.front import with_front
from depthsearch.run.latency_table import Latency, read_latency
from depthsearch.run.opening import open_model, open_streamed
from depthsearch.run.planning import Plan
from depthsearch.run.replaying import searcher_options
from depthsearch.run.signing import signed
from depthsearch.run.spaces import make_space
from depthsearch.run.workers import (
    Workers,
    check_cluster,
    check_gradients,
    check_repair,
    host_bytes,
    threads_of,
    worker_text,
)
from depthsearch.searchers import check_options
from depthsearch.sources import is_path
from depthsearch.space import Mask, SearchSpace

if TYPE_CHECKING:
    from depthsearch.evaluation.ray_metrics import Metrics


@dataclass(frozen=True)
class Session:
    """A loaded model with everything that a search over it needs."""

    config: RunConfig
    loaded: LoadedModel
    anatomy: Anatomy
    check: SelfCheck
    documents: Documents
    space: SearchSpace
    streamed: StreamedModel | None = None
    latency: Latency | None = None
    workers: Workers = field(default_factory=Workers, repr=False, compare=False)
    pairs: Mapping[str, Pair] = field(default_factory=dict, repr=False)
    fit_other: Other | None = field(default=None, repr=False)
    rows: PairRows | None = field(default=None, repr=False)
    drawn: dict[tuple[Any, ...], Splits] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, config: RunConfig) -> Session:
        """Load and check everything; raises InputError of the part that is wrong."""
        check_search(config.search)
        check_cluster(config)
        check_repair(config, config.search)
        check_gradients(config, config.search)
        tasks.check_task(config, config.search)
        latency = read_latency(config.space.latency)
        threads = threads_of(config)
        if threads is not None:
            torch.set_num_threads(threads)
        text = tasks.load_text(config.calibration)
        other = load_fit(config.calibration)
        streamed = None
        if config.model.streamed:
            loaded, streamed = open_streamed(config)
        else:
            loaded = open_model(config)
        documents, pairs = tasks.prompted(text, config.calibration, loaded.tokenizer)
        if latency is not None:
            latency.check(loaded)
        if loaded.model.config.is_encoder_decoder:
            tasks.check_two_stacks(config)
        languages = config.calibration.languages
        rows = tasks.make_rows(loaded.model, loaded.tokenizer, pairs, languages)
        anatomy = describe(loaded.model)
        space = with_front(make_space(config.space, loaded.model, anatomy, latency), config.front)
        check = self_check(loaded.model, anatomy) if streamed is None else streamed.check()
        return cls(
            config,
            loaded,
            anatomy,
            check,
            documents,
            space,
            streamed,
            latency,
            pairs=pairs,
            fit_other=other,
            rows=rows,
        )

    def splits(self, seed: int, fit_tokens: int | None = None) -> Splits:
        """Select and finals windows drawn by `seed`; the held-out ones never depend on it.

        `fit_tokens` of text for repairs instead of as much as the run takes; the others stay.
        Drawn once: a comparison asks for the same seed with every arm, and tokenizing takes
        seconds. Raises DataError for too little text, and for text that the model can't take.
        """
        calibration, fits = self.config.calibration, self._fits
        if fit_tokens is not None:
            fits = {"--fit": fit_tokens}
        fit_key = max(fits, key=fits.__getitem__, default="fit_tokens")
        asked = (
            calibration.window_tokens,
            calibration.select_tokens,
            calibration.finals_tokens,
            calibration.heldout_tokens,
            calibration.heldout_fraction,
            seed,
            fits.get(fit_key, 0),
        )
        key = (self.documents, self.fit_other, *asked)
        if key not in self.drawn:
            tokenizer, other = self.loaded.tokenizer, self.fit_other
            self.drawn[key] = make_splits(
                self.documents, tokenizer, *asked, other, self.rows, fit_key
            )
        splits = self.drawn[key]
        self.check_text(splits.select, splits.finals, splits.heldout, splits.fit)
        return splits

    def check_text(self, *texts: torch.Tensor) -> None:
        """Raise DataError for windows `[n, window]` that the model can't take."""
        model = self.loaded.model
        rows = model.get_input_embeddings().weight.shape[0]
        for windows in texts:
            # An encoder-decoder reads the first half of a row and writes the second.
            parts = windows.chunk(len(self.anatomy.stacks), dim=1)
            for part in parts:
                check_windows(part, rows, context_window(model))

    def check_model(self, best: Mapping[str, Any], run: Path) -> None:
        """Raise RunDirectoryError where the best.json of `run` is of another model."""
        if self.loaded.fingerprint != best["model"]["fingerprint"]:
            raise RunDirectoryError(
                f"the model at {self.config.model.path} is not the one that {run} searched (its "
                "fingerprint differs): restore it, or search again"
            )

    def close(self) -> None:
        """End the workers, if any."""
        self.workers.close()

    @property
    def _fits(self) -> Mapping[str, int]:
        """How much text repairs take, by setting, nothing where nothing is repaired."""
        search, calibration = self.config.search, self.config.calibration
        wanted = {
            "fit_tokens": (search.repair, calibration.fit_tokens),
            "finals_fit_tokens": (search.finished, calibration.finals_fit_tokens),
        }
        return {key: tokens for key, (repair, tokens) in wanted.items() if repair != "none"}

    def backends(self, splits: Splits, seed: int) -> tuple[Backend, Backend]:
        """What judges masks in the search, and what judges its finalists."""
        search, score = self.config.search, self.config.score
        fit = [self._fit_windows(splits, final=final) for final in (False, True)]
        return (
            self.backend(splits.select, seed, search.repair, fit[0], score, splits.select_texts),
            self.backend(
                splits.finals,
                seed,
                search.finished,
                fit[1],
                texts=splits.finals_texts,
                toward_text=search.toward_text,
            ),
        )

    def repair(
        self, mask: Mask, splits: Splits, seed: int, finals: Backend | None = None
    ) -> tuple[Patch, ...]:
        """The refitted projections of the result, none where it is not repaired.

        `finals`, what judged the finalists, fits them where it is in this process: it has recorded
        the dense model on the fit text already, which takes time and memory.
        """
        kind = self.config.search.finished
        if kind == "none":
            return ()
        if isinstance(finals, Refitted):
            return finals.repair(mask)
        fit, positions = self._fit_windows(splits, final=True), self.config.objective.positions
        toward_text = self.config.search.toward_text
        here = self._here(
            splits.finals, KLDivergence(), positions, seed, kind, fit, toward_text=toward_text
        )
        assert isinstance(here, Refitted)
        return here.repair(mask)

    def backend(
        self,
        windows: torch.Tensor,
        seed: int,
        repair: Repair = "none",
        fit: torch.Tensor | None = None,
        score: str | None = None,
        texts: Sequence[str] = (),
        toward_text: float = 0.0,
    ) -> Backend:
        """The configured backend for the configured objective, or another `score`, on `windows`.

        With a `repair` masks are fitted on `fit` first, leaning by `toward_text`; a task score
        takes the documents `texts`.
        """
        objective, calibration = self.config.objective, self.config.calibration
        kind, task = score or objective.kind, None
        if tasks.scores_text(kind):
            # Hints are taken on the windows all the same.
            kind = "kl"
            task = tasks.make_task(self.config, self.loaded, self.pairs, windows, texts, self.rows)
        judge = windows, OBJECTIVES[kind](), objective.positions, seed
        here = self._here(*judge, repair, fit, task, toward_text)
        if self.config.cluster.backend == "in-process":
            return here
        from depthsearch.evaluation.ray_backend import RayBackend
        from depthsearch.evaluation.spread import SpreadStreamed

        judged = (kind, str(self.check.mode), calibration.batch_tokens, objective.positions, seed)
        text = worker_text(
            windows, *judged, repair=repair, fit=fit, task=task, toward_text=toward_text
        )
        cluster = self.workers.start(self.config, self.loaded)
        if isinstance(here, Streamed):
            cluster.crew.add_text(text)
            return SpreadStreamed(cluster.dispatcher, here, text.name)
        return RayBackend(cluster, here, text)

    def heldout_task(self, splits: Splits) -> Task | None:
        """What is to be written for held-out text, None where it would not be scored.

        That is by runs that judge what masks write, and with encoder-decoders where sacrebleu is
        installed. Raises DataError where a prompt does not fit.
        """
        kinds = (self.config.score, self.config.objective.kind)
        usual = self.rows is not None and has_sacrebleu()
        if not usual and not any(map(tasks.scores_text, kinds)):
            return None
        text = splits.heldout, splits.heldout_texts
        return tasks.make_task(self.config, self.loaded, self.pairs, *text, self.rows)

    def _fit_windows(self, splits: Splits, *, final: bool) -> torch.Tensor:
        key, window = "finals_fit_tokens" if final else "fit_tokens", splits.window_tokens
        tokens = self._fits.get(key, 0)
        if key in self._fits and tokens < HELD_BACK * window:
            raise ConfigError(
                f"calibration.{key} is {tokens}, but a repair is fitted on {HELD_BACK} windows of "
                f"{window} tokens at least: raise it to {HELD_BACK * window} or more"
            )
        other, count = self.fit_other, tokens // window
        if count and other is not None and not any(other.places(count)):
            raise ConfigError(
                f"calibration.fit_share is {other.share:g}, which of the {count} windows of {key} "
                "is none: raise it, or leave fit_text out"
            )
        return splits.fit[:count]

    def tell_workers_to(self, on_state: Callable[[dict[str, Any]], None]) -> None:
        """Have the state of the workers told from now on, if there are any."""
        if self.workers.cluster is not None:
            self.workers.cluster.tell_to(on_state)

    def metrics(self, run: str) -> Metrics | None:
        """Ray's metrics for the run of that name, None without workers."""
        if self.workers.cluster is None:
            return None
        from depthsearch.evaluation.ray_metrics import Metrics

        return Metrics(run)

    def judge(self, windows: torch.Tensor) -> InProcess | Streamed:
        """A backend of this process for held-out figures, on every position."""
        here = self._here(windows, KLDivergence(), 1.0, 0)
        assert isinstance(here, InProcess | Streamed)
        return here

    def _here(
        self,
        windows: torch.Tensor,
        objective: Objective,
        positions: float,
        seed: int,
        repair: Repair = "none",
        fit: torch.Tensor | None = None,
        task: Task | None = None,
        toward_text: float = 0.0,
    ) -> InProcess | Refitted | Streamed | Written:
        what: dict[str, Any] = {
            "windows": windows,
            "objective": objective,
            "mode": self.check.mode,
            "batch_tokens": self.config.calibration.batch_tokens,
            "positions": positions,
            "seed": seed,
        }
        if self.streamed is not None:
            return Streamed(self.streamed, **what, host_bytes=host_bytes(self.config.model))
        if task is not None:
            return Written(InProcess(self.loaded.model, self.anatomy, **what), task)
        what |= {"model": self.loaded.model, "anatomy": self.anatomy, "toward_text": toward_text}
        return repairing(repair, fit, **what)

    @property
    def _one_loss(self) -> bool:
        return self.config.score == self.config.objective.kind

    def plan(self) -> Plan:
        """The search part of the configuration."""
        search = self.config.search
        finalists = search.finalists_of(len(self.space.points))
        return Plan(
            method=search.method,
            options=searcher_options(search),
            seed=search.seed,
            cost_tokens=search.cost_tokens,
            max_evaluations=search.max_evaluations,
            patience=search.patience,
            finalists=finalists,
            racing=bool(search.racing) and Racing(**search.racing.model_dump()),
            ask=search.batch,
            # The lowest by the score needn't be lowest by the objective, so several are ranked.
            baselines=1 if self._one_loss else max(1, min(4, finalists // 2)),
            texts=(*(f"calibration.{key}" for key in [*self._fits][::-1]), *Plan.texts),
        )

    @cached_property
    def model_json(self) -> dict[str, Any]:
        """What names the model, without the folders of this machine."""
        source = self.loaded.source
        return {
            "source": Path(source).name if is_path(source) else source,
            "revision": self.loaded.revision,
            "fingerprint": self.loaded.fingerprint,
        }

    @property
    def documents_name(self) -> str:
        """The calibration text's hub id, or the name of its file without the folders above."""
        return text_name(self.documents)

    def signature(
        self, splits: Splits, seed: int, arms: Sequence[SearchConfig] = ()
    ) -> dict[str, Any]:
        """What a figure cannot be separated from: versions, model, data, protocol, seed, dtype.

        The protocol is that of the configured search, or of all the `arms` of a comparison.
        """
        return signed(self, splits, seed, arms)


@contextmanager
def opened(config: RunConfig, session: Session | None) -> Iterator[Session]:
    """`session` itself, or one opened now and closed at the end."""
    if session is not None:
        yield session
        return
    session = Session.open(config)
    try:
        yield session
    finally:
        session.close()


def check_search(search: SearchConfig) -> None:
    """Refuse an unknown method or option before anything slow starts; raises ConfigError."""
    check_options(search.method, search.options)
