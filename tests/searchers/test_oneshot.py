"""Methods that rank once and cut: similarity of sublayers, and the one window by angle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from landscapes import SPACES, Landscape, drive, proposals, toy

from depthsearch.errors import InputError
from depthsearch.searchers import SEARCHERS, build_searcher, needs_sensitivity
from depthsearch.searchers.baselines import window_baselines
from depthsearch.space import (
    Budget,
    Evaluation,
    Hints,
    Mask,
    Proposal,
    SearchSpace,
    Sensitivity,
    Status,
)


def only(method: str, space: SearchSpace, hints: Hints, **options: object) -> Proposal:
    """The one proposal of a method that measures nothing."""
    searcher = build_searcher(method, space, hints, np.random.default_rng(0), options)
    landscape = Landscape(len(space.sites))
    (proposal,) = proposals(drive(searcher, lambda p: landscape.evaluate(p.mask)))
    return proposal


def hints_of(similarity: list[float]) -> Hints:
    """Similarities of each site's input and output; all other entries are far apart."""
    n = len(similarity) + 1
    rows = [[1.0 if i == j else -0.9 for j in range(n)] for i in range(n)]
    for i, value in enumerate(similarity):
        rows[i][i + 1] = rows[i + 1][i] = value
    cosine = tuple(tuple(row) for row in rows)
    return Hints(cosine, cosine)


SIMILAR = hints_of([0.5, 0.1, 0.7, 0.97, 0.9, 0.99, 0.8, 0.95])


@pytest.mark.parametrize(
    ("target", "drop", "dropped"),
    [
        ("joint", 3, (3, 5, 7)),
        ("joint", 5, (3, 4, 5, 6, 7)),
        ("attention", 3, (2, 4, 6)),
        ("attention", 5, (0, 2, 4, 5, 6)),
        ("ffn", 3, (3, 5, 7)),
        ("ffn", 5, (1, 3, 4, 5, 7)),
    ],
)
def test_the_most_similar_sublayers_go(target: str, drop: int, dropped: tuple[int, ...]) -> None:
    space = toy(4, Budget("sites", drop=drop))
    proposal = only("similarity", space, SIMILAR, target=target)
    assert proposal.mask == Mask.dropping(8, dropped)


def test_what_is_put_back_is_of_the_other_kind_first() -> None:
    # All attentions free 4 and the FFN of block 2 frees 3: of the 6 needed, one is too many.
    space = toy(4, Budget("params", ratio=10 / 16, of="blocks"))
    proposal = only("similarity", space, SIMILAR, target="attention")
    assert proposal.mask == Mask.dropping(8, (2, 4, 5, 6))


@pytest.mark.parametrize("name", SPACES)
def test_joint_similarity_is_block_influence_of_sites(name: str) -> None:
    space = SPACES[name]
    hints = Landscape(len(space.sites), 3).hints()
    mask = only("similarity", space, hints).mask
    assert mask == only("block_influence", space, hints, level="site").mask


@pytest.mark.parametrize("name", ["packable", "packable_protected", "block", "drop_blocks"])
def test_the_target_changes_nothing_where_kinds_go_together(name: str) -> None:
    space = SPACES[name]
    hints = Landscape(len(space.sites), 3).hints()
    masks = {
        only("similarity", space, hints, target=target).mask
        for target in ("joint", "attention", "ffn")
    }
    assert len(masks) == 1


