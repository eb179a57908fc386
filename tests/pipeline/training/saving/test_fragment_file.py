"""Fragment files: stock safetensors reads them, hashes are of the bytes, any cut can be read back from any other."""

import hashlib
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError
from pipeline.training.saving.fragment_file import Stretch, read_into, read_whole, write_stretches


def cuts(draw: random.Random, total: int, parts: int) -> list[int]:
    return [0, *sorted(draw.sample(range(1, total), parts - 1)), total]


def test_stock_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    stretches = [
        Stretch("master", "a.weight", 7, torch.randn(11)),
        Stretch("ema", "a.weight", 7, torch.randn(11)),
    ]
    record = write_stretches(tmp_path / "f.safetensors", stretches)
    loaded = load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == {"master/a.weight/7", "ema/a.weight/7"}
    assert all(torch.equal(loaded[stretch.key], stretch.tensor) for stretch in stretches)
    content = (tmp_path / "f.safetensors").read_bytes()
    assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_equal_state_gives_equal_bytes(tmp_path: Path) -> None:
    stretch = Stretch("master", "w", 0, torch.arange(100.0))
    records = [write_stretches(tmp_path / name, [stretch]) for name in ("a", "b")]
    assert records[0] == records[1]


def test_views_of_one_buffer_are_written_as_they_are(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    write_stretches(
        tmp_path / "f", [Stretch("master", "a", 0, flat[:8]), Stretch("master", "b", 3, flat[8:])]
    )
    assert torch.equal(load_file(tmp_path / "f")["master/b/3"], flat[8:])


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_stretches(tmp_path / "f", [])
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_is_read_from_any_other(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    total = draw.randint(5, 60)
    whole = torch.randn(total, generator=torch.Generator().manual_seed(seed))
    saved = cuts(draw, total, draw.randint(1, 4))
    paths = []
    for number, (start, stop) in enumerate(pairwise(saved)):
        paths.append(tmp_path / f"{number}.safetensors")
        write_stretches(paths[-1], [Stretch("ema", "w/odd.name", start, whole[start:stop])])
    draw.shuffle(paths)
    wanted_cuts = cuts(draw, total, draw.randint(1, 5))
    wanted = [
        Stretch("ema", "w/odd.name", start, torch.full((stop - start,), float("nan")))
        for start, stop in pairwise(wanted_cuts)
    ]
    read_into(paths, wanted)
    assert torch.equal(torch.cat([stretch.tensor for stretch in wanted]), whole)


def test_reading_stops_when_everything_is_there(tmp_path: Path) -> None:
    stretch = Stretch("master", "w", 0, torch.ones(4))
    write_stretches(tmp_path / "own", [stretch])
    wanted = Stretch("master", "w", 0, torch.zeros(4))
    read_into([tmp_path / "own", tmp_path / "not there"], [wanted])
    assert torch.equal(wanted.tensor, torch.ones(4))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_stretches(tmp_path / "f", [Stretch("master", "w", 0, torch.ones(4))])
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 .*\(ema/w/0\)"):
        read_into(
            [tmp_path / "f"],
            [Stretch("master", "w", 0, torch.empty(4)), Stretch("ema", "w", 0, torch.empty(4))],
        )


def test_overlapping_stretches_are_refused(tmp_path: Path) -> None:
    """Two files that both claim an element: one of them is not of this state."""
    write_stretches(tmp_path / "a", [Stretch("master", "w", 0, torch.ones(4))])
    write_stretches(tmp_path / "b", [Stretch("master", "w", 2, torch.zeros(4))])
    with pytest.raises(CheckpointError, match="lacks"):
        read_into([tmp_path / "a", tmp_path / "b"], [Stretch("master", "w", 0, torch.empty(6))])


def test_whole_tensors_have_their_shapes(tmp_path: Path) -> None:
    whole = torch.randn(2, 3, 4)
    flat = whole.view(-1)
    write_stretches(tmp_path / "a", [Stretch("master", "w", 0, flat[:5])])
    write_stretches(tmp_path / "b", [Stretch("master", "w", 5, flat[5:])])
    merged = read_whole([tmp_path / "a", tmp_path / "b"], "master", {"w": [2, 3, 4]})
    assert torch.equal(merged["w"], whole)


def test_a_file_that_is_none_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: not a fragment file"):
        read_into([tmp_path / "bad.safetensors"], [Stretch("master", "w", 0, torch.empty(4))])
