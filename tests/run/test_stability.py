from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from depthsearch.run.stability import Sample, stability
from depthsearch.run.stability_words import verdict, warnings

WINDOW = 16


def losses(rng: np.random.Generator, means: list[float], windows: int, noise: float) -> np.ndarray:
    """Losses `[masks, windows]` of masks with known means; noise is not shared between masks."""
    return np.array(means)[:, None] + noise * rng.standard_normal((len(means), windows))


def check(
    noise: float,
    means: list[float],
    other: list[float] | None = None,
    length: list[float] | None = None,
    sizes: tuple[int, ...] = (64, 256, 1024),
) -> dict[str, Any]:
    """A check of four samples of 16 windows, and of as much text of other kinds."""
    rng = np.random.default_rng(5)
    samples = [
        Sample(f"sample {n}", "draw", WINDOW, losses(rng, means, 16, noise)) for n in range(1, 5)
    ]
    if length is not None:
        samples.append(Sample("windows of 32", "length", 32, losses(rng, length, 8, noise)))
    if other is not None:
        samples.append(Sample("songs.txt", "other", WINDOW, losses(rng, other, 16, noise)))
    return stability(
        samples,
        losses(rng, means, 256, noise),
        sizes,
        folds=4,
        select_tokens=256,
        rng=np.random.default_rng(0),
    )


CLEAR = [1.0, 1.5, 2.0, 2.5]


def test_a_clear_order_is_stable_and_nothing_is_warned_of() -> None:
    found = check(0.1, CLEAR, other=CLEAR, length=CLEAR)
    assert warnings(found) == []
    assert [row["winner"] for row in found["samples"]] == [0] * 10
    assert all(row["regret"]["mean"] == 0 for row in found["samples"])
    assert all(row["kendall"]["mean"] == 1 for row in found["samples"])
    assert found["agreement"]["draw"] == {"kendall": 1, "spearman": pytest.approx(1)}
    assert (found["recommended_tokens"], found["settled_tokens"]) == (64, 64)
    assert found["possible_tokens"] == 64
    assert all(row["above_lowest"]["mean"] == 0 for row in found["sizes"])
    said = verdict(found)
    assert "The winner is stable: all 4 samples of 256 tokens name mask 1" in said
    assert "calibration.select_tokens: 64 is enough" in said


def test_noise_as_large_as_the_differences_is_warned_of_with_what_it_costs() -> None:
    """Differences of 0.5 under noise of 2.8 a difference: 16 windows can't tell, 256 mostly can."""
    found = check(2.0, CLEAR, sizes=(64, 256, 1024))
    winners = {row["winner"] for row in found["samples"] if row["kind"] == "draw"}
    assert len(winners) > 1
    first, *_ = warnings(found)
    assert first.startswith("The winner changes with the sample of text: 4 samples of 256 tokens")
    assert "Trusting one sample costs" in first
    assert "The winner depends on the sample" in verdict(found)
    shares = [row["favourite_share"] for row in found["sizes"]]
    assert shares == sorted(shares)
    regrets = [row["regret"] for row in found["sizes"]]
    assert regrets == sorted(regrets, reverse=True)
    assert found["recommended_tokens"] > 64


def test_equal_masks_change_places_and_it_is_said_that_this_hardly_matters() -> None:
    found = check(0.5, [1.0, 1.0, 1.0, 3.0])
    assert len({row["winner"] for row in found["samples"] if row["kind"] == "draw"}) > 1
    said = " ".join(warnings(found))
    assert "so the choice hardly matters" in said
    assert "Held-out text itself is not sure of the best mask" in said


def test_no_regret_and_no_difference_is_shown_where_all_masks_are_equal() -> None:
    regrets = differences = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        samples = [
            Sample(name, kind, WINDOW, losses(rng, [1.0] * 24, 16, 0.3))
            for name, kind in (("sample 1", "draw"), ("songs.txt", "other"))
        ]
        found = stability(
            samples,
            losses(rng, [1.0] * 24, 64, 0.3),
            (256,),
            folds=0,
            select_tokens=256,
            rng=np.random.default_rng(0),
        )
        draw, other = found["samples"]
        regrets += draw["regret"]["low"] > 0
        differences += other["first_winner_excess"]["low"] > 0
    assert regrets <= 4
    assert differences <= 4


def test_another_kind_of_text_or_length_with_another_winner_is_named_with_the_difference() -> None:
    found = check(0.1, CLEAR, other=CLEAR[::-1], length=CLEAR)
    (only,) = warnings(found)
    assert "on text of another kind (songs.txt): mask 4 instead of mask 1" in only
    row = found["samples"][-1]
    assert row["kendall"]["mean"] == -1
    # On that text the winner of sample 1 loses 1.5 more than the text's own.
    assert row["first_winner_excess"]["mean"] == pytest.approx(1.5, abs=0.15)
    assert row["regret"]["mean"] == pytest.approx(1.5, abs=0.05)
    (pair,) = [pair for pair in found["pairs"] if pair["kind"] == "other"]
    assert (pair["a"], pair["b"], pair["kendall"]["mean"]) == ("sample 1", "songs.txt", -1)
    (only,) = warnings(check(0.1, CLEAR, other=CLEAR, length=[1.5, 1.0, 2.0, 2.5]))
    assert "windows of another length (windows of 32): mask 2 instead of mask 1" in only


