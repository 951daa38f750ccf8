from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthsearch.calibration import Documents, Splits, batches, make_splits
from depthsearch.calibration.windows import (
    check_windows,
    draw_windows,
    opening_tokens,
    text_windows,
)
from depthsearch.errors import DataError

BOS, EOS = 2, 3


def documents(lengths):
    """Document i repeats the one word w<i>, so its tokens name it."""
    return Documents.of([" ".join([f"w{i}"] * n) for i, n in enumerate(lengths)], "test")


def words(windows):
    return set(windows.flatten().tolist()) - {BOS, EOS}


def split(docs, tokenizer, seed=0, window=8, select=64, finals=32, heldout=32, fraction=0.3):
    return make_splits(docs, tokenizer, window, select, finals, heldout, fraction, seed)


lengths = st.lists(st.integers(4, 40), min_size=60, max_size=120)


@settings(max_examples=30, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 2**32 - 1), adds_bos=st.booleans())
def test_splits_share_no_document(make_tokenizer, lengths, seed, adds_bos):
    splits = split(documents(lengths), make_tokenizer(adds_bos), seed)
    select, finals, heldout = words(splits.select), words(splits.finals), words(splits.heldout)
    assert not select & finals
    assert not select & heldout
    assert not finals & heldout
    assert splits.select.shape == (8, 8)
    assert splits.finals.shape == splits.heldout.shape == (4, 8)
    assert splits.select.dtype == torch.int64


@settings(max_examples=20, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 1000))
def test_held_out_windows_depend_on_no_seed(make_tokenizer, lengths, seed):
    tokenizer = make_tokenizer()
    first, again, other = (split(documents(lengths), tokenizer, s) for s in (seed, seed, seed + 1))
    assert torch.equal(first.select, again.select)
    assert torch.equal(first.finals, again.finals)
    assert first.fingerprint == again.fingerprint
    assert torch.equal(first.heldout, other.heldout)


def test_held_out_documents_stay_unused_however_much_is_asked_elsewhere(make_tokenizer):
    docs = documents([10] * 100)
    tokenizer = make_tokenizer()
    small = split(docs, tokenizer, seed=1, heldout=320)
    large = split(docs, tokenizer, seed=2, select=600, finals=100, heldout=320)
    assert torch.equal(small.heldout, large.heldout)
    assert not words(large.heldout) & (words(large.select) | words(large.finals))


def test_seeds_draw_different_documents(make_tokenizer):
    docs = documents([10] * 100)
    one, two = (split(docs, make_tokenizer(), seed) for seed in (1, 2))
    assert words(one.select) != words(two.select)
    assert one.fingerprint != two.fingerprint


def test_documents_are_joined_by_the_end_token_and_cut_in_order(make_tokenizer):
    splits = split(documents([5] * 30), make_tokenizer(), window=6)
    for window in torch.cat([splits.select, splits.finals, splits.heldout]).tolist():
        assert window[5] == EOS
        assert window[:5] == [window[0]] * 5


def test_a_tokenizer_without_end_token_joins_directly(make_tokenizer):
    splits = split(documents([8] * 40), make_tokenizer(has_eos=False))
    assert all(len(set(window)) == 1 for window in splits.select.tolist())


def test_every_window_opens_with_what_the_tokenizer_puts_first(make_tokenizer):
    assert opening_tokens(make_tokenizer(adds_bos=True)) == (BOS,)
    assert opening_tokens(make_tokenizer()) == ()
    splits = split(documents([10] * 60), make_tokenizer(adds_bos=True))
    for windows in (splits.select, splits.finals, splits.heldout):
        assert (windows[:, 0] == BOS).all()
        assert (windows[:, 1:] != BOS).all()


def test_repeated_texts_count_once(make_tokenizer):
    texts = documents([10] * 60).texts
    tokenizer = make_tokenizer()
    plain = split(Documents.of(texts, "x"), tokenizer)
    repeated = split(Documents.of([*texts, *texts[::-1]], "x"), tokenizer)
    assert plain.fingerprint == repeated.fingerprint
    spaced = split(Documents.of([*texts, *(f" {text}\n" for text in texts)], "x"), tokenizer)
    assert plain.fingerprint == spaced.fingerprint


def test_an_empty_split_is_allowed(make_tokenizer):
    splits = split(documents([10] * 60), make_tokenizer(), finals=0)
    assert splits.finals.shape == (0, 8)
    assert batches(splits.finals, 64) == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 1}, "window_tokens is 1"),
        ({"select": 7}, "select_tokens is 7"),
        ({"finals": -1}, "finals_tokens is -1"),
        ({"fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"select": 8000}, "select split needs 8,000 tokens, but its 42 documents hold 456"),
        ({"heldout": 8000}, "raise heldout_fraction"),
        ({"select": 448}, "lower finals_tokens"),
    ],
)
def test_impossible_wishes_name_the_figures(make_tokenizer, change, says):
    with pytest.raises(DataError) as caught:
        split(documents([10] * 60), make_tokenizer(), **change)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_documents(make_tokenizer):
    with pytest.raises(DataError, match="2 different documents"):
        split(Documents.of(["w1 w2", "w3", "w3"], "x"), make_tokenizer())


def test_tokenizer_warnings_stay_silent(make_tokenizer, capfd):
    splits = split(documents([30] * 60), make_tokenizer())
    assert isinstance(splits, Splits)
    assert capfd.readouterr().err == ""


