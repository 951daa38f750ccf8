from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny_models import save_tiny

from depthsearch.errors import ModelError
from depthsearch.model.load import load_model
from depthsearch.run.inspection import inspect_model
from depthsearch.space import METRICS


def test_everything_about_a_model(workplace: Path) -> None:
    source = str(workplace / "model")
    found = inspect_model(source, context_tokens=64, dtype="float32", device="cpu")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    model = load_model(source, "float32", "cpu").model
    assert found["totals"]["params"]["model"] == sum(p.numel() for p in model.parameters())
    assert (found["model_type"], found["model_class"]) == ("llama", "LlamaForCausalLM")
    assert (found["blocks"], found["dtype"], found["context_tokens"]) == (4, "float32", 64)
    assert (found["packable"], found["parallel_blocks"]) == (True, False)
    assert found["self_check"]["mode"] == "site"
    assert [site["name"] for site in found["sites"]][:3] == [
        "decoder.0.attention", "decoder.0.ffn", "decoder.1.attention",
    ]  # fmt: skip
    assert list(found["totals"]) == [metric for metric in METRICS if metric != "latency"]
    for metric in found["totals"]:
        total = found["totals"][metric]
        assert sum(site[metric] for site in found["sites"]) == total["blocks"]
        assert total["blocks"] + total["outside_blocks"] == total["model"]
    longer = inspect_model(source, context_tokens=128, dtype="float32", device="cpu")
    assert longer["totals"]["flops"]["blocks"] > found["totals"]["flops"]["blocks"]
    assert longer["fingerprint"] == found["fingerprint"]


def test_parallel_blocks_share_a_norm_and_can_not_be_packed(tmp_path: Path) -> None:
    found = inspect_model(str(save_tiny(tmp_path / "model", "cohere")), dtype="float32")
    assert (found["packable"], found["parallel_blocks"]) == (False, True)
    assert found["self_check"]["mode"] == "block"
    blocks = found["totals"]["params"]["blocks"]
    assert sum(site["params"] for site in found["sites"]) == blocks - 4 * 64


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        inspect_model(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="context_tokens"):
        inspect_model(str(save_tiny(tmp_path / "model", "llama")), context_tokens=0)
