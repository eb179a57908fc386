"""The start-up benchmark with a bare interpreter standing for `ldm`."""

import sys
from pathlib import Path

import pytest

from benchmarks import start_up
from benchmarks.harness import read_csv

STAND_IN = ["--rounds", "6", "--warmup", "0"]


def test_writes_the_comparisons_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = tmp_path / "seen.txt"
    write_arguments = f"import sys; open({str(seen)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    out_dir = tmp_path / "results"
    code = start_up.main(
        [*STAND_IN, "--out-dir", str(out_dir), "--ldm", sys.executable, "-c", write_arguments]
    )
    assert code == 0
    assert seen.read_text().splitlines() == (
        ["--help"] * 6 + ["check configs/small.yaml"] * 6 + ["plan configs/small.yaml"] * 6
    )
    assert sorted(path.suffix for path in out_dir.iterdir()) == [".csv"] * 3 + [".md"] + [".png"] * 3
    comparison = read_csv(out_dir / "start_up_check.csv")
    assert (comparison.side_a, comparison.side_b) == ("python -c pass", "ldm check configs/small.yaml")
    assert comparison.rounds == 6
    table = (out_dir / "start_up.md").read_text()
    assert table.count("\n") == 5
    assert capsys.readouterr().out == table
    assert str(tmp_path) not in table + (out_dir / "start_up_check.csv").read_text()


def test_bound_fails_the_run_for_a_slow_start(tmp_path: Path) -> None:
    slow = ["--ldm", sys.executable, "-c", "import time; time.sleep(0.1)"]
    with pytest.raises(SystemExit) as stopped:
        start_up.main([*STAND_IN, "--out-dir", str(tmp_path), "--at-most", "2", *slow])
    assert stopped.value.code == 1


def test_missing_command_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        start_up.main(["--out-dir", str(tmp_path), "--ldm", str(tmp_path / "no_such_ldm")])
    assert stopped.value.code == 2
    assert "no such command" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
