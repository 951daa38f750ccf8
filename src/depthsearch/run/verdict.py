"""The outcome of a comparison in words, with "search did not help here" among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ONE_PASS = (
    "fixed",
    "windows",
    "angular_window",
    "block_influence",
    "similarity",
    "sensitivity",
    "single_removal",
    "additive",
)
"""Methods that rank, slide or add up instead of searching."""

SLIGHT = 0.05
"""The share of the lowest held-out KL below which a possible gain is not worth a search."""

ONE_SEED = "With one seed the intervals hold the noise of the held-out text alone."
"""What is said of intervals that no second seed widens."""

HALF = 0.5
"""A lead that is sure to keep less than this share on held-out text was mostly luck or overfit."""

LOOSE = 0.5
"""A rank correlation that is sure to be below this says little about one mask and another."""

FEW_DOCUMENTS = 16
"""Below this, held-out windows that share a document make intervals much too narrow."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Whether search paid at one budget.

    `kind` is "pays" where the best search is better than the best one-pass arm, "enough" where the
    interval rules out a gain over that one that matters (`SLIGHT`), "open" where it does not, and
    "no rival" where searches or one-pass arms are missing, or where no one-pass arm is repaired at
    its end as the best search is: what a repair gains is no gain of the search. Which ones are best
    is by their means, so "better" and "rules out" are meant among all pairs of a search and a
    one-pass arm. `difference` is that of the best one-pass arm minus the best search in nats, with
    its interval where it is known: that of the pair alone where search pays, else that of all such
    pairs together. `alone` is whether a gain is shown where that pair is looked at alone.
    `baselines` are the answers of the search, in words, that it did not find but started from.
    """

    kind: str
    search: str | None = None
    simple: str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    baselines: tuple[str, ...] = ()
    seeds: int = 0
    alone: bool = False

    @property
    def borrowed(self) -> bool:
        """Whether every answer of the search is a mask that needed none."""
        return 0 < self.seeds == len(self.baselines)


def outcome(summary: Rows, pairs: Rows) -> Outcome:
    """What the best search gains over the best one-pass arm."""
    ranked = sorted(summary, key=lambda row: float(row["heldout_kl_mean"]))
    simple = [row for row in ranked if row["method"] in ONE_PASS]
    searches = [row for row in ranked if row["method"] not in ONE_PASS]
    if not simple or not searches:
        return Outcome("no rival")
    search = str(searches[0]["arm"])
    alike = [row for row in simple if row.get("finish") == searches[0].get("finish")]
    if not alike:
        return Outcome("no rival", search)
    best = str(alike[0]["arm"])
    gain = _gain(best, search, pairs)
    if _worse(best, search, pairs, among=len(simple) * len(searches)):
        baselines = tuple(searches[0].get("baselines", ()))
        seeds = int(searches[0].get("seeds", 0))
        return Outcome("pays", search, best, *gain, baselines=baselines, seeds=seeds)
    alone = gain[1] is not None and gain[1] > 0
    gain = _gain(best, search, pairs, "picked_")
    wide = gain[2] is not None and gain[2] > SLIGHT * float(ranked[0]["heldout_kl_mean"])
    return Outcome("open" if wide else "enough", search, best, *gain, alone=alone)


def verdict(summary: Rows, pairs: Rows, warnings: Sequence[str] = ()) -> str:
    """Which arm is lowest, what it beats, whether search paid and by how much, and warnings."""
    ranked = sorted(summary, key=lambda row: float(row["heldout_kl_mean"]))
    best = ranked[0]
    leaders = _sharing(ranked, "heldout_kl_mean")
    several = len(leaders) > 1
    said = [
        f"{_listed(leaders)} {'share' if several else 'has'} the lowest held-out KL, "
        f"{best['heldout_kl_mean']:.4f} "
        f"[{best['heldout_kl_low']:.4f}, {best['heldout_kl_high']:.4f}]."
    ]
    if len(ranked) > 1:
        others = [str(row["arm"]) for row in ranked if row["arm"] not in leaders]
        behind = [arm for arm in others if all(_worse(arm, lead, pairs) for lead in leaders)]
        # Who leads was picked by the figures, so it must be shown among all pairs of arms.
        beaten = [
            arm
            for arm in behind
            if all(_worse(arm, lead, pairs, among=len(pairs)) for lead in leaders)
        ]
        alone = [arm for arm in behind if arm not in beaten]
        tied = [arm for arm in others if arm not in behind]
        if beaten:
            sure = "95 % interval excludes zero"
            if len(pairs) > 1:
                sure = f"at 95 % for all {len(pairs)} pairs of arms together"
            said.append(
                f"{'They are' if several else 'It is'} better than {_listed(beaten)} ({sure})."
            )
        if alone:
            said.append(
                f"The lead on {_listed(alone)} is shown at 95 % only where that pair is looked at "
                "alone."
            )
        if tied:
            said.append(f"No difference to {_listed(tied)} is shown.")
        means = {str(row["arm"]): float(row["heldout_kl_mean"]) for row in ranked}
        said += _helped(outcome(summary, pairs), means)
    return " ".join([*said, *warnings])


def _helped(found: Outcome, means: Mapping[str, float]) -> list[str]:
    """Whether search helped, by how much, and what is enough instead; `means` are those of arms."""
    if found.kind == "no rival":
        if found.search is None:
            return []
        return [
            "Whether search helped is not said: no method without a search is repaired as "
            f"{found.search} is, and what a repair gains is no gain of the search."
        ]
    gain = None
    if found.difference is not None and found.low is not None and found.high is not None:
        gain = f"{found.difference:.4f} nats [{found.low:.4f}, {found.high:.4f}]"
    if found.kind == "pays":
        if gain is None or found.difference is None:
            return []
        names = _listed(list(dict.fromkeys(found.baselines))) if found.baselines else ""
        if found.borrowed:
            return [
                f"{found.search} is {gain} below {found.simple}, but its every answer is a mask "
                f"that needs no search ({names}). Search did not help over one-pass methods here."
            ]
        part = 100 * found.difference / means[str(found.simple)]
        some = [
            f"With {len(found.baselines)} of {found.seeds} seeds its answer needed no search "
            f"({names})."
        ]
        return [
            f"Search helped: {found.search} is {gain} or {part:.0f} % below {found.simple}, the "
            "best method without a search.",
            *(some if names else ()),
        ]
    if found.kind == "open":
        assert found.high is not None
        return [
            f"Whether search helps over {found.simple}, a method without a search, is not decided: "
            f"the interval leaves room for a gain of {found.high:.4f} nats "
            f"({100 * found.high / min(means.values()):.0f} %); more seeds or held-out text would "
            "tell."
        ]
    said = []
    if found.high is not None:
        room = f"{found.search} is worse"
        if found.high > 0:
            room = f"a gain of more than {found.high:.4f} nats by {found.search} is ruled out"
        elif found.low == found.high == 0:
            room = f"{found.search} came to the same"
        said.append(f"{found.simple} is enough here: {room}.")
    if found.alone:
        return [*said, "What search gained over one-pass methods here is slight."]
    return [*said, "Search did not help over one-pass methods here."]


def overall(sections: Rows, ranks: Rows) -> str:
    """At which budgets search pays, at which a one-pass method is enough, and who ranks first."""
    groups: dict[str, list[str]] = {}
    for section in sections:
        found = outcome(section["summary"], section["pairs"])
        text, kind = str(section["budget_text"]), found.kind
        if found.borrowed:
            kind = "enough"
            text += f" ({', '.join(dict.fromkeys(found.baselines))}: what {found.search} came to)"
        elif found.kind == "pays" and found.difference is not None:
            text += f" ({found.search}, {found.difference:.4f} nats below {found.simple})"
        elif found.kind in ("enough", "open"):
            text += f" ({found.simple})"
        elif kind == "no rival" and found.search is not None:
            kind = "unlike"
        groups.setdefault(kind, []).append(text)
    words = {
        "pays": "Search pays at",
        "enough": "A method without a search is enough at",
        "open": "The intervals can't tell whether search helps over a method without one at",
        "unlike": "No method without a search is repaired as the best search is at",
        "no rival": "No search and one-pass method are there to compare at",
    }
    said = [f"{words[kind]} {'; '.join(groups[kind])}." for kind in words if kind in groups]
    if len(ranks) > 1:
        said.append(_first(ranks))
        ranked = {row["arm"] for row in ranks}
        arms = dict.fromkeys(str(row["arm"]) for part in sections for row in part["summary"])
        missing = [arm for arm in arms if arm not in ranked]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            said.append(f"{_listed(missing)} {verb} not ranked: with results at some budgets only.")
    return " ".join(said)


def _first(ranks: Rows) -> str:
    """Which arm has the best mean rank, or which share it."""
    first, names = ranks[0], _sharing(ranks, "rank_mean")
    rank = f"the best mean rank over budgets and seeds, {first['rank_mean']:.2f}"
    if len(names) > 1:
        return f"{_listed(names)} share {rank} of {len(ranks)}."
    return (
        f"{names[0]} has {rank} [{first['rank_low']:.2f}, {first['rank_high']:.2f}] of "
        f"{len(ranks)}, and is first in {100 * first['first_share']:.0f} % of resamples."
    )


def _sharing(rows: Rows, key: str) -> list[str]:
    """The arms with the figure of the first row, but for rounding."""
    lowest = float(rows[0][key])
    return [str(row["arm"]) for row in rows if math.isclose(row[key], lowest, rel_tol=1e-12)]


def few_documents(count: int) -> str:
    """What is said of held-out text of so few documents."""
    text = "one document" if count == 1 else f"{count} documents"
    return (
        f"All held-out text is of {text}, whose windows are alike, so intervals are too narrow: "
        "raise calibration.heldout_tokens, or give text of more, shorter documents."
    )


def warnings_of(
    groups: Sequence[Rows], pairs: Rows, courses: Rows, correlation: Mapping[str, Any] | None
) -> list[str]:
    """Where figures look too good: leads that shrink, curves that turn, losses that don't carry.

    `groups` holds the rows of arms whose search losses can be compared with each other and with
    their held-out losses. A lead is what an arm is ahead of the best one-pass arm on search data.
    """
    said = [text for rows in groups for text in _shrunk(rows, pairs)]
    for course in courses:
        turned = course["worsened"]
        if turned is not None:
            said.append(
                f"What {course['arm']} had found after {turned['cost_tokens']:,.0f} tokens was "
                f"better on held-out text, by {turned['difference']:.4f} nats, than the mask with "
                "its lowest search loss: searching on made it worse."
            )
    if correlation is not None and correlation["low"] <= 0:
        said.append(_loosely(correlation))
    return said


def _loosely(correlation: Mapping[str, Any]) -> str:
    """What a rank correlation says that may be zero."""
    figures = (
        f"their rank correlation is {correlation['spearman']:.2f} [{correlation['low']:.2f}, "
        f"{correlation['high']:.2f}] over {correlation['masks']} masks."
    )
    if correlation["high"] < LOOSE:
        return (
            "Which mask has the lower search loss says little about which has the lower held-out "
            f"loss: {figures} Try a larger calibration.select_tokens."
        )
    return (
        "Whether masks with a lower search loss have a lower held-out loss can't be told from the "
        f"few that were measured: {figures}"
    )


def _shrunk(rows: Rows, pairs: Rows) -> Iterator[str]:
    simple = [row for row in rows if row["method"] in ONE_PASS]
    best = min(simple, key=lambda row: float(row["heldout_kl_mean"]), default=None)
    for row in rows:
        if best is None or row["method"] in ONE_PASS or row["gap_mean"] is None:
            continue
        lead = float(best["select_loss_mean"]) - float(row["select_loss_mean"])
        kept, _, high = _gain(str(best["arm"]), str(row["arm"]), pairs)
        if lead > 0 and kept is not None and high is not None and high < HALF * lead:
            yield (
                f"{row['arm']} overfits its search text: its lead of {lead:.4f} nats on "
                f"{best['arm']} there is {kept:.4f} on held-out text."
            )


def _gain(
    over: str, by: str, pairs: Rows, kind: str = ""
) -> tuple[float | None, float | None, float | None]:
    """The loss of `over` minus that of `by` with its interval; None where it is not known.

    The interval is that of the pair alone, or with `kind` "picked_" that of all among which the
    pair was picked, where there is one.
    """
    for pair in pairs:
        if "difference" not in pair:
            continue
        ends = [pair.get(kind + end, pair[end]) for end in ("low", "high")]
        middle, low, high = (float(value) for value in (pair["difference"], *ends))
        if (pair["a"], pair["b"]) == (over, by):
            return middle, low, high
        if (pair["a"], pair["b"]) == (by, over):
            return -middle, -high, -low
    return None, None, None


def _worse(arm: str, than: str, pairs: Rows, among: int = 1) -> bool:
    """Whether an arm is shown to be worse than another, among so many comparisons."""
    return any(
        {pair["a"], pair["b"]} == {arm, than}
        and pair["verdict"] == f"{than} is better"
        and pair["among"] >= among
        for pair in pairs
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
