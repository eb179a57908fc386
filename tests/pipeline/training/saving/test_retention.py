"""Retention: the last few, every so many steps for good, and nothing after the one just committed."""

from pathlib import Path

from pipeline.training.saving.manifest import committed
from pipeline.training.saving.retention import Retention, remove_old


def test_the_last_and_every_so_many_stay() -> None:
    steps = list(range(10, 130, 10))
    assert Retention(2).surplus(steps) == list(range(10, 110, 10))
    assert Retention(3, every_steps=50).surplus(steps) == [10, 20, 30, 40, 60, 70, 80, 90]
    assert Retention(2).surplus([10, 20]) == [] and Retention(2).surplus([]) == []


def test_a_later_branch_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    remove_old(tmp_path / "step-00000004", Retention(2))
    assert [path.name[-1] for path in committed(tmp_path)] == ["3", "4", "9"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
