from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tests.tiny_models import tiny_tokenizer

from depthsearch.calibration.parallel import Pair, load_parallel
from depthsearch.calibration.text import Documents
from depthsearch.errors import DataError

ROWS = [
    {"cs": " dobrý den ", "de": "guten Tag"},
    {"cs": "", "de": "ohne Quelle"},
    {"cs": "bez cíle", "de": None},
    {"cs": "dobrý den", "de": "hallo"},
    {"cs": "{source} je {}", "de": "ist {source}"},
]


def written(path: Path) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
        return str(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["cs", "de"])
        writer.writeheader()
        writer.writerows(ROWS)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_with_both_sides_are_read_and_a_repeated_source_counts_once(
    kind: str, tmp_path: Path
) -> None:
    found = load_parallel(written(tmp_path / f"pairs.{kind}"), "cs", "de")
    assert dict(found.targets) == {"dobrý den": "guten Tag", "{source} je {}": "ist {source}"}


def test_a_template_makes_prompts_and_documents(tmp_path: Path) -> None:
    found = load_parallel(written(tmp_path / "pairs.jsonl"), "cs", "de")
    documents, pairs = found.prompted("{cs} {source} =", tiny_tokenizer(), chat=False)
    assert pairs == {
        "{cs} dobrý den = guten Tag": Pair("{cs} dobrý den =", "guten Tag"),
        "{cs} {source} je {} = ist {source}": Pair("{cs} {source} je {} =", "ist {source}"),
    }
    assert documents == Documents.of(pairs, found.source)
    other = Documents.of(["guten Tag", " dobrý den\n", "{cs} dobrý den =", "neu"], "other")
    assert other.unlike(documents) == ["neu"]
    assert other.without(documents).texts == ("neu",)
    _, lines = found.prompted("{source}\n", tiny_tokenizer(), chat=False)
    assert next(iter(lines)) == "dobrý den\nguten Tag"


def test_the_chat_template_goes_around_the_prompt(tmp_path: Path) -> None:
    found = load_parallel(written(tmp_path / "pairs.jsonl"), "cs", "de")
    _, pairs = found.prompted("Translate: {source}", tiny_tokenizer(), chat=True)
    text = "<|user|>Translate: dobrý den</s>"
    assert pairs[f"{text}guten Tag"] == Pair(text, "guten Tag")
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: set it to false"):
        found.prompted("{source}", plain, chat=True)


def test_a_template_that_says_the_date_says_the_same_every_day(tmp_path: Path) -> None:
    found = load_parallel(written(tmp_path / "pairs.jsonl"), "cs", "de")
    dated = tiny_tokenizer()
    dated.chat_template = (
        "{%- if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif -%}"
        "{{ messages[0]['content'] }}"
    )
    documents, _ = found.prompted("{source}", dated, chat=True)
    assert documents.texts[0].startswith("Today: 01 Jan 2025\ndobrý den")


def test_columns_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"no column 'fr'; it has: cs, de"):
        load_parallel(path, "cs", "fr")
    with pytest.raises(DataError, match=r"set column to one of: cs, de"):
        load_parallel(path, None, "de")
    (tmp_path / "plain.txt").write_text("one\n\ntwo", encoding="utf-8")
    for column in ("de", "text"):
        with pytest.raises(DataError, match=r"txt files have no columns, so no text with what"):
            load_parallel(str(tmp_path / "plain.txt"), None, column)
    (tmp_path / "one.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    for column in (None, "text"):
        with pytest.raises(DataError, match=r"column 'text' would be both"):
            load_parallel(str(tmp_path / "one.jsonl"), column, "text")
    (tmp_path / "half.jsonl").write_text('{"cs": "a", "de": " "}\n{"cs": " ", "de": "b"}')
    with pytest.raises(DataError, match=r"no row has text both"):
        load_parallel(str(tmp_path / "half.jsonl"), "cs", "de")