def test_the_origin_names_what_went_first() -> None:
    space = SPACES["sublayer"]
    hints = Landscape(12).hints()
    found = [
        only("similarity", space, hints, target=target).origin
        for target in ("joint", "attention", "ffn")
    ]
    assert found == [
        "similarity of attention and FFN",
        "similarity of attention, then FFN",
        "similarity of FFN, then attention",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_window_has_the_smallest_angle_of_all(seed: int) -> None:
    space = toy(8, Budget("blocks", drop=3), "block")
    rng = np.random.default_rng(seed)
    angular = rng.random((17, 17))
    angular = (angular + angular.T) / 2
    rows = tuple(tuple(float(x) for x in row) for row in angular)
    # The window of blocks 2 to 4 spans places 4 to 10 of the stream.
    start = min(range(6), key=lambda block: rows[2 * block][2 * block + 6])
    proposal = only("angular_window", space, Hints(rows, rows))
    assert proposal.mask == Mask.dropping(16, range(2 * start, 2 * start + 6))
    assert proposal.origin == f"window {start}-{start + 2}, best angle"


def sensitive(signed: list[float], magnitude: list[float]) -> Hints:
    return Hints((), (), Sensitivity(tuple(signed), tuple(magnitude)))


SENSITIVE = sensitive(
    [0.5, -0.1, 0.2, 0.3, -0.3, 0.9, 0.1, 0.6], [0.5, 0.4, 0.3, 0.35, 0.8, 0.9, 0.2, 0.6]
)


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        # Magnitudes ascending are those of sites 6, 2, 3; signed ones those of 4, 1, 6.
        ({}, (2, 3, 6)),
        ({"estimate": "magnitude"}, (2, 3, 6)),
        ({"estimate": "signed"}, (1, 4, 6)),
    ],
)
def test_the_least_sensitive_sublayers_go(
    options: dict[str, object], dropped: tuple[int, ...]
) -> None:
    space = toy(4, Budget("sites", drop=3))
    assert only("sensitivity", space, SENSITIVE, **options).mask == Mask.dropping(8, dropped)


def test_estimates_per_cost_prefer_what_frees_more() -> None:
    """Attention frees 1 and FFN 3; 4 of 16 must go."""
    space = toy(4, Budget("params", ratio=0.75, of="blocks"))
    # 0.2 / 1, 0.3 / 3, 0.25 / 1, 0.5 / 3: the two FFNs go, and neither can be put back. Plainly
    # sites 0, 2 and 1 go, and then 2 is put back.
    hints = sensitive([0.0] * 8, [0.2, 0.3, 0.25, 0.5, 0.9, 0.9, 0.9, 0.9])
    assert only("sensitivity", space, hints).mask == Mask.dropping(8, (0, 1))
    assert only("sensitivity", space, hints, per_cost=True).mask == Mask.dropping(8, (1, 3))
    # An expected gain counts for as much more as it frees: 0.1 of an FFN for 0.3.
    gains = sensitive([-0.2, -0.1, -0.25, -0.05, -0.12, 0.9, -0.11, 0.9], [1.0] * 8)
    plain = only("sensitivity", space, gains, estimate="signed")
    priced = only("sensitivity", space, gains, estimate="signed", per_cost=True)
    assert plain.mask == Mask.dropping(8, (0, 2, 4, 6))
    assert priced.mask == Mask.dropping(8, (1, 2))
    assert (plain.origin, priced.origin) == (
        "sensitivity, signed",
        "sensitivity, signed per cost",
    )


def test_estimates_of_a_block_are_added_up() -> None:
    space = toy(4, Budget("blocks", drop=1), "block")
    assert only("sensitivity", space, SENSITIVE).mask == Mask.dropping(8, (2, 3))
    signed = only("sensitivity", space, SENSITIVE, estimate="signed")
    assert signed.mask == Mask.dropping(8, (0, 1))


def test_hints_without_gradients_are_refused() -> None:
    space = SPACES["sublayer"]
    hints = replace(Landscape(12).hints(), sensitivity=None)
    with pytest.raises(InputError, match="the hints hold none"):
        only("sensitivity", space, hints)


def test_only_sensitivity_needs_gradients() -> None:
    assert [method for method in SEARCHERS if needs_sensitivity(method)] == ["sensitivity"]


def test_a_window_that_fails_gives_way_to_the_next() -> None:
    space = SPACES["sublayer"]
    landscape = Landscape(12)
    windows = window_baselines(space, landscape.hints())
    searcher = build_searcher(
        "angular_window", space, landscape.hints(), np.random.default_rng(0), {}
    )

    def answer(proposal: Proposal) -> Evaluation:
        if proposal in windows[:2]:
            return Evaluation(proposal.mask, (), 0, Status.NON_FINITE)
        return landscape.evaluate(proposal.mask)

    assert tuple(proposals(drive(searcher, answer))) == windows[:3]


def test_no_window_is_proposed_where_protected_sites_leave_none() -> None:
    space = toy(5, Budget("sites", drop=3), protected=(1, 3, 5, 7))
    searcher = build_searcher(
        "angular_window", space, Landscape(10).hints(), np.random.default_rng(0), {}
    )
    assert searcher.ask().proposals == ()
