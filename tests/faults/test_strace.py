"""Every system call of a real program can be listed, killed at and made to fail, and the blow falls where it should."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.strace import (
    Call,
    call_at_bytes,
    failed_at,
    killed_at,
    parsed,
    require_strace,
    syscalls_of,
)

pytestmark = pytest.mark.faults

PRELUDE = """
import os, sys
folder, way = sys.argv[1:]
print("a write elsewhere, which counts as a write of the thread", flush=True)
def write(path, content):
    with open(path, "wb", buffering=0) as file:
        file.write(content[:30]); file.write(content[30:]); os.fsync(file.fileno())
"""
PROGRAM = (
    PRELUDE
    + """
os.chdir(folder)
if way == "whole":
    write("new.tmp", b"n" * 50)
    os.rename("new.tmp", "manifest.json")
else:
    write("manifest.json", b"n" * 50)
top = os.open(".", os.O_RDONLY)
os.fsync(top)
os.close(top)
"""
)
ABSOLUTE = PROGRAM.replace("os.chdir(folder)\n", "").replace('"new.tmp"', 'folder + "/new.tmp"')
ABSOLUTE = ABSOLUTE.replace('"manifest.json"', 'folder + "/manifest.json"').replace('"."', "folder")
OLD, NEW = b"o" * 60, b"n" * 50


@pytest.fixture(autouse=True)
def strace() -> None:
    require_strace()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fresh(tmp_path / "run folder")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "manifest.json").write_bytes(OLD)
    return folder


def program(folder: Path, way: str, source: str = ABSOLUTE) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", source, str(folder), way]


def test_calls_of_a_run_are_listed_in_order(folder: Path) -> None:
    calls = syscalls_of(program(folder, "whole"), folder)
    names = [
        re.sub("^(openat|renameat2?)$", lambda found: found[0].rstrip("at2"), call.name) for call in calls
    ]
    assert names == ["open", "write", "write", "fsync", "close", "rename", "open", "fsync", "close"]
    assert [call.result for call in calls if call.name == "write"] == [30, 20]
    assert {str(folder / "new.tmp"), str(folder / "manifest.json")} <= set(calls[5].paths)
    assert all(call.error is None for call in calls)
    assert (folder / "manifest.json").read_bytes() == NEW


def test_ordinals_count_the_calls_elsewhere_too(folder: Path) -> None:
    first_write = next(call for call in syscalls_of(program(folder, "whole"), folder) if call.name == "write")
    outcome = killed_at(program(fresh(folder), "whole"), first_write)
    assert first_write.ordinal == 2
    assert outcome.stdout.startswith("a write elsewhere")
    assert (folder / "new.tmp").read_bytes() == b""


@pytest.mark.parametrize(("way", "torn"), [("whole", 0), ("naive", 2)])
def test_sweep_over_every_call_tells_a_torn_write_from_a_whole_one(way: str, torn: int, folder: Path) -> None:
    """The naive way is torn from its open on until its second write: killed entering either of the writes."""
    calls = syscalls_of(program(folder, way), folder)
    assert len(calls) == (9 if way == "whole" else 8)
    seen = 0
    for call in calls:
        outcome = killed_at(program(fresh(folder), way), call)
        assert outcome.killed
        assert outcome.struck is not None
        assert (outcome.struck.name, outcome.struck.paths) == (call.name, call.paths)
        seen += (folder / "manifest.json").read_bytes() not in (OLD, NEW)
    assert seen == torn


def test_killed_call_has_no_effect(folder: Path) -> None:
    rename = next(
        call for call in syscalls_of(program(folder, "whole"), folder) if call.name.startswith("rename")
    )
    outcome = killed_at(program(fresh(folder), "whole"), rename)
    assert outcome.killed
    assert (folder / "manifest.json").read_bytes() == OLD
    assert (folder / "new.tmp").read_bytes() == NEW


@pytest.mark.parametrize(
    ("name", "error", "text"), [("fsync", "EIO", "Input/output"), ("write", "ENOSPC", "No space")]
)
def test_failed_call_returns_its_error_and_is_not_made(
    name: str, error: str, text: str, folder: Path
) -> None:
    call = [call for call in syscalls_of(program(folder, "whole"), folder) if call.name == name][-1]
    outcome = failed_at(program(fresh(folder), "whole"), call, error)
    assert outcome.exit_code == 1
    assert text in outcome.stderr
    assert outcome.struck is not None
    assert (outcome.struck.name, outcome.struck.error, outcome.struck.paths) == (name, error, call.paths)
    if name == "write":
        assert (folder / "new.tmp").read_bytes() == NEW[:30]


@pytest.mark.parametrize(("ever_after", "failures"), [(False, 1), (True, 3)])
def test_disk_that_stays_full(ever_after: bool, failures: int, folder: Path) -> None:
    """The program tries four times and tells its failures: the second alone, or all from the second on."""
    source = """
