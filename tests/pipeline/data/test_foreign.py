"""Tars of others: decoded by an allow-list, never unpickled, split by tars, and said to promise little."""

import io
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.foreign import NO_PROMISES, foreign_samples
from pipeline.errors import DataError


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path("/nonexistent/exploded").touch, ())


def npy(value: float) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.full(3, value, np.float32))
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    return [
        write_tar(
            tmp_path / f"{number}.tar",
            {
                f"{number}{row}.{name}": c
                for row in range(2)
                for name, c in (("latent.npy", npy(row)), ("json", b'{"a": 1}'), ("txt", b"hi"))
            },
        )
        for number in range(3)
    ]


def test_samples_are_decoded_and_split_by_tars(tars: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = list(foreign_samples(tars))
    assert [sample["key"] for sample in samples] == ["00", "01", "10", "11", "20", "21"]
    assert samples[1]["latent.npy"].tolist() == [1, 1, 1] and samples[0]["json"] == {"a": 1}
    assert samples[0]["txt"] == "hi" and NO_PROMISES in caplog.text
    split = [[s["key"] for s in foreign_samples(tars, rank=rank, world_size=2)] for rank in range(2)]
    assert split == [["00", "01", "20", "21"], ["10", "11"]]


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyd", "a.unknown", "a.weights.pkl"])
def test_what_is_not_listed_is_refused_or_left_out_unread(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", {name: pickle.dumps(Bomb()), "a.txt": b"x"})
    with pytest.raises(DataError, match=f"x.tar: {name} is not decoded: allowed are npy, json"):
        list(foreign_samples([tar]))
    (sample,) = foreign_samples([tar], skip=[name.rpartition(".")[2]])
    assert sample == {"key": "a", "txt": "x"}


def test_pickled_arrays_and_damage_are_errors(tmp_path: Path, tars: list[Path]) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    tar = write_tar(tmp_path / "o.tar", {"a.npy": stream.getvalue()})
    with pytest.raises(DataError, match=r"o.tar: a.npy does not decode"):
        list(foreign_samples([tar]))
    tars[0].write_bytes(tars[0].read_bytes()[:700])
    with pytest.raises(DataError, match=r"0.tar: cannot be read as a tar"):
        list(foreign_samples(tars))
    with pytest.raises(DataError, match=r"1 missing: .*nowhere.tar"):
        list(foreign_samples([tmp_path / "nowhere.tar"]))
