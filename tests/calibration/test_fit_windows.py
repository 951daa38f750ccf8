"""Fit windows of two kinds of text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from depthsearch.calibration import Documents, Splits, make_splits
from depthsearch.calibration.parallel import ParallelText
from depthsearch.calibration.windows import Other
from depthsearch.errors import DataError
from depthsearch.evaluation.fitting import HELD_BACK

BOS, EOS = 2, 3
OWN = Documents.of([" ".join([f"w{i}"] * 20) for i in range(60)], "own.txt")
OTHER = Documents.of([" ".join([f"w{i}"] * 20) for i in range(60, 90)], "other.txt")


def split(tokenizer: Any, fit: int, other: Other | None, seed: int = 0) -> Splits:
    return make_splits(OWN, tokenizer, 8, 64, 32, 32, 0.3, seed, fit, other)


def numbers(tokenizer: Any, windows: torch.Tensor) -> set[int]:
    """The numbers of the documents in these windows."""
    kept = set(windows.flatten().tolist()) - {BOS, EOS}
    return {int(tokenizer.decode([token]).strip()[1:]) for token in kept}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_share_is_spread_evenly_over_batches_that_are_held_back_and_others(
    share: float, rows: int
) -> None:
    other = Other(OTHER, share)
    places = other.places(160)
    assert all(other.places(count) == places[:count] for count in range(160))
    for start in range(0, 160, 20):
        assert sum(places[: start + 20]) == int(share * (start + 20) + 1e-9)
    every_fifth = [number // rows % HELD_BACK == HELD_BACK - 1 for number in range(160)]
    for count in (32, 64, 160):
        for held in (True, False):
            part = [p for p, h in zip(places[:count], every_fifth, strict=False) if h is held]
            assert abs(sum(part) - share * len(part)) <= 0.5 + math.sqrt(
                share * (1 - share) * len(part)
            )


def test_windows_of_both_texts_stand_at_their_places(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    plain, mixed = split(tokenizer, 128, None), split(tokenizer, 128, Other(OTHER, 0.5))
    assert mixed.fit.shape == plain.fit.shape == (16, 8)
    theirs = torch.tensor(Other(OTHER, 0.5).places(16))
    # The windows of the run's own text are the first of those it has alone.
    assert torch.equal(mixed.fit[~theirs], plain.fit[: int((~theirs).sum())])
    assert min(numbers(tokenizer, mixed.fit[theirs])) >= 60
    for part in ("select", "finals", "heldout"):
        assert torch.equal(getattr(mixed, part), getattr(plain, part))
    assert mixed.fingerprint != plain.fingerprint
    # Less fit text is the first part of more.
    assert torch.equal(split(tokenizer, 64, Other(OTHER, 0.5)).fit, mixed.fit[:8])
    again = split(tokenizer, 128, Other(OTHER, 0.5), seed=1)
    assert not torch.equal(again.fit[theirs], mixed.fit[theirs])


def test_documents_that_are_judged_on_are_left_out(make_tokenizer: Any) -> None:
    both = Documents.of([*OWN.texts, *OTHER.texts], "both.txt")
    tokenizer = make_tokenizer()
    found = split(tokenizer, 128, Other(both, 1.0)).fit
    assert min(numbers(tokenizer, found)) >= 60


def test_sources_and_targets_that_are_judged_on_are_left_out(make_tokenizer: Any) -> None:
    targets = {text: OTHER.texts[i % 20] for i, text in enumerate(OWN.texts)}
    tokenizer = make_tokenizer()
    pairs, _ = ParallelText(targets, "pairs").prompted("{source}\n", tokenizer, chat=False)
    both = Other(Documents.of([*OWN.texts, *OTHER.texts], "both.txt"), 1.0)
    fit = make_splits(pairs, tokenizer, 8, 64, 32, 32, 0.3, 0, 128, both).fit
    assert min(numbers(tokenizer, fit)) >= 80


def test_too_little_other_text_says_what_to_do(make_tokenizer: Any) -> None:
    short = Documents.of(OTHER.texts[:2], "short.txt")
    with pytest.raises(DataError, match=r"short.txt: .* 64 tokens .* have 40; lower fit_share"):
        split(make_tokenizer(), 128, Other(short, 0.5))


def test_no_fit_takes_none_of_it(make_tokenizer: Any) -> None:
    assert len(split(make_tokenizer(), 0, Other(OTHER, 0.5)).fit) == 0
