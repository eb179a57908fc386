"""The benchmark of the tracker, a few steps of it: every server has its row, and the bound can fail."""

from pathlib import Path

import pytest

from benchmarks import tracking


def test_every_server_has_a_row_and_the_bound_is_held_against_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "WIDTH", 16)
    options = ["--rounds", "6", "--warmup", "0", "--settle-seconds", "0", "--out-dir", str(tmp_path)]
    assert tracking.main(options) == 0
    table = capsys.readouterr().out
    for name in tracking.SERVERS:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        steps, step_ms, blocked_ms, percent = (float(cell) for cell in row.split("|")[2:6])
        assert steps == 6 and 0 < blocked_ms < step_ms
        assert percent == pytest.approx(100 * blocked_ms / step_ms, rel=0.05)
    assert (tmp_path / "tracking.md").read_text() == table
    with pytest.raises(SystemExit) as left:
        tracking.main([*options, "--at-most", "0"])
    assert left.value.code == 1
