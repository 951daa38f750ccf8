from __future__ import annotations

import csv
import json
import tempfile

import datasets
import huggingface_hub
import pytest
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled

from depthsearch.calibration import Documents, load_documents
from depthsearch.calibration.text import _hub
from depthsearch.errors import DataError

TEXTS = ("First document, with a comma.", "Zweites Stück – ünïcode.", "A third\nof two lines.")


def write(path, texts=TEXTS, **extra):
    rows = [
        {"text": text, **{name: values[i] for name, values in extra.items()}}
        for i, text in enumerate(texts)
    ]
    kind = path.suffix
    if kind == ".txt":
        path.write_text("\n \n\n".join(texts) + "\n", encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Caches and temporary files of a test live, and must not stay, under its own folder."""
    for name in ("cache", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


def fails(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load_documents(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_every_type_of_file_gives_the_same_documents(kind, tmp_path, capfd):
    bars = are_progress_bars_disabled()
    path = write(tmp_path / f"data.{kind}")
    capfd.readouterr()
    documents = load_documents(path)
    assert documents.texts == TEXTS
    assert documents == Documents.of(TEXTS, path)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert are_progress_bars_disabled() == bars
    assert not [*(tmp_path / "cache").rglob("*"), *(tmp_path / "scratch").rglob("*")]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_a_folder_gives_its_files_in_order_of_name(kind, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / f"b.{kind}", TEXTS[2:])
    write(folder / f"a.{kind}", TEXTS[:2])
    write(folder / f".hidden.{kind}")
    (folder / "README.md").write_text("not data")
    assert load_documents(str(folder)).texts == TEXTS


def test_fingerprint_tells_texts_and_their_borders_apart():
    assert Documents.of(["ab", "c"], "x").fingerprint != Documents.of(["a", "bc"], "x").fingerprint
    assert Documents.of(["ab"], "x").fingerprint == Documents.of(["ab"], "y").fingerprint


def test_documents_without_those_of_others():
    mine = Documents.of(["a", "b", "c", "b"], "mine")
    assert mine.without(Documents.of(["c", "a"], "x")) == Documents.of(["b", "b"], "mine")
    assert mine.without() == mine
    with pytest.raises(DataError, match="mine: every document is also in x or y; give a text of"):
        mine.without(Documents.of(["c", "a"], "x"), Documents.of(["b"], "y"))


@pytest.mark.parametrize(
    "value",
    [
        {f"title {i}": {"title": f"title {i}", "text": text} for i, text in enumerate(TEXTS)},
        {"version": 1, "data": [{"text": text} for text in TEXTS]},
        list(TEXTS),
        [{"other": "x"}, *({"text": text} for text in TEXTS)],
    ],
    ids=["object of objects", "one list inside", "strings", "ragged"],
)
def test_json_shapes(value, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert load_documents(str(path), "text").texts == TEXTS


def test_json_file_that_holds_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path)
    path = path.rename(tmp_path / "data.json")
    assert load_documents(str(path)).texts == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_columns(kind, tmp_path):
    path = write(tmp_path / f"data.{kind}", number=[1, 2, 3], title=["x", "y", "z"])
    assert load_documents(path).texts == TEXTS
    assert load_documents(path, "title").texts == ("x", "y", "z")
    assert "it has: text, number, title" in fails(path, "body")
    assert "int64" in fails(path, "number")


def test_the_only_text_column_is_found_and_several_are_listed(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"body": "hello", "n": 1}\n')
    two.write_text('{"body": "hello", "title": "x"}\n')
    assert load_documents(str(one)).texts == ("hello",)
    assert "body, title" in fails(str(two))


def test_blank_and_missing_texts_are_left_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "kept"}\n{"text": "  "}\n{"text": null}\n')
    assert load_documents(str(path)).texts == ("kept",)
    path.write_text('{"text": " "}\n')
    assert "holds no text" in fails(str(path))


def test_column_of_a_txt_file(tmp_path):
    path = write(tmp_path / "data.txt")
    assert load_documents(path, "text").texts == TEXTS
    assert "leave column out" in fails(path, "body")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_files(kind, content, tmp_path):
    path = tmp_path / f"data.{kind}"
    path.write_bytes(content)
    assert str(path) in fails(str(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_damaged_files(kind, tmp_path, capfd):
    path = tmp_path / f"data.{kind}"
    write(path)
    path.write_bytes(path.read_bytes()[:-10])
    capfd.readouterr()
    assert "can't be read" in fails(str(path))
    assert capfd.readouterr().err == ""


def test_numbers_that_no_table_holds(tmp_path):
    path = write(tmp_path / "data.json", number=[2**70, 1, 2])
    assert "can't be read (Python int too large" in fails(path)


@pytest.mark.parametrize("value", ["null", "1", '"x"'])
def test_lines_that_are_no_objects(value, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{value}\n")
    assert f'wanted an object a line, such as {{"text": ...}}: got {value}' in fails(str(path))


def test_text_in_another_encoding(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes("größer".encode("latin-1"))
    assert "UTF-8" in fails(str(path))


def test_missing_unknown_and_mixed(tmp_path):
    assert "no such file" in fails(str(tmp_path / "absent.txt"))
    assert "no such file" in fails("absent.jsonl")
    assert "no such file" in fails("")
    (tmp_path / "data.docx").write_bytes(b"x")
    assert "allowed: txt, jsonl" in fails(str(tmp_path / "data.docx"))
    folder = tmp_path / "mixed"
    folder.mkdir()
    assert "no txt" in fails(str(folder))
    write(folder / "a.txt")
    write(folder / "a.csv")
    assert "several types (.csv, .txt)" in fails(str(folder))


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "/" + "n" * 260, "n" * 260])
def test_paths_that_cant_be_looked_at(source):
    assert "can't be read (" in fails(source)


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "hub can't be reached" in fails("owner/name")


def test_hub_data_sets_know_splits_and_slices(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", TEXTS[:1])
    assert list(_hub(str(folder), None, "train[:2]")["text"]) == list(TEXTS[:2])
    assert list(_hub(str(folder), None, "test")["text"]) == list(TEXTS[:1])
