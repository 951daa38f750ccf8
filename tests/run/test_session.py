from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_model
from tests.tiny_runs import workplace_config, write_config, write_workplace

from depthsearch.config import load_config
from depthsearch.errors import BudgetError, ConfigError, DataError, MaskError, ModelError
from depthsearch.evaluation import Racing
from depthsearch.run.loop import Outcome
from depthsearch.run.search import best_json, shareable_config
from depthsearch.run.session import Session, check_search
from depthsearch.space import Evaluation, Mask


class TestOpening:
    def test_everything_is_loaded(self, session: Session) -> None:
        assert session.anatomy.model_type == "llama"
        assert len(session.space.sites) == 8
        assert session.loaded.dtype is torch.float32
        assert len(session.documents.texts) == 80

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"search": {"method": "evolutoin"}}, ConfigError, "did you mean 'evolution'"),
            ({"search": {"options": {"parnts": 3}}}, ConfigError, "did you mean 'parents'"),
            ({"search": {"options": {"parents": 0}}}, ConfigError, "at least 1"),
            ({"search": {"options": {"parents": "4"}}}, ConfigError, "takes a whole number"),
            (
                {"search": {"method": "optuna", "options": {"sampler": "tpee"}}},
                ConfigError,
                "takes one of tpe",
            ),
            ({"model": {"path": "./missing"}}, ModelError, "no such file"),
            ({"calibration": {"text": "missing.txt"}}, DataError, "no such file"),
            ({"space": {"budget": {"keep_params": 0.05}}}, BudgetError, "cheapest"),
            ({"space": {"budget": {"drop_sites": 2}, "protect": [9]}}, MaskError, "no block 9"),
        ],
    )
    def test_what_is_wrong_is_said(
        self, workplace: Path, changes: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        if "model" in changes:
            changes = {"model": {"path": str(workplace / "missing"), "dtype": "float32"}}
        with pytest.raises(kind, match=message):
            Session.open(workplace_config(workplace, **changes))

    def test_a_wrong_option_is_refused_before_anything_is_loaded(self, workplace: Path) -> None:
        changes = {"search": {"options": {"nonsense": 1}}, "calibration": {"text": "missing.txt"}}
        with pytest.raises(ConfigError, match="nonsense"):
            Session.open(workplace_config(workplace, **changes))

    @pytest.mark.parametrize("method", ["greedy", "windows", "single_removal", "random", "optuna"])
    def test_every_method_checks_its_own_options(self, workplace: Path, method: str) -> None:
        config = workplace_config(workplace, search={"method": method})
        check_search(config.search)
        with pytest.raises(ConfigError, match=f"unknown option 'parents' of the method '{method}'"):
            check_search(config.search.model_copy(update={"options": {"parents": 3}}))


class TestSplits:
    def test_held_out_text_is_the_same_for_every_seed(self, session: Session) -> None:
        first, second = session.splits(0), session.splits(1)
        assert torch.equal(first.heldout, second.heldout)
        assert not torch.equal(first.select, second.select)
        assert not torch.equal(first.finals, second.finals)
        assert first.fingerprint != second.fingerprint
        assert session.splits(0).fingerprint == first.fingerprint

    def test_text_is_drawn_once_for_all_arms(self, workplace: Path, session: Session) -> None:
        first = session.splits(0)
        arm = workplace_config(workplace, search={"method": "greedy", "seed": 4})
        assert replace(session, config=arm).splits(0) is first
        fit = {"fit_tokens": 320, "finals_fit_tokens": 320}
        repaired = workplace_config(workplace, search={"repair": "table"}, calibration=fit)
        assert len(replace(session, config=repaired).splits(0).fit) == 20
        longer = workplace_config(workplace, calibration={"heldout_tokens": 32})
        assert len(replace(session, config=longer).splits(0).heldout) == 2
        texts = ("Nothing that was there before.", *session.documents.texts)
        documents = replace(session.documents, texts=texts)
        changed = replace(session, documents=documents).splits(0)
        assert changed.fingerprint != first.fingerprint

    @pytest.mark.parametrize("model_type", ["llama", "gpt2"])
    def test_text_that_the_model_cannot_take_is_refused(
        self, workplace: Path, session: Session, model_type: str
    ) -> None:
        def of_model(session: Session, **changes: Any) -> Session:
            model = tiny_model(model_type, **changes)
            return replace(session, loaded=replace(session.loaded, model=model))

        tokens = dict.fromkeys(("select_tokens", "finals_tokens", "heldout_tokens"), 320)
        windows = {"window_tokens": 160, "batch_tokens": 160, **tokens}
        config = workplace_config(workplace, calibration=windows)
        longer = replace(session, config=config)
        with pytest.raises(DataError, match="160 tokens, but the model's context is 128; lower"):
            of_model(longer).splits(0)
        limit = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
        assert of_model(longer, **{limit: 160}).splits(0).window_tokens == 160
        with pytest.raises(DataError, match="but the model's vocabulary has 80; tokenize with"):
            of_model(session, vocab_size=80).splits(0)

    def test_backends_follow_the_configuration(self, session: Session) -> None:
        splits = session.splits(0)
        backend = session.backend(splits.select, 0)
        assert backend.sequences == (4, 4, 4, 4)
        assert backend.window_tokens == 16
        _, losses = session.judge(splits.heldout).figures([session.space.dense])
        with torch.no_grad():
            plain = session.loaded.model(input_ids=splits.heldout, labels=splits.heldout).loss
        assert float(losses.mean()) == pytest.approx(float(plain), rel=1e-5)

    def test_the_plan_is_the_search_section(self, workplace: Path, session: Session) -> None:
        search = {
            "method": "greedy", "seed": 7, "cost_tokens": 5e4, "max_evaluations": 9,
            "patience": 40, "finalists": 2, "racing": False, "batch": 3,
            "options": {"rule": "plain"},
        }  # fmt: skip
        changed = replace(session, config=workplace_config(workplace, search=search))
        plan = vars(changed.plan())
        names = {"batch": "ask"}
        expected = {names.get(key, key): value for key, value in search.items()}
        texts = ("calibration.select_tokens", "calibration.finals_tokens")
        assert plan == expected | {"baselines": 1, "texts": texts}

    @pytest.mark.parametrize(
        ("racing", "expected"),
        [
            (True, Racing()),
            ({"error_rate": 0.2}, Racing("paired", error_rate=0.2)),
            ({"method": "halving", "eta": 4}, Racing("halving", eta=4)),
            ({"method": "none"}, False),
        ],
    )
    def test_the_race_of_the_plan(
        self, workplace: Path, session: Session, racing: Any, expected: Any
    ) -> None:
        config = workplace_config(workplace, search={"racing": racing})
        assert replace(session, config=config).plan().racing == expected


class TestSignature:
    def test_it_holds_what_a_figure_depends_on(self, session: Session) -> None:
        signature = session.signature(session.splits(3), 3)
        assert json.loads(json.dumps(signature)) == signature
        assert signature["model"]["fingerprint"] == session.loaded.fingerprint
        assert signature["data"]["windows"] == session.splits(3).fingerprint
        assert signature["data"]["documents"] == session.documents.fingerprint
        assert (signature["seed"], signature["dtype"], signature["device"]) == (3, "float32", "cpu")
        assert signature["threads"] == 1
        assert "windows of 16 tokens" in signature["protocol"]
        assert "25 % of positions" in signature["protocol"]
        for key in ("depthsearch", "torch", "transformers", "python"):
            assert signature[key]

    def test_it_names_no_folder_of_this_machine(self, session: Session, workplace: Path) -> None:
        text = json.dumps(session.signature(session.splits(0), 0))
        assert str(workplace.parent) not in text
        assert session.model_json["source"] == "model"
        assert session.documents_name == "text.txt"

    def test_it_records_no_password_of_a_storage(self, session: Session, workplace: Path) -> None:
        optuna = {"method": "optuna", "options": {"storage": "sqlite:///study.db?secret=1234"}}
        config = workplace_config(
            workplace, search=optuna, compare={"seeds": [0], "arms": {"tpe": {"method": "optuna"}}}
        )
        assert config.compare is not None
        assert "1234" in str(config.compare.arms["tpe"].options)
        shared = shareable_config(replace(session, config=config))
        assert "1234" not in json.dumps(shared)
        assert json.dumps(shared).count("(not recorded)") == 2

    def test_another_text_or_model_is_another_signature(
        self, workplace: Path, tmp_path: Path
    ) -> None:
        write_workplace(tmp_path, "qwen2")
        other = Session.open(load_config(write_config(tmp_path / "run.yaml")))
        (tmp_path / "text.txt").write_text("\n\n".join(f"drops {i} masks" * 40 for i in range(80)))
        changed = Session.open(load_config(tmp_path / "run.yaml"))
        first, second = (s.signature(s.splits(0), 0) for s in (other, changed))
        assert first["model"] == second["model"]
        assert first["data"]["documents"] != second["data"]["documents"]
        assert first["data"]["windows"] != second["data"]["windows"]


def test_the_result_of_a_run(session: Session) -> None:
    mask = session.space.decode([0.0] * 8)
    outcome = Outcome(
        best=mask,
        origin="evolution shift",
        search=Evaluation(mask, (0.5, 0.7), 32),
        finals=Evaluation(mask, (0.6, 0.8), 32),
        baseline=Mask.dense(8),
        reason="budget",
        cost_tokens=123.5,
        evaluations=9,
    )
    best = best_json(session, outcome, 4, {"seed": 4})
    assert json.loads(json.dumps(best, allow_nan=False)) == best
    assert {*best["dropped"], *best["kept"]} == {site.name for site in session.space.sites}
    assert best["dropped"] == [session.space.sites[i].name for i in mask.dropped]
    assert Mask.from_key(best["mask"]) == mask
    assert best["cost"] == session.space.cost(mask) <= best["cap"] == session.space.cap
    assert best["dense_cost"] == session.space.cost(session.space.dense)
    assert (best["loss"], best["finals_loss"]) == (0.6, pytest.approx(0.7))
    assert [best["stderr"], best["finals_stderr"]] == pytest.approx([0.1, 0.1])
    assert (best["seed"], best["signature"], best["baseline"]) == (4, {"seed": 4}, "1" * 8)
    assert (best["cost_tokens"], best["evaluations"], best["reason"]) == (123.5, 9, "budget")
    assert best["model"]["fingerprint"] == session.loaded.fingerprint
    assert best["budget"]["metric"] == best["metric"] == "params"
