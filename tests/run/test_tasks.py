"""Searches by a task score: chrF++ of what masks write."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.chrf import CHRF
from tests.tiny_runs import WORDS, workplace_config, write_workplace

from depthsearch.calibration import chrf
from depthsearch.config import RunConfig, config_from_mapping
from depthsearch.errors import ConfigError, DataError, InputError
from depthsearch.journal import read_journal, without_times
from depthsearch.model.switches import masked
from depthsearch.run.calibration_check import check_calibration
from depthsearch.run.compare import compare
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.feeding import feeding
from depthsearch.run.search import resume, search
from depthsearch.run.session import Session
from depthsearch.space import Mask

NEW = 8
BLOCKS = {"granularity": "block", "budget": {"drop_blocks": 2}}
GREEDY = {
    "method": "greedy",
    "max_evaluations": None,
    "finalists": 1,
    "options": {"rule": "plain"},
    "racing": False,
}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace whose text has a source and a target in each row."""
    folder = tmp_path_factory.mktemp("parallel")
    write_workplace(folder)
    rng = random.Random(1)
    rows = []
    for _ in range(120):
        words = rng.choices(WORDS, k=rng.randint(2, 6))
        rows.append({"source": " ".join(words), "target": " ".join(reversed(words))})
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def parallel_config(folder: Path, **changes: Any) -> RunConfig:
    calibration = {
        "text": "pairs.jsonl",
        "column": "source",
        "target_column": "target",
        "prompt": "Turn round: {source} =",
        "batch_tokens": 128,
    }
    settings: dict[str, Any] = {
        "calibration": calibration,
        "objective": {"kind": "chrf", "max_new_tokens": NEW},
        "space": BLOCKS,
        "search": GREEDY,
    }
    return workplace_config(folder, **(settings | changes))


@pytest.fixture(scope="module")
def pair_session(parallel: Path) -> Session:
    return Session.open(parallel_config(parallel))


