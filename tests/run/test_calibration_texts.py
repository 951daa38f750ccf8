from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import tiny_model
from tests.tiny_runs import workplace_config, write_text
from tokenizers.processors import TemplateProcessing

from depthsearch.calibration.text import load_documents
from depthsearch.calibration.windows import draw_windows
from depthsearch.config import RunConfig
from depthsearch.errors import DataError, InputError
from depthsearch.run.calibration_texts import (
    CheckOptions,
    check_sizes,
    check_texts,
    other_texts,
    parse_numbers,
)
from depthsearch.run.session import Session


def test_texts_share_no_window_and_lengths_share_the_text_of_the_first_sample(
    session: Session, tmp_path: Path
) -> None:
    heldout = session.splits(0).heldout
    other = load_documents(str(write_text(tmp_path / "other.txt", seed=1)))
    texts = check_texts(session, CheckOptions(draws=3, lengths=(32,)), [other], heldout)
    assert [text.name for text in texts] == [
        "sample 1", "sample 2", "sample 3", "windows of 32", "other.txt", "held-out",
    ]  # fmt: skip
    assert texts[0].windows.flatten().equal(texts[3].windows.flatten())
    assert texts[3].window_tokens == 32
    rows = [tuple(row) for text in (*texts[:3], *texts[4:]) for row in text.windows.tolist()]
    assert len(set(rows)) == len(rows)
    drawn = draw_windows(session.documents, session.loaded.tokenizer, 16, 256, 3, 0.25, 0)
    assert all(a.windows.equal(b) for a, b in zip(texts[:3], drawn, strict=True))


@pytest.mark.parametrize("opens", [False, True])
def test_windows_of_another_length_hold_nothing_but_the_first_sample(
    session: Session, workplace: Path, opens: bool
) -> None:
    """The first sample is 5 windows of 48 tokens: 240, or 235 behind the opening tokens."""
    tokenizer = deepcopy(session.loaded.tokenizer)
    if opens:
        opening = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = opening
    config = workplace_config(workplace, calibration={"window_tokens": 48})
    loaded = replace(session.loaded, tokenizer=tokenizer)
    changed = replace(session, config=config, loaded=loaded, drawn={})
    options = CheckOptions(draws=2, lengths=(24, 100))
    texts = check_texts(changed, options, [], session.splits(0).heldout)
    stream = texts[0].windows[:, int(opens) :].flatten().tolist()
    for text, length in zip(texts[2:4], (24, 100), strict=True):
        assert text.windows.shape == (len(stream) // (length - opens), length)
        assert (
            text.windows[:, int(opens) :].flatten().tolist()
            == stream[: len(text.windows) * (length - opens)]
        )
        assert not opens or text.windows[:, 0].tolist() == [1] * len(text.windows)
    least = 2 + opens
    with pytest.raises(InputError, match=f"{least} to {len(stream) // 2 + opens} tokens"):
        check_texts(changed, CheckOptions(lengths=(least - 1,)), [], texts[-1].windows)


def test_lengths_and_sizes_that_nobody_asked_for_are_those_there_is_room_for(
    session: Session,
) -> None:
    calibration = session.config.calibration
    texts = check_texts(session, CheckOptions(), [], session.splits(0).heldout)
    # 256 tokens hold no four windows of 128, and the next usual lengths are longer.
    assert [text.kind for text in texts] == ["draw"] * 4 + [None]
    assert check_sizes(calibration, CheckOptions()) == [256, 512, 1024]
    larger = calibration.model_copy(update={"select_tokens": 5000})
    assert check_sizes(larger, CheckOptions(draws=2)) == [512, 1024, 2048, 4096, 4992, 8192, 9984]


def test_what_can_not_be_done_is_refused_with_what_is_allowed(
    session: Session, workplace: Path
) -> None:
    heldout = session.splits(0).heldout

    def texts(config: RunConfig | None = None, others: Any = (), **options: Any) -> Any:
        chosen = session if config is None else replace(session, config=config)
        return check_texts(chosen, CheckOptions(**options), others, heldout)

    for lengths, message in (((256,), "2 to 128 tokens"), ((1,), "--lengths holds 1")):
        with pytest.raises(InputError, match=message):
            texts(lengths=lengths)
    with pytest.raises(DataError, match="ask for fewer"):
        texts(draws=100)
    with pytest.raises(DataError, match=r"every document is also in .*text\.txt; give"):
        texts(others=[session.documents])
    small = replace(
        session, loaded=replace(session.loaded, model=tiny_model("llama", vocab_size=80))
    )
    with pytest.raises(DataError, match="but the model's vocabulary has 80"):
        check_texts(small, CheckOptions(), [], heldout)
    one = workplace_config(workplace, calibration={"select_tokens": 16})
    with pytest.raises(InputError, match="at least 2 windows of sample 1 text"):
        texts(one)
    with pytest.raises(InputError, match=r"sizes may be 16 \(one window\) to 1024 tokens"):
        check_sizes(session.config.calibration, CheckOptions(sizes=(2048,)))
    for name, value in (("masks", 1), ("draws", 1), ("folds", -1)):
        with pytest.raises(InputError, match=f"--{name} is {value}"):
            CheckOptions(**{name: value})
    for text in ("1k", "", "0,5"):
        with pytest.raises(InputError, match="--sizes is"):
            parse_numbers(text, "sizes")
    assert parse_numbers("64,512", "sizes") == (64, 512)
    assert other_texts(["a", "b"], ["text"]) == [("a", "text"), ("b", None)]
    with pytest.raises(InputError, match="2 columns and 1 other texts"):
        other_texts(["a"], ["x", "y"])
