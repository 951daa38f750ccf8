"""What measured runs add up to, from figures made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from depthsearch.run.heldout import Figures, Heldout
from depthsearch.run.standing import measured_entry, section

WINDOWS = 24


def entry(name: str, method: str, mask: str, seed: int, score: str, loss: float) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "seed": seed,
        "score": score,
        "run": f"arms/{name}-seed{seed}",
        "mask": mask,
        "origin": "swap",
        "repair": None,
        "search_repair": "none",
        "select_loss": loss,
        "cost_tokens": 100.0,
        "evaluations": 3,
        "seconds": 1.0,
    }


def warned(score: str, select: Mapping[str, float], kl: Mapping[str, float]) -> list[str]:
    """What is warned of where two arms have these search losses and held-out KL."""
    rng = np.random.default_rng(0)
    text = 0.1 * rng.standard_normal(WINDOWS)
    masks = {"win": "0011", "evo": "1001"}
    cut = {
        masks[name]: Figures(tuple(kl[name] + text), tuple(3.0 + select[name] + text))
        for name in masks
    }
    entries = [
        measured_entry(
            entry(name, method, masks[name], seed, score, select[name]), [], Heldout(cut)
        )
        for name, method in (("win", "windows"), ("evo", "evolution"))
        for seed in range(3)
    ]
    warnings: list[str] = section(["win", "evo"], entries, Heldout(cut), anytime=False)["warnings"]
    return warnings


@pytest.mark.parametrize(("score", "warns"), [("kl", True), ("cross_entropy", False)])
def test_only_leads_in_kl_are_held_against_held_out_kl(score: str, warns: bool) -> None:
    """A lead of 0.5 on search data that is 0.1 in held-out KL."""
    said = warned(score, {"win": 1.5, "evo": 1.0}, {"win": 1.1, "evo": 1.0})
    assert any("overfits" in text for text in said) == warns
