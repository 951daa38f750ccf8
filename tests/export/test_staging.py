from __future__ import annotations

import errno
from pathlib import Path

import pytest

from depthsearch.errors import ExportError, StorageError
from depthsearch.export.staging import MANIFEST, check_target, require_room, set_aside, staged


def test_the_directory_appears_at_the_end_only(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "small"
    with staged(out) as directory:
        (directory / "a.txt").write_text("a", encoding="utf-8")
        assert not out.exists()
        assert directory.parent == out.parent

    assert (out / "a.txt").read_text(encoding="utf-8") == "a"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), ExportError("y")])
def test_any_error_removes_everything(error: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "deep" / "er" / "small") as directory:
            (directory / "a.txt").write_text("a", encoding="utf-8")
            raise error

    with pytest.raises(type(error)):
        write()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "not permitted"),
        (errno.EIO, "can't be written"),
    ],
)
def test_what_the_system_refuses_is_a_storage_error(number: int, said: str, tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "small"):
            raise OSError(number, "refused")

    with pytest.raises(StorageError, match=said):
        write()

    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")

    with pytest.raises(StorageError), staged(tmp_path / "file" / "small"):
        pass

    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


def test_a_target_that_cannot_be_looked_at_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be written") as caught:
        check_target(tmp_path / ("x" * 300), overwrite=False)

    assert "\n" not in str(caught.value)


def test_a_failed_replacement_keeps_the_old_export(tmp_path: Path) -> None:
    out = tmp_path / "small"
    with staged(out) as directory:
        (directory / MANIFEST).write_text("old", encoding="utf-8")

    def write() -> None:
        with staged(out, overwrite=True) as directory:
            (directory / MANIFEST).write_text("new", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (out / MANIFEST).read_text(encoding="utf-8") == "old"
    with staged(out, overwrite=True) as directory:
        (directory / MANIFEST).write_text("new", encoding="utf-8")

    assert (out / MANIFEST).read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupted_replacement_puts_the_old_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    with staged(out) as directory:
        (directory / MANIFEST).write_text("old", encoding="utf-8")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    def write() -> None:
        with staged(out, overwrite=True) as directory:
            (directory / MANIFEST).write_text("new", encoding="utf-8")
            monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        write()

    assert (out / MANIFEST).read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_setting_aside_never_removes_what_is_not_a_failed_export(tmp_path: Path) -> None:
    (tmp_path / "small.failed").mkdir()
    (tmp_path / "small.failed" / "thesis.txt").write_text("x", encoding="utf-8")
    (tmp_path / "work").mkdir()

    kept = set_aside(tmp_path / "work", tmp_path / "small")

    assert kept.name.startswith("small.failed-")
    assert (tmp_path / "small.failed" / "thesis.txt").is_file()


def test_a_failed_export_removes_no_earlier_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "config.json").write_text(text, encoding="utf-8")
        set_aside(tmp_path / "work", tmp_path / "small")

    first, second = sorted(tmp_path.iterdir())
    assert first.name == "small.failed"
    assert (first / "config.json").read_text(encoding="utf-8") == "old"
    assert (second / "config.json").read_text(encoding="utf-8") == "new"


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    require_room(tmp_path / "deep" / "small", 1)
    with pytest.raises(StorageError, match=r"needs 1,000,000,000,000 MB, but its disk has"):
        require_room(tmp_path / "deep" / "small", 10**18)
