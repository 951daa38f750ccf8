from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from depthsearch.report import calibration
from depthsearch.run.stability import Sample, stability

KEYS = ("0011", "0110", "1100")


@pytest.fixture
def found() -> dict[str, Any]:
    """A check of three masks on two samples; the second sample has another winner."""
    rng = np.random.default_rng(0)
    first = np.array([[1.0], [2.0], [3.0]]) + 0.01 * rng.standard_normal((3, 4))
    samples = [
        Sample("sample 1", "draw", 16, first),
        Sample("sample 2", "draw", 16, first[[1, 0, 2]]),
        Sample("a<b>.txt", "other", 16, first),
    ]
    figures = stability(samples, first, [64, 128], folds=2, select_tokens=64, rng=rng)
    sites = [f"decoder.{block}.{kind}" for block in (0, 1) for kind in ("attention", "ffn")]
    return figures | {
        "objective": "kl",
        "sites": sites,
        "masks": [{"mask": key, "origin": f"origin {key}"} for key in KEYS],
        "texts": [{"name": "sample 1", "windows": 4, "window_tokens": 16}],
    }


def test_pictures_say_in_words_what_they_show(found: dict[str, Any]) -> None:
    ranks = calibration.ranks_picture(found)
    assert ranks.source.startswith("data:image/")
    assert "held-out: mask 1; sample 1: mask 1; sample 2: mask 2; a<b>.txt: mask 1" in ranks.alt
    sizes = calibration.sizes_picture(found)
    regret = found["sizes"][0]["regret"]
    assert f"64 tokens: {regret:.4f}; 128 tokens:" in sizes.alt
    assert calibration.gaps_picture(found).source.startswith("data:image/")


def test_many_masks_and_texts_and_negative_losses_are_drawn_too() -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((40, 6))
    samples = [Sample(f"sample {n}", "draw", 16, table + n) for n in range(20)]
    found = stability(samples, table, [96], folds=2, select_tokens=96, rng=rng)
    found["objective"] = "cross_entropy"
    assert calibration.ranks_picture(found).source.startswith("data:image/")
    assert calibration.gaps_picture(found).source.startswith("data:image/")


def test_tables_hold_the_figures(found: dict[str, Any]) -> None:
    samples = calibration.samples_table(found)
    assert [row[0] for row in samples.rows][:2] == ["sample 1", "sample 2"]
    second = dict(zip(samples.columns, samples.rows[1], strict=True))
    assert second["Winner"] == "2"
    # Mask 2 loses about 1 more than mask 1 on held-out text.
    regret = found["samples"][1]["regret"]["mean"]
    assert regret == pytest.approx(1, abs=0.05)
    assert second["Regret"].startswith(f"{regret:.4f} [")
    assert second["Kendall's tau with held-out"].startswith("0.33 [")
    masks = calibration.masks_table(found)
    assert [row[0] for row in masks.rows] == ["1", "2", "3"]
    assert masks.rows[0][1:3] == ("origin 0011", "block 0")
    assert masks.rows[1][2] == "attention 0; FFN 1"
    sizes = calibration.sizes_table(found)
    assert [row[0] for row in sizes.rows] == ["64", "128"]
    assert calibration.texts_table(found).rows == (("sample 1", "4", "16"),)
    assert calibration.interval(None, 2) == "–"
