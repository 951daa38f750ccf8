from __future__ import annotations

from collections import Counter
from importlib.metadata import version

import pytest

from depthsearch.calibration import chrf
from depthsearch.calibration.chrf import check_sacrebleu, chrf_losses, chrf_signature
from depthsearch.errors import ConfigError


def by_definition(text: str, reference: str) -> float:
    """chrF++ from the paper's formula: precisions and recalls averaged over n, then F with beta 2.

    Words here have no punctuation, which the metric would split off.
    """
    kinds = [(list("".join(side.split())), side.split()) for side in (text, reference)]
    precisions, recalls = [], []
    for units, order in [(0, n) for n in range(1, 7)] + [(1, n) for n in range(1, 3)]:
        counts = [
            Counter(tuple(side[units][i : i + order]) for i in range(len(side[units]) - order + 1))
            for side in kinds
        ]
        if counts[0] and counts[1]:
            shared = sum((counts[0] & counts[1]).values())
            precisions.append(shared / sum(counts[0].values()))
            recalls.append(shared / sum(counts[1].values()))
    if not precisions or not sum(precisions + recalls):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * p * r / (4 * p + r)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("the cat sat on the mat", "a cat sat on a mat"),
        ("ab", "ab cd ef gh"),
        ("a long answer to a short question", "short"),
        ("größer als alles", "grösser als alle"),
        ("x y z", "a b c"),
    ],
)
def test_the_loss_is_what_the_definition_leaves_of_100_points(text: str, reference: str) -> None:
    (loss,) = chrf_losses([text], [reference])
    assert loss == pytest.approx(100 - by_definition(text, reference), abs=1e-9)


def test_the_same_text_loses_nothing_and_an_empty_one_everything() -> None:
    found = chrf_losses(["a b", "", "", "a b"], ["a b", "", "a b", ""])
    assert found == (0.0, 0.0, 100.0, 100.0)


def test_the_signature_names_metric_and_version() -> None:
    assert chrf_signature() == (
        f"chrF2++|nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:{version('sacrebleu')}"
    )


def test_a_missing_sacrebleu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sacrebleu()
    monkeypatch.setattr(chrf, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'depthsearch\[translation\]'"):
        check_sacrebleu()
