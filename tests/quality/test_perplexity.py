from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from depthsearch.errors import DataError, ModelError
from depthsearch.quality import perplexity

FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {},
    "opt": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "phi3": {},
}


def random_windows(count, window, seed=0):
    return torch.randint(3, 128, (count, window), generator=torch.Generator().manual_seed(seed))


def plain_losses(model, windows):
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits.float()
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    return nats.double().mean(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [128, 128 * 7, 1 << 23])
def test_chunked_logits_give_the_loss_of_whole_logits(family, chunk, tiny):
    model = tiny(family, **FAMILIES[family])
    windows = random_windows(5, 12)
    expected = plain_losses(model, windows)
    result = perplexity(model, windows, batch_tokens=24, logits_at_once=chunk)
    assert result.losses == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.02
    assert "forward" not in model.get_decoder().__dict__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_runs_once_a_batch(family, tiny):
    model = tiny(family, **FAMILIES[family])
    tokens = []
    model.get_input_embeddings().register_forward_hook(
        lambda _m, a, _o: tokens.append(a[0].numel())
    )
    perplexity(model, random_windows(5, 12), batch_tokens=24)
    assert tokens == [24, 24, 12]


def test_softcapping_and_scale_matter_here(tiny):
    """Guards the test above: without the last step of the forward the losses would differ."""
    windows = random_windows(3, 12)
    capped = perplexity(tiny("gemma2", final_logit_softcapping=5.0), windows).loss_nats
    assert (
        abs(capped - perplexity(tiny("gemma2", final_logit_softcapping=None), windows).loss_nats)
        > 0.1
    )


def test_a_model_whose_head_cannot_run_alone_is_run_whole(tiny):
    model = tiny("llama")
    inner = model.forward

    def forward(input_ids, **kwargs):
        """Adds something that depends on positions, which a head fed in pieces can't know."""
        output = inner(input_ids=input_ids, **{**kwargs, "logits_to_keep": 0})
        places = torch.arange(input_ids.shape[1], dtype=torch.float32)
        output.logits = output.logits * (1 + places.view(1, -1, 1))
        return output

    model.forward = forward
    windows = random_windows(4, 12)
    expected = plain_losses(model, windows)
    assert perplexity(model, windows, batch_tokens=24).losses == pytest.approx(expected.tolist())


def test_the_figures_belong_together(tiny):
    seen = []
    result = perplexity(
        tiny("llama"), random_windows(5, 12), 24, on_progress=lambda *step: seen.append(step)
    )
    losses = torch.tensor(result.losses, dtype=torch.float64)
    assert result.loss_nats == pytest.approx(float(losses.mean()))
    assert result.stderr == pytest.approx(float(losses.std()) / math.sqrt(5))
    assert result.value == pytest.approx(math.exp(result.loss_nats))
    assert result.tokens == 5 * 11
    assert result.protocol == "nonoverlapping window=12, first token unscored, n=5 windows"
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_one_window_has_no_standard_error(tiny):
    assert perplexity(tiny("llama"), random_windows(1, 12)).stderr is None


def test_batches_change_nothing_but_rounding(tiny):
    model, windows = tiny("llama"), random_windows(7, 12)
    one, many = perplexity(model, windows, 12), perplexity(model, windows, 1000)
    assert one.losses == pytest.approx(many.losses, abs=1e-5)


def test_training_mode_is_put_back_and_not_used(tiny):
    model = tiny("gpt2")
    quiet = perplexity(model, random_windows(3, 12)).losses
    model.train()
    assert perplexity(model, random_windows(3, 12)).losses == quiet
    assert model.training


def some_scored(windows, seed=1):
    scored = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    scored[:, 5] = True
    return scored


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("chunk", [128, 128 * 7, 1 << 23])
def test_only_the_tokens_asked_for_are_scored(family, chunk, tiny):
    model = tiny(family, **FAMILIES[family])
    windows = random_windows(5, 12)
    scored = some_scored(windows)
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits.float()
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    expected = [float(n[s].mean()) for n, s in zip(nats, scored[:, 1:], strict=True)]
    result = perplexity(model, windows, 24, logits_at_once=chunk, scored=scored)
    assert result.losses == pytest.approx(expected, abs=1e-5)
    assert result.tokens == int(scored[:, 1:].sum())
    assert result.loss_nats == pytest.approx(float(nats[scored[:, 1:]].mean()), abs=1e-5)
    assert (
        result.protocol
        == "targets alone, behind their prompts, 12 tokens of both at most, n=5 windows"
    )


def test_what_stands_behind_the_last_scored_token_does_not_matter(tiny):
    windows, model = random_windows(4, 12), tiny("mistral", sliding_window=8)
    scored = some_scored(windows)
    scored[:, 8:] = False
    other = windows.clone()
    other[:, 8:] = 0
    losses = perplexity(model, windows, scored=scored).losses
    assert perplexity(model, other, scored=scored).losses == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda scored: scored[:, 1:], "a bool for each token"),
        (lambda scored: scored.long(), "a bool for each token"),
        (lambda scored: scored & (torch.arange(12) < 1), "no token to score behind its first"),
    ],
)
def test_tokens_to_score_that_do_not_fit_are_refused(change, says, tiny):
    windows = random_windows(5, 12)
    with pytest.raises(DataError, match=says):
        perplexity(tiny("llama"), windows, scored=change(some_scored(windows)))


def test_logits_never_exceed_the_chunk(tiny):
    model = tiny("llama")
    sizes = []
    model.lm_head.register_forward_hook(lambda _m, _a, output: sizes.append(output.numel()))
    perplexity(model, random_windows(8, 12), batch_tokens=48, logits_at_once=128 * 5)
    assert max(sizes) <= 128 * 5


@pytest.mark.parametrize(
    ("windows", "says"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \[0, 8\]"),
        (torch.zeros(2, 1, dtype=torch.int64), r"shape \[2, 1\]"),
        (torch.zeros(8, dtype=torch.int64), r"shape \[8\]"),
        (torch.full((2, 8), 128), "hold token 128, but the model's vocabulary has 128"),
        (torch.zeros(2, 65, dtype=torch.int64), "65 tokens, but the model's context is 64"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unusable_windows(windows, says, family, tiny):
    with pytest.raises(DataError, match=says):
        perplexity(tiny(family), windows)


def test_a_loss_that_is_not_finite_is_an_error_and_the_model_is_restored(tiny):
    model = tiny("llama")
    model.lm_head.weight[5] = math.inf
    with pytest.raises(ModelError, match="window 0"):
        perplexity(model, random_windows(2, 12))
    assert "forward" not in model.get_decoder().__dict__