import os, sys
tries = os.open(sys.argv[1] + "/tries", os.O_WRONLY | os.O_CREAT)
failures = 0
for _ in range(4):
    try: os.write(tries, b"x")
    except OSError as error: failures += error.errno == 28
sys.exit(failures)
"""
    second = syscalls_of(program(folder, "whole", source), folder, names=["write"])[1]
    outcome = failed_at(program(fresh(folder), "whole", source), second, "ENOSPC", ever_after=ever_after)
    assert outcome.exit_code == failures
    assert (folder / "tries").stat().st_size == 4 - failures


def test_paths_relative_to_a_changed_folder_are_found_where_the_kernel_tells(folder: Path) -> None:
    """After a chdir, `openat` and open files still tell the folder; `rename` of two relative names cannot."""
    calls = syscalls_of(program(folder, "naive", PROGRAM), folder)
    names = " ".join(call.name.removesuffix("at") for call in calls)
    assert names == "open write write fsync close open fsync close"


def test_rust_library_is_cut_between_its_writes(tmp_path: Path) -> None:
    """safetensors writes from Rust, where no patch of Python reaches."""
    path = tmp_path / "out" / "w.safetensors"
    source = "import sys, numpy as np\nfrom safetensors.numpy import save_file\n"
    source += "save_file({'w': np.arange(5000.0)}, sys.argv[1])"
    argv = [sys.executable, "-c", source, str(path)]
    path.parent.mkdir()
    calls = syscalls_of(argv, path.parent)
    whole = path.read_bytes()
    assert sum(call.result or 0 for call in calls if call.name.startswith("write")) == len(whole) > 40_000
    path.unlink()
    call = call_at_bytes(calls, 20_000)
    outcome = killed_at(argv, call)
    assert outcome.killed
    assert outcome.struck is not None
    assert outcome.struck.touches(path.parent)
    (left,) = (
        path.parent.iterdir()
    )  # The library sets the size first: full length, and not a byte of it written.
    assert left.name != path.name
    assert left.read_bytes() == bytes(len(whole))
    with pytest.raises(ValueError, match="in all, never more"):
        call_at_bytes(calls, 1 << 20)


def test_call_that_never_comes_strikes_nothing(folder: Path) -> None:
    calls = syscalls_of(program(folder, "whole"), folder)
    far = Call(0, "fsync", 1 + sum(call.name == "fsync" for call in calls), (), None, None)
    outcome = killed_at(program(fresh(folder), "whole"), far)
    assert outcome.finished
    assert outcome.struck is None


def test_failing_program_is_not_listed(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with 3 undisturbed"):
        syscalls_of([sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"], folder)


def test_log_of_two_threads_is_put_together() -> None:
    log = """\
10  openat(AT_FDCWD</disk>, "a b.tmp", O_WRONLY|O_CREAT, 0666) = 3</disk/a b.tmp>
10  write(3</disk/a b.tmp>, ""..., 100 <unfinished ...>
11  write(4</disk/c>, ""..., 7) = -1 ENOSPC (No space left on device) (INJECTED)
10  <... write resumed>)              = 100
11  write(4</disk/c (deleted)>, ""..., 7) = 7
10  --- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED} ---
10  renameat2(AT_FDCWD</disk>, "a b.tmp", 5</out>, "x", 0) = ?
10  +++ killed by SIGKILL +++
11  +++ exited with 0 +++
"""
    assert parsed(log) == [
        Call(10, "openat", 1, ("/disk/a b.tmp",), 3, None),
        Call(10, "write", 1, ("/disk/a b.tmp",), 100, None),
        Call(11, "write", 1, ("/disk/c",), -1, "ENOSPC"),
        Call(11, "write", 2, ("/disk/c",), 7, None),
        Call(10, "renameat2", 1, ("/disk/a b.tmp", "/out/x", "/out"), None, None),
    ]
