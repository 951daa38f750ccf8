"""The picture of a search tree: which nodes are shown, and what their lines say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_html import demand_self_contained
from tests.run.synthetic import Search

from depthsearch.journal import read_journal
from depthsearch.report import run_report
from depthsearch.report.data import read_run
from depthsearch.report.tables import lineage
from depthsearch.report.tree import MOST_NODES, most_visited, removed_sites, tree_picture
from depthsearch.run.planning import Plan
from depthsearch.run.replaying import replayed
from depthsearch.searchers.mcts import MctsSearcher
from depthsearch.space import Site


def node(visits: int, loss: float | None = None) -> dict[str, Any]:
    return {"visits": visits, "best_loss": loss, "best_mask": None if loss is None else "0011"}


TREE: dict[str, Any] = {
    "root": "1111",
    "nodes": {
        "1111": node(9, 0.5), "0111": node(5, 0.5), "1011": node(4, 0.9),
        "0011": node(6, 0.5), "1101": node(1), "1100": node(3, 0.7), "0101": node(0),
    },
    "edges": [
        {"parent": parent, "child": child, "visits": visits}
        for parent, child, visits in (
            ("1111", "0111", 5), ("1111", "1011", 4), ("1111", "1101", 1),
            ("0111", "0011", 2), ("1011", "0011", 4), ("1101", "1100", 3), ("0111", "0101", 0),
        )
    ],
}  # fmt: skip
SITES = tuple(
    Site(2 * block + part, "decoder", block, kind)
    for block in range(2)
    for part, kind in enumerate(("attention", "ffn"))
)


def test_the_most_visited_nodes_that_hang_together() -> None:
    """1100 has more visits than 1101, but can't be shown without it; 0011 was led to by 1011."""
    assert most_visited(TREE, 3) == {"1111": None, "0111": "1111", "0011": "0111"}
    assert most_visited(TREE, 4) == most_visited(TREE, 3) | {"1011": "1111"}
    assert list(most_visited(TREE)) == ["1111", "0111", "0011", "1011", "1101", "1100"]


def test_lines_name_what_they_remove() -> None:
    assert removed_sites("1111", "0111", SITES) == "A0"
    assert removed_sites("0111", "0110", SITES) == "F1"
    assert removed_sites("1111", "1100", SITES) == "B1"
    assert removed_sites("1111", "1001", SITES) == "F0 A1"
    assert removed_sites("1111", "0100", SITES) == "A0 B1"


def test_the_picture_says_in_words_what_it_shows() -> None:
    drawn = tree_picture(TREE, SITES, "kl")
    assert drawn is not None
    assert drawn.alt == (
        "The 6 most visited of 7 nodes of the search tree; the first removals are A0, F0, A1."
    )
    unvisited = TREE | {"nodes": {key: node(0) for key in TREE["nodes"]}}
    assert tree_picture(unvisited, SITES, "kl") is None
    failed = {key: found | {"best_loss": None} for key, found in TREE["nodes"].items()}
    assert tree_picture(TREE | {"nodes": failed}, SITES, "kl") is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of tree search on a made-up loss."""
    search = Search(tmp_path / "journal.jsonl", Plan(method="mcts", seed=1, max_evaluations=150))
    config = {"search": {"method": "mcts", "seed": 1, "max_evaluations": 150}}
    search.start = {
        "version": "0", "signature": {}, "config": config, "space": search.space.to_json(),
    }  # fmt: skip
    search.run()
    return tmp_path


def test_a_report_shows_the_tree_of_its_journal(run: Path) -> None:
    page = demand_self_contained(run_report(run))
    assert "What the tree search looked at" in page.titles
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    (alt,) = (alt for alt in alts if "nodes of the search tree" in alt)
    searcher = replayed(read_journal(run / "journal.jsonl"))
    assert isinstance(searcher, MctsSearcher)
    tree = searcher.tree()
    assert f"The {MOST_NODES} most visited of {len(tree['nodes'])} nodes" in alt
    shown = most_visited(tree)
    left = [n["visits"] for key, n in tree["nodes"].items() if key not in shown]
    assert sum(tree["nodes"][key]["visits"] for key in shown) > sum(sorted(left)[-MOST_NODES:])


def test_a_journal_that_cannot_be_repeated_has_a_report_without_a_tree(run: Path) -> None:
    lines = (run / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["config"]["search"]["seed"] = 2
    (run / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = demand_self_contained(run_report(run))
    assert "What the tree search looked at" not in page.titles
    assert "How the search went" in page.titles


def test_the_lineage_names_each_best_mask_and_what_changed(run: Path) -> None:
    found = read_run(run)
    rows = lineage(found).rows
    assert len(rows) > 1
    losses = [float(row[2].split()[0]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(found.ranked[0].evaluation.loss, abs=1e-4)
    assert rows[-1][1] == found.ranked[0].origin
    for row in rows[1:]:
        assert row[3].startswith(("drops ", "puts back "))