@pytest.fixture(scope="module")
def pruned(pair_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished greedy search by chrF++ against given targets."""
    out = tmp_path_factory.mktemp("pruned") / "run"
    search(pair_session.config, out, session=pair_session)
    return out


def records_of(run: Path, op: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run / JOURNAL) if record["op"] == op]


def lost(session: Session, mask: Mask, prompts: list[str], references: list[str]) -> list[float]:
    """Points lost by mask on each prompt, written by transformers, scored by sacrebleu."""
    model, tokenizer = session.loaded.model, session.loaded.tokenizer
    losses = []
    with masked(model, session.anatomy, mask):
        for prompt, reference in zip(prompts, references, strict=True):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
            text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
            losses.append(100 - CHRF(word_order=2).sentence_score(text, [reference]).score)
    return losses


def pairs_of(session: Session, texts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Prompts and targets, taken apart again by what stands between them."""
    parts = [text.split(" = ") for text in texts]
    return [f"{source} =" for source, _ in parts], [target for _, target in parts]


def test_greedy_removes_what_a_brute_force_over_generated_texts_would(
    pair_session: Session, pruned: Path
) -> None:
    texts = pair_session.splits(0).select_texts
    prompts, targets = pairs_of(pair_session, texts)
    assert len(texts) > 4
    assert all(prompt.startswith("Turn round: ") for prompt in prompts)
    gone: list[int] = []
    means: dict[str, float] = {}
    for _ in range(2):
        tried = {}
        for block in set(range(4)) - set(gone):
            dropped = [site for b in (*gone, block) for site in (2 * b, 2 * b + 1)]
            mask = Mask.dropping(8, dropped)
            losses = lost(pair_session, mask, prompts, targets)
            tried[sum(losses) / len(losses), mask.key] = block
            means[mask.key] = sum(losses) / len(losses)
        gone.append(tried[min(tried)])
    told = [e for record in records_of(pruned, "tell") for e in record["evaluations"]]
    found = {e["mask"]: e["loss"] for e in told}
    assert {key: found[key] for key in means} == pytest.approx(means, abs=1e-9)
    best = json.loads((pruned / BEST).read_text())
    assert Mask.from_key(best["mask"]) == Mask.dropping(
        8, [site for block in gone for site in (2 * block, 2 * block + 1)]
    )
    fresh = lost(
        pair_session,
        Mask.from_key(best["mask"]),
        *pairs_of(pair_session, pair_session.splits(0).finals_texts),
    )
    assert best["finals_loss"] == pytest.approx(sum(fresh) / len(fresh), abs=1e-9)


def test_splits_share_no_pair(pair_session: Session) -> None:
    splits = pair_session.splits(0)
    select, finals = set(splits.select_texts), set(splits.finals_texts)
    assert select
    assert finals
    assert not select & finals
    decoded = pair_session.loaded.tokenizer.decode(splits.heldout.flatten())
    assert not [text for text in select | finals if text in decoded]


def test_the_record_says_what_was_scored_and_how(pair_session: Session, pruned: Path) -> None:
    (start,) = records_of(pruned, "start")
    signature = start["signature"]
    assert signature["metric"] == chrf.chrf_signature()
    assert json.loads((pruned / BEST).read_text())["signature"] == signature
    assert signature["protocol"].startswith(
        "search on chrf, texts of at most 8 tokens after 'Turn round: {source} =' "
        "against 'target', windows of 16"
    )
    plain = parallel_config(pair_session_folder(pair_session), objective={"kind": "kl"})
    said = replace(pair_session, config=plain).signature(pair_session.splits(0), 0)
    assert "metric" not in said
    assert "texts" not in said["protocol"]


def pair_session_folder(session: Session) -> Path:
    return Path(session.config.calibration.text).parent


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_a_resumed_search_ends_as_the_undisturbed_one(
    pair_session: Session, pruned: Path, tmp_path: Path, lines: int
) -> None:
    kept = (pruned / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(kept) > lines + 2
    (tmp_path / CONFIG).write_bytes((pruned / CONFIG).read_bytes())
    (tmp_path / JOURNAL).write_bytes(b"".join(kept[:lines]))
    resume(tmp_path, session=pair_session)
    journals = [without_times(read_journal(run / JOURNAL)) for run in (pruned, tmp_path)]
    assert journals[0] == journals[1]
    assert (tmp_path / BEST).read_bytes() == (pruned / BEST).read_bytes()


def test_any_text_serves_with_the_dense_model_as_the_reference(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    """Races included; the cost is what was written, and the limit is kept."""
    config = workplace_config(
        workplace,
        objective={"kind": "chrf", "max_new_tokens": 6},
        search={"method": "evolution", "max_evaluations": 30, "cost_tokens": 20_000.0},
    )
    own = replace(session, config=config)
    outcome = search(config, tmp_path / "run", session=own)
    splits = own.splits(0)
    prompts = splits.finals[:, :8]
    texts = []
    for mask in (own.space.dense, outcome.best):
        with masked(own.loaded.model, own.anatomy, mask) as model:
            texts.append(
                [
                    own.loaded.tokenizer.decode(
                        model.generate(
                            row[None], attention_mask=torch.ones_like(row[None]),
                            max_new_tokens=6, do_sample=False,
                        )[0, 8:],
                        skip_special_tokens=True,
                    )
                    for row in prompts
                ]
            )  # fmt: skip
    metric = CHRF(word_order=2)
    wanted = [
        0.0 if a == b else 100 - metric.sentence_score(b, [a]).score
        for a, b in zip(*texts, strict=True)
    ]
    assert outcome.finals.losses == pytest.approx(wanted, abs=1e-9)
    assert outcome.cost_tokens <= 20_000
    statuses = {e["status"] for r in records_of(tmp_path / "run", "tell") for e in r["evaluations"]}
    assert "ok" in statuses


def test_an_arm_may_search_by_it_while_another_loss_ranks_and_reports(
    pair_session: Session, tmp_path: Path
) -> None:
    arms = {"kl": {"method": "windows"}, "chrf": {"method": "windows", "score": "chrf"}}
    config = parallel_config(
        pair_session_folder(pair_session),
        objective={"kind": "kl", "max_new_tokens": NEW},
        compare={"arms": arms, "seeds": [0]},
    )
    own = replace(pair_session, config=config)
    result = compare(config, tmp_path / "out", session=own)
    assert result["signature"]["metric"] == chrf.chrf_signature()
    entries = {entry["name"]: entry for entry in result["arms"]}
    assert {name: entry["score"] for name, entry in entries.items()} == {"kl": "kl", "chrf": "chrf"}
    splits = own.splits(0)
    mask = Mask.from_key(entries["chrf"]["mask"])
    losses = lost(own, mask, *pairs_of(own, splits.select_texts))
    assert entries["chrf"]["select_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    fresh = own.backend(splits.finals, 0)
    units = [fresh.run(batch, [mask]) for batch in range(len(fresh.sequences))]
    kl = [loss for unit in units for loss in unit.losses[0]]
    assert entries["chrf"]["finals_loss"] == pytest.approx(sum(kl) / len(kl), rel=1e-12)
    assert entries["chrf"]["heldout_kl"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"repair": "table"}}, r"search\.repair is table, but the loss chrf"),
        ({"search": {"finish": "gap"}}, r"search\.finish is gap, but the loss chrf"),
        ({"model": {"streamed": True}}, r"set model\.streamed to false"),
    ],
)
def test_what_a_task_score_can_not_go_with_is_refused(
    workplace: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = workplace_config(workplace, objective={"kind": "chrf"}, **changes)
    with pytest.raises(ConfigError, match=message):
        search(config, tmp_path / "run")
    arms = {"a": changes.get("search", {}) | {"method": "windows", "score": "chrf"}}
    changes = {key: value for key, value in changes.items() if key != "search"}
    changes |= {"objective": {"kind": "chrf"}, "compare": {"arms": arms, "seeds": [0]}}
    with pytest.raises(ConfigError, match=message):
        compare(workplace_config(workplace, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_finalists_may_be_repaired_where_the_objective_is_another(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    config = workplace_config(
        workplace,
        objective={"max_new_tokens": 4},
        calibration={"fit_tokens": 128, "finals_fit_tokens": 256},
        search={"method": "windows", "score": "chrf", "finish": "gap"},
    )
    search(config, tmp_path / "run", session=replace(session, config=config))
    best = json.loads((tmp_path / "run" / BEST).read_text())
    assert best["repair"]["kind"] == "gap"


def test_tools_that_judge_windows_refuse_a_task_score(
    pair_session: Session, pruned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"a calibration check judges masks on windows"):
        check_calibration(pair_session.config, tmp_path / "check")
    assert not (tmp_path / "check").exists()
    with pytest.raises(InputError, match=r"judges masks by what they write"):
        feeding(pruned, [1])


def test_a_missing_sacrebleu_is_named_before_anything_slow(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chrf, "find_spec", lambda name: None)
    config = workplace_config(workplace, objective={"kind": "chrf"}, model={"path": "/nowhere"})
    with pytest.raises(ConfigError, match=r"depthsearch\[translation\]"):
        search(config, tmp_path / "run")


def test_prompts_that_do_not_fit_leave_no_directory(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    config = workplace_config(workplace, objective={"kind": "chrf", "max_new_tokens": 121})
    with pytest.raises(DataError, match=r"context of 128 tokens"):
        search(config, tmp_path / "run", session=replace(session, config=config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"prompt": "{source} in German:"}, "prompt needs target_column"),
        ({"chat": True}, "chat needs target_column"),
        ({"fit_column": "a"}, "fit_column needs fit_text"),
        ({"fit_share": 0.9}, "fit_share needs fit_text"),
        ({"column": "a", "target_column": "a"}, "both 'a'"),
        ({"column": "a", "target_column": "b", "prompt": "translate"}, r"must hold \{source\}"),
    ],
)
def test_settings_that_mean_nothing_are_refused(calibration: dict[str, Any], message: str) -> None:
    data = {
        "model": {"path": "m"},
        "space": {"budget": {"drop_blocks": 1}},
        "calibration": {"text": "t.jsonl"} | calibration,
    }
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(data)
