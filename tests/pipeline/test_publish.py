"""Files appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from pipeline import publish


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    publish.write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), publish.whole_file(path) as beside:
        beside.write_bytes(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_replaces_the_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("old", "new"):
        with publish.whole_folder(path) as beside:
            assert text == "old" or (path / "w").read_text() == "old"
            (beside / "w").write_text(text)
    assert (path / "w").read_text() == "new"
    with pytest.raises(RuntimeError), publish.whole_folder(path) as beside:
        (beside / "w").write_text("half")
        raise RuntimeError
    assert (path / "w").read_text() == "new" and names(tmp_path) == ["model"]


def test_the_first_to_publish_wins(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    for number, expected in ((1, True), (2, False)):
        beside = publish.temporary_beside(path)
        beside.write_text(str(number))
        assert publish.publish_first(beside, path) is expected
    assert path.read_text() == "1" and names(tmp_path) == ["t.tar"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    publish.temporary_beside(tmp_path / "a").write_text("x")
    publish.temporary_beside(tmp_path / "b").mkdir()
    (tmp_path / ".hidden").write_text("keep")
    assert publish.remove_temporaries(tmp_path) == 2
    assert names(tmp_path) == [".hidden"]
    assert publish.remove_temporaries(tmp_path / "nowhere") == 0


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    publish.write_bytes(tmp_path / "x", b"1")
    assert calls == ["fsync", "rename", "fsync"]


def test_digests_see_names_bytes_and_no_spelling(tmp_path: Path) -> None:
    assert publish.json_digest({"b": 1, "a": [1.5]}) == publish.json_digest({"a": [1.5], "b": 1})
    assert publish.json_digest({"a": 1}) != publish.json_digest({"a": 2})
    (tmp_path / "one").write_text("x")
    first = publish.folder_digest(tmp_path)
    (tmp_path / "one").rename(tmp_path / "two")
    assert publish.folder_digest(tmp_path) != first
