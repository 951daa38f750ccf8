"""In-process backends over tiny models, and sets of masks to evaluate on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tests.tiny_models import tiny_ids, tiny_model

from depthsearch.calibration.objectives import KLDivergence, Objective
from depthsearch.evaluation import InProcess
from depthsearch.model.anatomy import describe
from depthsearch.model.replay import Mode
from depthsearch.model.selfcheck import self_check
from depthsearch.space import Mask


def tiny_backend(
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    model: Any = None,
    mode: Mode | None = None,
    objective: Objective | None = None,
    rows: int = 5,
    tokens: int = 12,
    batch_tokens: int = 24,
    positions: float = 0.5,
    seed: int = 0,
    blocks: int = 4,
    fit: torch.Tensor | None = None,
) -> InProcess:
    """A backend over batches of two sequences (the last of one), in the mode the check finds."""
    model = tiny_model(model_type, blocks, dtype) if model is None else model
    anatomy = describe(model)
    return InProcess(
        model,
        anatomy,
        tiny_ids(rows, tokens, seed=seed + 100),
        objective or KLDivergence(),
        mode=self_check(model, anatomy).mode if mode is None else mode,
        batch_tokens=batch_tokens,
        positions=positions,
        seed=seed,
        fit=fit,
    )


def assorted_masks(sites: int, seed: int = 0, count: int = 12) -> list[Mask]:
    """The dense mask, dropped blocks, all but one site dropped, and distinct random masks."""
    rng = np.random.default_rng(seed)
    masks = [
        Mask.dense(sites),
        Mask.dropping(sites, range(2, 4)),
        Mask.dropping(sites, range(2, sites - 2)),
        Mask.dropping(sites, range(1, sites)),
        Mask.dropping(sites, range(sites - 1)),
        Mask.dropping(sites, (0, 1, sites - 2, sites - 1)),
        Mask.dropping(sites, range(sites)),
    ]
    while len(dict.fromkeys(masks)) < count:
        masks.append(Mask(tuple(bool(kept) for kept in rng.random(sites) < rng.uniform(0.3, 0.9))))
    found = list(dict.fromkeys(masks))
    return [found[place] for place in rng.permutation(len(found))]