def test_the_rival_on_another_text_is_measured_where_it_was_not_chosen() -> None:
    """Mask 2 is ahead by 4 on one half of that text, which names it, and behind by 2 on the other.

    So the rival of mask 1 is itself on the first half and mask 2 on the second: -1 in the mean.
    """
    heldout = np.array([[0.0] * 4, [1.0] * 4])
    there = np.array([[0.0] * 4, [-4.0, -4.0, 2.0, 2.0]])
    samples = [Sample("sample 1", "draw", WINDOW, heldout), Sample("songs", "other", WINDOW, there)]
    found = stability(
        samples, heldout, [64], folds=0, select_tokens=64, rng=np.random.default_rng(0)
    )
    draw, other = found["samples"]
    assert other["winner"] == 1
    assert other["first_winner_excess"]["mean"] == pytest.approx(-1)
    assert draw["first_winner_excess"]["mean"] == 0
    assert warnings(found)[0].endswith("no difference that is shown.")


def test_a_fold_leaves_its_part_out_and_one_outlier_is_found() -> None:
    """Mask 1 is worse by 1 everywhere but in one window, which is better by 40."""
    first = np.zeros((2, 8))
    first[1] += 1
    first[1, 5] = -40
    rest = np.array([[0.0] * 8, [1.0] * 8])
    heldout = np.array([[0.0] * 8, [1.0] * 8])
    samples = [
        Sample("sample 1", "draw", WINDOW, first),
        Sample("sample 2", "draw", WINDOW, rest),
    ]
    found = stability(
        samples, heldout, [128], folds=4, select_tokens=128, rng=np.random.default_rng(0)
    )
    folds = [row for row in found["samples"] if row["kind"] == "fold"]
    # Windows 4 and 5 are part 3.
    assert [row["winner"] for row in folds] == [1, 1, 0, 1]
    assert folds[2]["losses"] == [0, 1]
    assert folds[0]["losses"] == [0, pytest.approx((5 - 40) / 6)]
    assert [row["tokens"] for row in folds] == [96] * 4
    draw = found["samples"][0]
    assert draw["winner"] == 1
    assert draw["gap"] == pytest.approx(1 - (7 - 40) / 8)
    assert draw["mean_gap"] == pytest.approx((0 + 1 + 33 / 8) / 2)
    assert draw["regret"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert any(
        "Leaving out one of 4 parts of sample 1 changes its winner in 1 of 4" in text
        for text in warnings(found)
    )


def sized(
    tables: Sequence[np.ndarray], heldout: np.ndarray, sizes: Sequence[int], select_tokens: int
) -> dict[str, Any]:
    """What samples of these losses say of sizes of text."""
    samples = [
        Sample(f"sample {n}", "draw", WINDOW, table) for n, table in enumerate(tables, start=1)
    ]
    rng = np.random.default_rng(0)
    return stability(samples, heldout, sizes, folds=0, select_tokens=select_tokens, rng=rng)


def test_too_little_text_is_told_by_the_size_that_would_do() -> None:
    rng = np.random.default_rng(3)
    tables = [losses(rng, CLEAR, 8, 2.0) for _ in range(16)]
    found = sized(tables, losses(rng, CLEAR, 512, 0.5), (128, 512, 2048), 128)
    assert found["configured"] == 0
    assert found["recommended_tokens"] > 128
    assert any("calibration.select_tokens is 128, less than the" in w for w in warnings(found))
    if found["recommended_is_largest"]:
        assert "Select on 2,048 tokens or more" in verdict(found)


def test_too_little_held_out_text_leaves_the_size_undecided() -> None:
    rng = np.random.default_rng(4)
    tables = [losses(rng, CLEAR, 16, 2.0) for _ in range(4)]
    found = sized(tables, losses(rng, CLEAR, 4, 2.0), (64, 256, 1024), 256)
    assert found["possible_tokens"] < found["recommended_tokens"] == 1024
    assert "How much text is enough is not decided" in verdict(found)
    assert not any("raise it" in text for text in warnings(found))


def test_masks_that_tie_have_no_correlation_and_still_words() -> None:
    table = np.ones((3, 4))
    samples = [Sample(f"sample {n}", "draw", WINDOW, table) for n in (1, 2)]
    found = stability(samples, table, [64], folds=2, select_tokens=64, rng=np.random.default_rng(0))
    assert all(row["kendall"] is None for row in found["samples"])
    assert found["agreement"]["draw"] == {"kendall": None, "spearman": None}
    assert "The winner is stable" in verdict(found)
