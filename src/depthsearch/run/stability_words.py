"""What a calibration check says in words: warnings where the text decides, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from depthsearch.run.rank_statistics import SETTLED

Found = Mapping[str, Any]


def label(mask: int) -> str:
    """The name of a mask, whose number is its place on held-out text."""
    return f"mask {mask + 1}"


def warnings(found: Found) -> list[str]:
    """One sentence or two for each choice of text that another choice would contradict."""
    return [
        *_draws(found),
        *_folds(found),
        *_others(found, "length", "windows of another length"),
        *_others(found, "other", "text of another kind"),
        *_size(found),
    ]


def verdict(found: Found) -> str:
    """Stable or not, how well samples and held-out text agree, the gap, and what to set."""
    draws = _of(found, "draw")
    winners = {row["winner"] for row in draws}
    size, configured = draws[0]["tokens"], _configured(found)
    share = None if configured is None else configured["shares"][draws[0]["winner"]]
    if len(winners) > 1:
        said = f"The winner depends on the sample: {_winners_text(draws)}."
    elif share is not None and share < SETTLED:
        said = (
            f"The winner is not settled: all {len(draws)} samples name {label(*winners)}, but of "
            f"resampled texts of {size:,} tokens only {_percent(share)} do."
        )
    else:
        said = f"The winner is stable: all {len(draws)} samples of {size:,} tokens name " + (
            f"{label(*winners)}."
        )
    taus = [row["kendall"]["mean"] for row in draws if row["kendall"] is not None]
    between = found["agreement"].get("draw", {}).get("kendall")
    if taus and between is not None:
        said += (
            f" Kendall's tau is {between:.2f} between samples and {min(taus):.2f} to "
            f"{max(taus):.2f} with held-out text."
        )
    gaps = [row["gap"] for row in draws]
    said += (
        f" From its sample to held-out text the loss of a winner changes by {_mean(gaps):+.4f} "
        f"nats on average, that of all masks by {_mean([row['mean_gap'] for row in draws]):+.4f}."
    )
    return f"{said} {recommendation(found)}"


def recommendation(found: Found) -> str:
    """The size of text to select on and what is known of it, or that this is not decided."""
    tokens, possible, sizes = found["recommended_tokens"], found["possible_tokens"], found["sizes"]
    if len(sizes) == 1:
        return f"How much text is enough can't be told from one size, of {tokens:,} tokens."
    if not found["recommended_is_largest"]:
        said = (
            f"calibration.select_tokens: {tokens} is enough for these masks: from there on a "
            f"winner is expected to lose {_most(sizes, tokens):.4f} nats of held-out loss at most "
            "to one of the best size (95 %)."
        )
        return said + (
            f" Whether {possible:,} tokens would do is not decided." if possible < tokens else ""
        )
    if possible < tokens:
        return (
            f"How much text is enough is not decided: from {possible:,} tokens on no size is shown "
            f"to be worse than the best, but one may lose {_most(sizes, possible):.4f} nats of "
            f"held-out loss to it. Select on {tokens:,} tokens, or raise "
            "calibration.heldout_tokens to tell."
        )
    return (
        f"Select on {tokens:,} tokens or more: winners on {sizes[-2]['tokens']:,} are still shown "
        f"to be worse, by {_nats(sizes[-2]['above_lowest'])} of held-out loss."
    )


def _most(sizes: Sequence[Found], tokens: int) -> float:
    """What winners on texts of so many `tokens` or more may lose to those of the best size."""
    return max(float(row["above_lowest"]["high"]) for row in sizes if row["tokens"] >= tokens)


def _draws(found: Found) -> Iterator[str]:
    draws = _of(found, "draw")
    first = draws[0]
    if len({row["winner"] for row in draws}) > 1:
        yield (
            f"The winner changes with the sample of text: {_winners_text(draws)}. {_harm(draws)}"
        )
    elif first["regret"]["low"] > 0:
        yield (
            f"All {len(draws)} samples name {label(first['winner'])}, which "
            f"{_behind(first['regret'], 'held-out text')}."
        )


def _harm(rows: Sequence[Found]) -> str:
    """What trusting one of some samples costs on held-out text."""
    worst = max(rows, key=lambda row: float(row["regret"]["mean"]))
    regret = worst["regret"]
    text = _nats(regret)
    mean = _mean([row["regret"]["mean"] for row in rows])
    if regret["low"] > 0:
        return (
            f"Trusting one sample costs {mean:.4f} nats of held-out loss on average, {text} at "
            f"worst ({worst['name']})."
        )
    return (
        "On held-out text no difference between these winners and the best mask is shown (at most "
        f"{text}), so the choice hardly matters."
    )


def _folds(found: Found) -> Iterator[str]:
    folds, first = _of(found, "fold"), _of(found, "draw")[0]
    changed = [row for row in folds if row["winner"] != first["winner"]]
    if changed:
        yield (
            f"Leaving out one of {len(folds)} parts of {first['name']} changes its winner in "
            f"{len(changed)} of {len(folds)} cases."
        )


def _others(found: Found, kind: str, what: str) -> Iterator[str]:
    """Texts of a kind that name another winner than the first draw."""
    first = _of(found, "draw")[0]
    for row in _of(found, kind):
        if row["winner"] == first["winner"]:
            continue
        excess = row["first_winner_excess"]
        said = (
            f"The winner changes on {what} ({row['name']}): {label(row['winner'])} instead of "
            f"{label(first['winner'])}, which {_behind(excess, 'that text')}"
        )
        yield said + ("." if excess["low"] > 0 else ", no difference that is shown.")


def _size(found: Found) -> Iterator[str]:
    row, tokens = _configured(found), found["select_tokens"]
    if row is not None and row["favourite_share"] < SETTLED:
        yield (
            f"Of resampled texts of {tokens:,} tokens, {_percent(row['favourite_share'])} name the "
            f"most frequent winner ({label(row['favourite'])}) and {_percent(row['best_share'])} "
            f"the best mask on held-out text. Trusting one costs {row['regret']:.4f} ± "
            f"{row['regret_stderr']:.4f} nats of held-out loss on average."
        )
    if tokens < found["possible_tokens"]:
        yield (
            f"calibration.select_tokens is {tokens}, less than the {found['recommended_tokens']} "
            "that would do: raise it."
        )
    wins = found["heldout"]["wins"][found["best"]]
    if wins < SETTLED:
        yield (
            f"Held-out text itself is not sure of the best mask: {_percent(wins)} of resampled "
            "held-out texts name it. Raise calibration.heldout_tokens for sharper figures."
        )


def _configured(found: Found) -> Found | None:
    """The row of the size that the run file asks for, where it is among those tried."""
    place = found["configured"]
    return None if place is None else found["sizes"][place]


def _of(found: Found, kind: str) -> list[Found]:
    return [row for row in found["samples"] if row["kind"] == kind]


def _winners_text(rows: Sequence[Found]) -> str:
    """Such as "4 samples of 8,192 tokens name 2 winners (mask 1 three times, mask 4 once)"."""
    counts: dict[int, int] = {}
    for row in rows:
        counts[row["winner"]] = counts.get(row["winner"], 0) + 1
    each = ", ".join(
        f"{label(mask)} {'once' if count == 1 else f'{count} times'}"
        for mask, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return (
        f"{len(rows)} samples of {rows[0]['tokens']:,} tokens name {len(counts)} winners ({each})"
    )


def _behind(regret: Mapping[str, float], text: str) -> str:
    """How far a mask is behind its rival, which is told on the other half of a text."""
    return f"on one half of {text} is behind the best mask of the other half by {_nats(regret)}"


def _nats(value: Mapping[str, float]) -> str:
    """A loss with the ends of its interval."""
    return f"{value['mean']:.4f} nats [{value['low']:.4f}, {value['high']:.4f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
