"""The signature of a run's figures: what was computed on what, by which versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from depthsearch import __version__
from depthsearch.calibration.windows import Splits
from depthsearch.config import SearchConfig
from depthsearch.run import tasks
from depthsearch.run.fits import fit_data
from depthsearch.run.workers import computing_device

if TYPE_CHECKING:
    from depthsearch.run.session import Session


def signed(
    session: Session, splits: Splits, seed: int, arms: Sequence[SearchConfig] = ()
) -> dict[str, Any]:
    """The signature of figures that `session` computes; see `Session.signature`."""
    calibration, objective = session.config.calibration, session.config.objective
    searches = arms or (session.config.search,)
    scores = list(dict.fromkeys(search.score or objective.kind for search in searches))
    finals = "" if scores == [objective.kind] else f", finals on {objective.kind}"
    searched = f"search on {' or '.join(scores)}{finals}{tasks.protocol(session.config)}"
    repairs = list(dict.fromkeys(_repairs(session, search) for search in searches))
    if len(repairs) > 1:
        repairs = ["by arm: " + "or ".join(text or "none repaired, " for text in repairs)]
    return {
        "depthsearch": __version__,
        **software(),
        "model": session.model_json,
        "model_class": session.anatomy.model_class,
        "dtype": str(session.loaded.dtype).removeprefix("torch."),
        "device": computing_device(session.config, session.loaded),
        "data": {
            "source": session.documents_name,
            "documents": session.documents.fingerprint,
            "windows": splits.fingerprint,
            **(fit_data(session.fit_other) if len(splits.fit) or _arms_fit(session) else {}),
        },
        "heldout_protocol": (
            f"KL and cross-entropy on every position of {len(splits.heldout)} windows of "
            f"{_window(session)}"
        ),
        "protocol": (
            f"{searched}, windows of {_window(session)}, "
            f"{100 * objective.positions:g} % of positions, select {len(splits.select)} / "
            f"finals {len(splits.finals)} / held-out {len(splits.heldout)} windows, "
            f"batches of {calibration.batch_tokens} tokens, {repairs[0]}"
            f"replay by {session.check.mode}"
        ),
        **tasks.metric(session.config),
        **({"latency": session.latency.signature} if session.latency is not None else {}),
        "seed": seed,
    }


def software() -> dict[str, Any]:
    """What computes here, as signatures name it, and on how many threads."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _repairs(session: Session, search: SearchConfig) -> str:
    """What a signature says of a search's repairs, nothing where there are none."""
    calibration = session.config.calibration
    leaning = f", {search.toward_text:g} nats toward the text" if search.toward_text else ""
    parts = [
        f"{what} repaired ({kind}{how}) on {tokens // calibration.window_tokens} fit windows, "
        for what, kind, how, tokens in (
            ("candidates", search.repair, "", calibration.fit_tokens),
            ("finalists", search.finished, leaning, calibration.finals_fit_tokens),
        )
        if kind != "none"
    ]
    return "".join(parts)


def _window(session: Session) -> str:
    """How long windows are."""
    tokens = session.config.calibration.window_tokens
    if session.rows is None:
        return f"{tokens} tokens"
    return f"{tokens} tokens read and {tokens} written at most"


def _arms_fit(session: Session) -> bool:
    """Whether an arm of a comparison repairs."""
    compare = session.config.compare
    arms = compare.arms.values() if compare is not None else ()
    return any({arm.repair, arm.finished} != {"none"} for arm in arms)
