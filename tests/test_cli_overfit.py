"""`depthsearch overfit` as a person calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import Cli
from tests.tiny_runs import workplace_config, write_text
from transformers import PreTrainedTokenizerFast

from depthsearch.config import load_config, resolved_yaml
from depthsearch.model.patches import load_patches
from depthsearch.model.repair import patched
from depthsearch.run.directory import BEST, CONFIG, REPAIR
from depthsearch.run.overfit import SIZES, _checked, verdict
from depthsearch.run.search import search
from depthsearch.run.session import Session
from depthsearch.space import Mask


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search whose result is refitted on 512 tokens."""
    config = workplace_config(
        workplace,
        calibration={"finals_fit_tokens": 512},
        search={"max_evaluations": 12, "finalists": 2, "finish": "gap"},
    )
    out = tmp_path_factory.mktemp("overfit") / "run"
    search(config, out)
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text of the same words, in another order."""
    return write_text(tmp_path_factory.mktemp("other") / "other.txt", seed=1)


def rows_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "overfit.json").read_text())["rows"]
    return found


def test_a_table_a_verdict_and_a_picture_in_the_report(run: Path, other: Path, cli: Cli) -> None:
    shown = cli("overfit", run, "--fit", "512,128", "--other", other)
    assert shown.code == 0, shown.err
    lines = [line.split("│")[1:-1] for line in shown.out.splitlines() if line.startswith("│")]
    assert [line[0].strip() for line in lines] == ["as cut", "128", "512"]
    assert lines[0][1].strip() == ""
    assert "Fitted on 512 tokens, the repair" in shown.out
    assert "On text of another kind" in shown.out
    assert "Does the repair overfit?" in (run / "report.html").read_text(encoding="utf-8")
    rows = rows_of(run)
    assert [row["fit_tokens"] for row in rows] == [0, 128, 512]
    assert all(row["heldout"]["kl"] > 0 and row["other"]["kl"] > 0 for row in rows)
    # A fit on little text knows it better than text it has not seen.
    assert rows[1]["fit"]["kl"] < rows[1]["heldout"]["kl"]


def test_other_text_is_judged_without_documents_of_the_run(
    run: Path, other: Path, workplace: Path, tmp_path: Path, cli: Cli
) -> None:
    assert cli("overfit", run, "--fit", "128", "--other", other).code == 0
    alone, mixed = rows_of(run), tmp_path / "mixed.txt"
    own = (workplace / "text.txt").read_text(encoding="utf-8")
    mixed.write_text(f"{own}\n\n{other.read_text(encoding='utf-8')}", encoding="utf-8")
    assert cli("overfit", run, "--fit", "128", "--other", mixed).code == 0
    assert rows_of(run) == alone
    config = load_config(run / CONFIG)
    texts = config.calibration.model_copy(update={"fit_text": str(other), "fit_share": 0.5})
    fitted = shutil.copytree(run, tmp_path / "fitted")
    changed = config.model_copy(update={"calibration": texts})
    (fitted / CONFIG).write_text(resolved_yaml(changed), encoding="utf-8")
    shown = cli("overfit", fitted, "--fit", "128", "--other", mixed)
    assert shown.code == 2
    assert "every document is also in" in shown.message


def test_the_size_of_the_run_gives_the_weights_of_the_run(run: Path, cli: Cli) -> None:
    """The figures at the run's own size are those of the weights it left on the disk."""
    shown = cli("overfit", run, "--fit", "512", "--json")
    found = json.loads(shown.out)
    assert found == json.loads((run / "overfit.json").read_text())
    best = json.loads((run / BEST).read_text())
    session = Session.open(load_config(run / "config.yaml"))
    mask = Mask.from_key(best["mask"])
    model = session.loaded.model
    patches = load_patches(run / REPAIR, model, session.anatomy, mask, best["repair"]["sha256"])
    judge = session.judge(session.splits(0).heldout)
    dense = judge.figures([session.space.dense])[1]
    with patched(session.loaded.model, session.anatomy, patches):
        kl, cross_entropy = judge.figures([mask])
    held = found["rows"][1]["heldout"]
    assert held["kl"] == pytest.approx(float(kl.mean()), abs=1e-12)
    assert held["excess"] == pytest.approx(float((cross_entropy - dense).mean()), abs=1e-12)
    cut = judge.figures([mask])[0]
    assert found["rows"][0]["heldout"]["kl"] == pytest.approx(float(cut.mean()), abs=1e-12)
    assert not torch.equal(cut, kl)


def test_the_usual_sizes_end_where_the_text_does(run: Path, cli: Cli) -> None:
    shown = cli("overfit", run, "--json")
    assert shown.code == 0, shown.err
    assert [row["fit_tokens"] for row in json.loads(shown.out)["rows"]] == [0, 1024, 4096]


def test_the_usual_sizes_are_at_least_what_a_fit_takes() -> None:
    assert _checked(SIZES, 1024, True) == [5120, 16384, 65536]


def test_mistakes_end_with_one_line_and_two(run: Path, tmp_path: Path, cli: Cli) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / BEST).unlink()
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("mask ~unknown~ keep" * 200, encoding="utf-8")
    config = load_config(run / CONFIG)
    model = shutil.copytree(config.model.path, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens([f"~{name}~" for name in ("a", "b", "c", "unknown")])
    tokenizer.save_pretrained(model)
    more_tokens = shutil.copytree(run, tmp_path / "more-tokens")
    changed = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(model)})}
    )
    (more_tokens / CONFIG).write_text(resolved_yaml(changed), encoding="utf-8")
    for arguments, message in (
        ((tmp_path / "missing",), "is not a run directory"),
        ((unfinished,), "it has not finished"),
        ((run, "--fit", "1k"), "--fit is '1k'"),
        ((run, "--fit", "16,128"), "--fit holds 16: a fit takes 80 tokens or more"),
        ((run, "--fit", "1024,65536"), "documents hold"),
        ((run, "--fit", "10000000"), "lower --fit, "),
        ((run, "--repair", "table"), "--repair is 'table': give gap or sequential"),
        ((run, "--other", tmp_path / "none.txt"), "none.txt"),
        ((more_tokens, "--fit", "512", "--other", foreign), "token 301, but the model's vocab"),
    ):
        before = sorted(path.name for path in run.iterdir())
        shown = cli("overfit", *arguments)
        assert shown.code == 2
        assert message in shown.message
        assert sorted(path.name for path in run.iterdir()) == before


def test_the_verdict_says_when_more_text_helps_and_when_it_harms() -> None:
    def row(tokens: int, fit: float, held: float) -> dict[str, Any]:
        return {
            "fit_tokens": tokens,
            "fit": {"kl": fit, "excess": 0.0},
            "heldout": {"kl": held, "excess": 0.0},
        }

    cut = row(0, 0.0, 1.0)
    assert "more text would help" in verdict([cut, row(64, 0.2, 0.8), row(128, 0.3, 0.6)])
    assert "hardly help" in verdict([cut, row(64, 0.2, 0.605), row(128, 0.3, 0.6)])
    assert "rose by 0.1000: more text would hardly" in verdict(
        [cut, row(64, 0, 0.5), row(128, 0, 0.6)]
    )
    assert "It does harm" in verdict([cut, row(64, 0.2, 1.1)])
    cut["other"], there = {"kl": 0.8, "excess": 0.5}, row(64, 0.2, 0.5)
    there["other"] = {"kl": 0.7, "excess": 0.6}
    assert "rises by 0.1000: the repair does not carry over" in verdict([cut, there])
    there["other"] = {"kl": 0.7, "excess": 0.4}
    assert "carry over" not in verdict([cut, there])
