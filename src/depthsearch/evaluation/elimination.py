"""Who can be eliminated from a race with a stated error rate.

A race judges masks on the same text, sequence by sequence in random order, and looks at the losses
after each batch. The text is finite: a mask's loss is its mean over all N sequences, so that n of
them tell it up to sqrt(1/n - 1/N) standard deviations, and all of them exactly. Losses are paired:
what all masks find hard cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from depthsearch.evaluation.student import critical_value

MIN_SEQUENCES = 4
_SPARE = 16


class Elimination:
    """The claims of one race, "this candidate is worse than that mask", and who falls by them.

    A candidate is eliminated once it is claimed to be worse than `survivors` masks. A claim is a
    paired t test with the correction for a finite population; the probability that a candidate
    among the `survivors` best falls by false ones, at any look, is at most `error_rate` as far as
    the test holds: where means of n and of N - n differences are near to normal.

    How the error rate is shared out: the mask at place j of M, of j - 1 better ones, falls only by
    `survivors - j + 1` false claims or more, out of M - j possible ones; by Markov's inequality
    that happens with at most (M - j) / (survivors - j + 1) times the probability of one. The sum
    over the places that candidates may hold is what it is divided by (Bonferroni). Whom a candidate
    is compared with is therefore free at every look. A look after n sequences gets a share of the
    error rate in proportion to 1/n: early looks save most.
    """

    def __init__(
        self,
        candidates: int,
        rivals: Sequence[Sequence[float]],
        survivors: int,
        looks: Sequence[int],
        total: int,
        error_rate: float,
    ) -> None:
        """Race `candidates` against each other and `rivals`, whose losses are known on all text.

        `looks` are the numbers of sequences, of `total`, after which `losers` may be asked.
        """
        self._rivals = np.array(rivals, dtype=float).reshape(len(rivals), total)
        self._survivors = survivors
        self._total = total
        self._worse: dict[int, set[int]] = {}
        self._levels: dict[int, float] = {}
        # With one sequence left there is no degree of freedom.
        used = [n for n in looks if n >= MIN_SEQUENCES and total - n > 1]
        masks = candidates + len(rivals)
        if candidates and used and masks > survivors:
            level = error_rate / claims(masks, candidates, survivors) / sum(1 / n for n in used)
            self._levels = {n: level / n for n in used}

    def forget(self, candidate: int) -> None:
        """A candidate failed: nobody falls for being worse than it any more.

        Who has fallen by then stays out, so that the error rate is that of masks that do not fail.
        """
        for known in self._worse.values():
            known.discard(candidate)

    def losers(self, losses: Mapping[int, Sequence[float]]) -> list[int]:
        """The candidates to eliminate of those still in the race, by number: their losses so far.

        All have been judged on the same first sequences.
        """
        n = len(next(iter(losses.values()), ()))
        if n not in self._levels:
            return []
        pool = np.concatenate([np.array(list(losses.values())), self._rivals[:, :n]])
        names = [*losses, *(-1 - rival for rival in range(len(self._rivals)))]
        means = pool.mean(axis=1)
        best = np.argsort(means, kind="stable")[: self._survivors + _SPARE]
        # The mean of what is left must be near to normal as well as that of what was seen.
        freedom = min(n, self._total - n) - 1
        bar = critical_value(self._levels[n], freedom) * np.sqrt(1 / n - 1 / self._total)
        out = []
        for place, candidate in enumerate(losses):
            differences = pool[place] - pool[best]
            worse = differences.mean(axis=1) > bar * differences.std(axis=1, ddof=1)
            known = self._worse.setdefault(candidate, set())
            known.update(names[i] for i in best[worse])
            if len(known) >= self._survivors:
                out.append(candidate)
        return out


def claims(masks: int, candidates: int, survivors: int) -> float:
    """What the level of one claim is multiplied by at most, over all candidates to be kept."""
    places = range(1, min(survivors, candidates) + 1)
    return sum((masks - survivors - 1 + spare) / spare for spare in places)
