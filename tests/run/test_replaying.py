"""A searcher rebuilt from a journal is the one that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.run.synthetic import Search

from depthsearch.config import SearchConfig
from depthsearch.errors import InputError, JournalError
from depthsearch.journal import read_journal
from depthsearch.run import loop
from depthsearch.run.planning import Plan
from depthsearch.run.replaying import replayed, searcher_options
from depthsearch.searchers.mcts import MctsSearcher


def written(path: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> tuple[Any, list[Any]]:
    """A finished search: its own searcher, and its journal."""
    built: list[Any] = []
    build = loop.build_searcher

    def kept(*arguments: Any, **further: Any) -> Any:
        built.append(build(*arguments, **further))
        return built[-1]

    monkeypatch.setattr(loop, "build_searcher", kept)
    settings = {"method": "mcts", "seed": 5, **plan}
    search = Search(path, Plan(**settings))
    names = {"ask": "batch"}
    config = {"search": {names.get(key, key): value for key, value in settings.items()}}
    search.start = {"version": "0", "config": config, "space": search.space.to_json()}
    search.run()
    return built[0], read_journal(path)


@pytest.mark.parametrize(
    "plan",
    [
        {"max_evaluations": 90},
        {"max_evaluations": 75, "ask": 7},
        {"cost_tokens": 20_000.0, "options": {"batch": 5, "exploration": 0.5}},
    ],
)
def test_the_tree_is_that_of_the_search_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any]
) -> None:
    own, records = written(tmp_path / "journal.jsonl", monkeypatch, **plan)
    again = replayed(records)
    assert isinstance(again, MctsSearcher)
    assert again.tree()["root"] == own.tree()["root"]
    losses = {key: node["best_loss"] for key, node in own.tree()["nodes"].items()}
    assert {key: node["best_loss"] for key, node in again.tree()["nodes"].items()} == losses
    assert sum(node["visits"] for node in again.tree()["nodes"].values()) > 30
    # After the last tell the loop asks once more in vain, which selects and takes back.
    asks = [r for r in records if r["op"] == "ask"]
    cut = records[: records.index(asks[-1]) + 1]
    before = replayed(cut)
    assert isinstance(before, MctsSearcher)
    evaluated = before.tree()["nodes"][before.tree()["root"]]["evaluated"]
    answers = [r for r in cut if r["op"] == "tell"]
    masks = {e["mask"] for r in answers for e in r["evaluations"]}
    assert evaluated == sum(own._tree._space.on_budget(m) for m in own._tree._leaves
                            if m.key in masks)  # fmt: skip


@pytest.mark.parametrize("method", ["evolution", "greedy", "beam", "surrogate", "windows"])
def test_any_method_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own, records = written(
        tmp_path / "journal.jsonl", monkeypatch, method=method, max_evaluations=60
    )
    again = replayed(records)
    assert again.name == own.name == method
    assert again.ask().proposals == replayed(records).ask().proposals


@pytest.mark.parametrize(
    ("search", "size"),
    [({}, 4), ({"options": {"batch": 3}}, 3), ({"batch": 6}, 6)],
)
def test_optuna_learns_between_batches_up_to_a_limit_on_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any], size: int
) -> None:
    config = SearchConfig.model_validate({"method": "optuna", "max_evaluations": 60} | search)
    plan = {"ask": config.batch, "options": searcher_options(config)}
    _, records = written(
        tmp_path / "journal.jsonl", monkeypatch, method="optuna", max_evaluations=60, **plan
    )
    asks = [record["proposals"] for record in records if record["op"] == "ask"]
    sampled = [ask for ask in asks if ask[-1]["origin"].startswith("optuna")]
    assert len(sampled) > 2
    assert {len(ask) for ask in sampled[:-1]} == {size}
    assert replayed(records).name == "optuna"


def test_what_cannot_be_repeated_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, records = written(tmp_path / "journal.jsonl", monkeypatch, max_evaluations=60)
    with pytest.raises(JournalError, match="nothing to repeat"):
        replayed(records[:1])
    asks = [record for record in records if record["op"] == "ask"]
    asks[-1]["proposals"][0] = asks[0]["proposals"][0]
    with pytest.raises(JournalError, match=f"another ask {asks[-1]['id']} than the journal's"):
        replayed(records)
    records[0]["config"]["search"]["options"] = {"storage": "(not recorded)"}
    with pytest.raises(InputError, match="storage of its own"):
        replayed(records)
