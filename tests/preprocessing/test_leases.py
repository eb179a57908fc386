"""A lease is held by one worker, lives as long as its counter moves, and is taken over once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from preprocessing.leases import (
    LEASE_FOLDER,
    Leases,
    Owner,
    known_work,
    leased,
    note_work,
    owner_of,
    remove_leases,
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def foreign_lease(dataset: Path, stem: str, counter: int = 0) -> Path:
    """Write a lease as a worker on another machine does."""
    path = dataset / LEASE_FOLDER / f"{stem}.lease"
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {"host": "elsewhere", "pid": 1, "machine": "another", "started": "7"}
    path.write_text(f"{counter:012d} {json.dumps(owner)}\n")
    return path


def test_one_holds_it_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path, 60) as first, Leases(tmp_path, 60) as second:
        assert first.take("a") and not second.take("a") and second.take("b")
        assert {stem: owner.pid for stem, owner in leased(tmp_path).items() if owner} == {
            "a": os.getpid(),
            "b": os.getpid(),
        }
        first.release("a")
        assert second.take("a")
    assert leased(tmp_path) == {}


def test_a_counter_that_stands_still_on_our_clock_is_a_dead_worker(tmp_path: Path) -> None:
    clock = Clock()
    foreign_lease(tmp_path, "a")
    with Leases(tmp_path, 10, clock) as leases:
        assert not leases.take("a")
        clock.seconds = 9
        assert not leases.take("a")
        foreign_lease(tmp_path, "a", counter=1)
        clock.seconds = 18
        assert not leases.take("a"), "it moved: the time begins anew"
        clock.seconds = 27.9
        assert not leases.take("a")
        clock.seconds = 28
        assert leases.take("a")
        owner = leased(tmp_path)["a"]
        assert owner is not None and owner.pid == os.getpid()


def test_a_process_that_is_gone_from_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from preprocessing.leases import Leases\n"
        "assert Leases(Path(sys.argv[1]), 1e6).take('a'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert list(leased(tmp_path)) == ["a"]
    with Leases(tmp_path, 1e6) as leases:
        assert leases.take("a")


def test_only_one_takes_over(tmp_path: Path) -> None:
    clock = Clock()
    foreign_lease(tmp_path, "a")
    with Leases(tmp_path, 10, clock) as first, Leases(tmp_path, 10, clock) as second:
        assert not first.take("a") and not second.take("a")
        clock.seconds = 11
        assert [first.take("a"), second.take("a")] == [True, False]


def test_a_lease_that_was_taken_over_is_left_to_its_new_owner(tmp_path: Path) -> None:
    with Leases(tmp_path, 60) as leases:
        assert leases.take("a")
        path = tmp_path / LEASE_FOLDER / "a.lease"
        path.rename(path.with_name("aside"))
        foreign_lease(tmp_path, "a")
    owner = leased(tmp_path)["a"]
    assert owner is not None and owner.host == "elsewhere"


def test_beats_raise_the_counter_and_keep_the_name(tmp_path: Path) -> None:
    with Leases(tmp_path, 1e6) as leases:
        leases.take("a")
        leases._held["a"].beat()
        content = (tmp_path / LEASE_FOLDER / "a.lease").read_bytes()
    assert content.startswith(b"000000000001 ") and owner_of(content) == Owner.here()
    assert owner_of(b"") is None


def test_the_work_is_known_until_it_is_cleared(tmp_path: Path) -> None:
    assert known_work(tmp_path) is None
    note_work(tmp_path, 7)
    assert known_work(tmp_path) == 7
    remove_leases(tmp_path)
    assert known_work(tmp_path) is None
