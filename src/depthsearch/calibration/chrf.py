"""chrF++ of generated texts as a loss: 100 less the score, so that lower is better.

chrF++ (Popovic, "chrF++: words helping character n-grams", WMT 2017) is an F-score of character
n-grams up to 6 and word n-grams up to 2, recall counting twice. It is computed by sacrebleu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from depthsearch.errors import ConfigError

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

CHRF_KIND = "chrf"
"""What the run file calls this loss."""

_WORD_ORDER = 2


def chrf_losses(texts: Sequence[str], references: Sequence[str]) -> tuple[float, ...]:
    """100 less the sentence-level chrF++ of each text against its reference, in points.

    A text that is its reference loses nothing, also where both are empty, which have no score.
    """
    metric = _metric()
    return tuple(
        0.0 if text == reference else 100.0 - metric.sentence_score(text, [reference]).score
        for text, reference in zip(texts, references, strict=True)
    )


def chrf_score(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF++ of all texts together against one reference each, 0 to 100, as corpora are scored."""
    return float(_metric().corpus_score(list(texts), [list(references)]).score)


def chrf_signature() -> str:
    """The signature of sacrebleu, which says what exactly was scored and by which version."""
    metric = _metric()
    # It has no signature before it has seen how many references there are.
    metric.sentence_score("a", ["a"])
    return f"chrF2++|{metric.get_signature()}"


def has_sacrebleu() -> bool:
    """Whether texts can be scored here."""
    return find_spec("sacrebleu") is not None


def check_sacrebleu() -> None:
    """Raise ConfigError where sacrebleu is missing."""
    if not has_sacrebleu():
        raise ConfigError(
            "the loss chrf needs sacrebleu, which is not installed: "
            "pip install 'depthsearch[translation]', or take another loss"
        )


@lru_cache(maxsize=1)
def _metric() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(word_order=_WORD_ORDER)
