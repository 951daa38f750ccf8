"""Which finalist a search returns, from losses on fresh data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from depthsearch.errors import NothingFoundError
from depthsearch.evaluation.student import critical_value
from depthsearch.space import Evaluation, Mask, Status

_CHANCE = 1 / 6
"""How often, at most, one of several masks that are no better replaces a baseline."""


def choose(finals: Sequence[Evaluation], baselines: Sequence[Mask]) -> Evaluation:
    """The finalist to return, from evaluations on data that no mask was selected on.

    The best one, but the best baseline where the lead of the best one could be noise: a baseline
    that is as good as all others is replaced in one case of six at the most (`_CHANCE`), however
    many others there are (Student's t of the paired difference, Bonferroni). With a single sequence
    the noise is not known and the baseline stays.
    """
    ranked = sorted(finals, key=lambda evaluation: evaluation.order)
    best = ranked[0]
    if best.status is not Status.OK:
        raise NothingFoundError(
            f"all {len(finals)} finalists failed on fresh data ({best.status}): the losses are not "
            "finite or memory ran out"
        )
    safe = next((e for e in ranked if e.mask in baselines and e.status is Status.OK), None)
    if safe is None or safe.mask == best.mask:
        return best
    differences = [a - b for a, b in zip(best.losses, safe.losses, strict=True)]
    if len(differences) < 2:
        return safe
    mean = fmean(differences)
    spread = math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    others = sum(evaluation.mask not in baselines for evaluation in finals)
    bar = critical_value(_CHANCE / others, len(differences) - 1)
    return best if mean < -bar * math.sqrt(spread / len(differences)) else safe
