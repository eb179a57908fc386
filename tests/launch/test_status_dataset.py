"""`ldm status DATASET`: what stands in the folder, told from files alone."""

import os
from pathlib import Path

import pytest

from launch.nodes import place
from launch.status import describe
from pipeline.errors import ConfigError
from preprocessing.leases import Leases, note_work
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.preprocessing.builders import NumpyEncoder, encode_config, pairs, three_shards, write_input


def test_done_leased_and_left(tmp_path: Path) -> None:
    shards, out = list_shards(three_shards(tmp_path / "in")), tmp_path / "out"
    encode_shards(Work(shards[:2], out), NumpyEncoder(), encode_config())
    note_work(out, 5)
    for seconds, stem in ((100, "00000"), (104, "00001")):
        os.utime(out / f"00/{stem}.json", (seconds, seconds))
    with Leases(out, 60) as leases:
        leases.take("00002")
        said = describe(out).splitlines()
    assert said[0] == f"{out}: 2 of 5 shards done, 1 leased, 2 left"
    assert said[1] == "  1.2 images/s, about 0 minutes left", (
        "the 5 samples of the second shard took 4 seconds"
    )
    assert said[2].endswith(" with 1 shards") and said[3] == "  read 12, written 12"


def test_rejects_by_reason_speed_and_time_left(tmp_path: Path) -> None:
    """Three shards of ten done, the two later ones in ten minutes each: seven are left, so seventy minutes."""
    bad = [("bad.png", b""), ("bad.txt", b"x"), ("lone.txt", b"x")]
    source = write_input(tmp_path / "in", {f"{k:05d}": [*pairs([f"{k}a", f"{k}b"]), *bad] for k in range(3)})
    out = tmp_path / "out"
    encode_shards(Work(list_shards(source), out), NumpyEncoder(), encode_config())
    note_work(out, 10)
    for number in range(3):
        os.utime(out / f"00/{number:05d}.json", (1000 + 600 * number,) * 2)
    said = describe(out).splitlines()
    assert said[0] == f"{out}: 3 of 10 shards done, 0 leased, 7 left"
    assert said[1:] == [
        "  0.0 images/s, about 70 minutes left",
        "  read 12, written 6",
        "  rejected(empty) 3",
        "  rejected(orphan) 3",
    ]


def test_all_done_but_not_finalized(tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_shards(Work(list_shards(three_shards(tmp_path / "in")), out), NumpyEncoder(), encode_config())
    said = describe(out)
    assert "3 of 3 shards done, 0 leased, 0 left" in said and "`ldm finalize` comes next" in said


def test_nothing_to_tell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run folder"):
        describe(tmp_path)


def test_workers_that_never_meet_need_no_address() -> None:
    environment = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_NODEID": "1",
    }
    found = place(environment, meets=False)
    assert (found.rank, found.world_size, found.local_rank, found.master_address) == (5, 8, 1, "")
    with pytest.raises(ConfigError, match="MASTER_ADDR is missing"):
        place(environment)
    with pytest.raises(ConfigError, match="ranks are 0 to size - 1"):
        place({**environment, "SLURM_PROCID": "9"}, meets=False)