@given(count=st.integers(1, 20), window=st.integers(2, 9), batch_tokens=st.integers(1, 100))
def test_batches_keep_order_and_size(count, window, batch_tokens):
    windows = torch.arange(count * window).reshape(count, window)
    grouped = batches(windows, batch_tokens)
    assert torch.equal(torch.cat(grouped), windows)
    sizes = [len(batch) for batch in grouped]
    assert set(sizes[:-1]) <= {max(1, batch_tokens // window)}
    assert 0 < sizes[-1] <= max(1, batch_tokens // window)


def test_batches_need_room():
    with pytest.raises(DataError, match="batch_tokens is 0"):
        batches(torch.zeros(1, 2), 0)


def test_a_text_without_splits_is_used_whole(make_tokenizer):
    docs = documents([7] * 50)
    tokenizer = make_tokenizer()
    windows = text_windows(docs, tokenizer, 8, 10**6)
    assert windows.shape == (50, 8)  # 50 documents of 7 tokens, each with its end
    assert words(windows) == {tokenizer(f"w{i}")["input_ids"][0] for i in range(50)}
    part = text_windows(docs, tokenizer, 8, 83)
    assert torch.equal(part, windows[:10])
    repeated = Documents.of([*docs.texts, *docs.texts[:9]], "test")
    assert torch.equal(text_windows(repeated, tokenizer, 8, 10**6), windows)


def test_one_document_alone_can_be_evaluated(make_tokenizer):
    windows = text_windows(documents([100]), make_tokenizer(adds_bos=True), 8, 10**6)
    assert windows.shape == (14, 8)
    assert set(windows[:, 0].tolist()) == {BOS}


@pytest.mark.parametrize(
    ("length", "window", "tokens", "message"),
    [
        (3, 8, 80, "holds 4 tokens, less than one window of 8"),
        (50, 1, 80, "windows of 1 tokens"),
        (50, 8, 7, "at least one window"),
    ],
)
def test_a_text_that_holds_no_window_is_refused(make_tokenizer, length, window, tokens, message):
    with pytest.raises(DataError, match=message):
        text_windows(documents([length]), make_tokenizer(), window, tokens)


def test_draws_share_no_document_and_begin_with_the_split_of_the_seed(make_tokenizer):
    docs = documents([9] * 100)
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos)
        splits = split(docs, tokenizer, seed=3)
        draws = draw_windows(docs, tokenizer, 8, 64, 4, 0.3, 3)
        assert sorted(draws[0].tolist()) == sorted(splits.select.tolist())
        seen = words(splits.heldout)
        for windows in draws:
            assert windows.shape == (8, 8)
            assert not words(windows) & seen
            seen |= words(windows)


def test_draws_can_leave_out_the_text_of_the_finals(make_tokenizer):
    docs = documents([9] * 100)
    splits = split(docs, make_tokenizer(), seed=3)
    finals = splits.finals.numel()
    draws = draw_windows(docs, make_tokenizer(), 8, 64, 3, 0.3, 3)
    assert words(splits.finals) & (words(draws[1]) | words(draws[2]))
    others = draw_windows(docs, make_tokenizer(), 8, 64, 3, 0.3, 3, finals)
    assert torch.equal(others[0], draws[0])
    seen = words(splits.finals) | words(splits.heldout)
    for windows in others:
        assert not words(windows) & seen
        seen |= words(windows)


def test_longer_windows_hold_the_same_text(make_tokenizer):
    docs = documents([9] * 100)
    (short,) = draw_windows(docs, make_tokenizer(), 8, 64, 1, 0.3, 3)
    (long,) = draw_windows(docs, make_tokenizer(), 32, 64, 1, 0.3, 3)
    assert torch.equal(short.flatten(), long.flatten())


@pytest.mark.parametrize(
    ("window", "tokens", "draws", "message"),
    [
        (8, 64, 40, "samples of 64 tokens that share no document, and 40 were asked for"),
        (8, 6400, 2, "lower select_tokens"),
        (8, 4, 2, "at least one window"),
        (1, 64, 2, "allowed: 2 or more"),
    ],
)
def test_draws_that_the_text_does_not_hold(make_tokenizer, window, tokens, draws, message):
    with pytest.raises(DataError, match=message):
        draw_windows(documents([9] * 100), make_tokenizer(), window, tokens, draws, 0.3, 0)


def test_windows_that_are_raced_on_stand_in_random_order(make_tokenizer):
    """Documents of four windows: in the order of the text three of four neighbours share one."""
    docs = documents([23] * 200)
    sizes = {"window": 6, "select": 6 * 200, "finals": 6 * 200, "heldout": 6 * 40}
    found = [split(docs, make_tokenizer(), seed, **sizes) for seed in (1, 1, 2)]

    def neighbours(windows):
        first = windows[:, 0]
        return float((first[1:] == first[:-1]).float().mean())

    for splits in found:
        assert neighbours(splits.heldout) > 0.7
        for windows in (splits.select, splits.finals):
            assert neighbours(windows) < 0.1
            _, counts = windows[:, 0].unique(return_counts=True)
            assert counts.tolist() == [4] * 50
    for name in ("select", "finals"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
        assert not torch.equal(getattr(found[0], name), getattr(found[2], name))


@pytest.mark.parametrize(
    ("rows", "context", "says"),
    [
        (9, None, "hold token 9, but the model's vocabulary has 9; tokenize with"),
        (10, 7, "have 8 tokens, but the model's context is 7; lower window_tokens to 7 or less"),
    ],
)
def test_windows_that_a_model_cannot_take_are_refused(
    rows: int, context: int | None, says: str
) -> None:
    windows = torch.tensor([[2, 9, 4, 5, 6, 7, 8, 0]])
    check_windows(windows, 10, None)
    check_windows(windows, 10, 8)
    check_windows(windows[:0], 0, 8)
    with pytest.raises(DataError, match=says):
        check_windows(windows, rows, context)
