from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from depthsearch.errors import RunDirectoryError, StorageError
from depthsearch.run.directory import (
    create_directory,
    occupied,
    read_json,
    write_file,
    write_json,
)


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "run"
    create_directory(path, {"config.yaml": "größe: 1\n", "journal.jsonl": ""})
    assert listing(path) == ["config.yaml", "journal.jsonl"]
    assert (path / "config.yaml").read_text(encoding="utf-8") == "größe: 1\n"
    assert listing(path.parent) == ["run"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("kind", ["directory", "run", "file"])
def test_what_exists_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
    if kind == "run":
        (path / "journal.jsonl").write_text("{}\n")
    hint = "depthsearch resume" if kind == "run" else "choose another --out"
    with pytest.raises(RunDirectoryError, match=rf"exists already .*{hint}"):
        create_directory(path, {"config.yaml": ""})
    assert listing(tmp_path) == ["run"]
    assert not (path / "config.yaml").exists()


def test_a_link_to_what_is_gone_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(RunDirectoryError, match="exists already"):
        create_directory(path, {"config.yaml": ""})
    assert path.is_symlink()


def test_where_it_can_not_be_written_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot create"):
        create_directory(tmp_path / "file" / "run", {"a": ""})
    with pytest.raises(StorageError, match="cannot create"):
        create_directory(tmp_path / "run", {"missing/a": ""})
    assert listing(tmp_path) == ["file"]


def test_what_cant_be_looked_at_is_one_line(tmp_path: Path) -> None:
    long = tmp_path / ("n" * 300)
    with pytest.raises(StorageError, match=r"cannot look at .*: File name too long"):
        occupied(long)
    with pytest.raises(StorageError, match=r"cannot look at .*: File name too long"):
        create_directory(long, {"a": ""})
    with pytest.raises(StorageError, match=r"cannot write .*: File name too long"):
        write_file(long, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*: Not a directory"):
        write_file(tmp_path / "file" / "best.json", "")
    assert listing(tmp_path) == ["file"]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    write_json(path, {"b": 1 / 3, "a": "größe"})
    write_json(path, {"b": 1 / 3, "a": "größer"})
    assert listing(tmp_path) == ["best.json"]
    assert read_json(path, "missing") == {"b": 1 / 3, "a": "größer"}
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["b", "a"]


def test_json_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "best.json", {"loss": math.nan})
    assert listing(tmp_path) == []


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    write_file(path, "old\n")
    code = """
        import resource, sys
        from pathlib import Path
        from depthsearch.errors import StorageError
        from depthsearch.run.directory import create_directory, write_file
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        path = Path(sys.argv[1])
        for attempt in (
            lambda: write_file(path, "x" * 5000),
            lambda: create_directory(path.with_name("run"), {"small": "x", "big": "x" * 5000}),
        ):
            try:
                attempt()
            except StorageError as error:
                print(error)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    first, second = finished.stdout.splitlines()
    assert first == f"cannot write {path}: File too large"
    assert second == f"cannot create {tmp_path / 'run'}: File too large"
    assert listing(tmp_path) == ["best.json"]
    assert path.read_text() == "old\n"


def test_reading_says_what_is_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"has no best\.json: it has not finished"):
        read_json(tmp_path / "best.json", "it has not finished")
    for text, message in (("{", "cannot be read as JSON"), ("[1]", "not a JSON object")):
        (tmp_path / "best.json").write_text(text)
        with pytest.raises(RunDirectoryError, match=message):
            read_json(tmp_path / "best.json", "")
