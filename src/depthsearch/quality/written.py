"""chrF++ of what models write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from depthsearch.calibration.chrf import chrf_score, chrf_signature
from depthsearch.calibration.tasks import Task
from depthsearch.evaluation.written import write

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ChrF:
    """chrF++ of all texts together, 0 to 100, and how it was measured."""

    score: float
    protocol: str


def score_written(
    models: Mapping[str, Any],
    task: Task,
    batch_tokens: int = _BATCH_TOKENS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, ChrF]:
    """Have each model write for `task` by greedy decoding, and score the texts.

    They are held against the references of `task`, without any against what the first model writes.
    `on_progress(model, done, total)` counts texts.
    """
    batches = task.batches(batch_tokens)
    total = len(task.prompts)
    texts: dict[str, list[str]] = {}
    for name, model in models.items():
        texts[name] = []
        for places in batches:
            if on_progress is not None:
                on_progress(name, len(texts[name]), total)
            texts[name] += write(model, task, places)[0]
        if on_progress is not None:
            on_progress(name, total, total)
    first = next(iter(models))
    references = task.references or texts[first]
    against = "their references" if task.references else f"those of the model '{first}'"
    protocol = (
        f"{total} texts of at most {task.max_new_tokens} tokens, greedy, against {against}, "
        f"{chrf_signature()}"
    )
    return {name: ChrF(chrf_score(found, references), protocol) for name, found in texts.items()}
