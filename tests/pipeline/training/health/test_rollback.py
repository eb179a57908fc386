"""Positions left out, ranges joined, and the checkpoints that step aside; the way back itself is in tests/distributed."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.training.health.rollback import bad_stretch, beyond, merged, put_aside, refuse_straddling
from pipeline.training.saving.manifest import committed


@pytest.mark.parametrize(
    ("position", "expected"), [(0, 0), (7, 7), (8, 16), (15, 16), (16, 16), (24, 40), (39, 40), (40, 40)]
)
def test_a_position_in_a_range_is_the_end_of_it(position: int, expected: int) -> None:
    assert beyond(position, [[32, 40], [8, 16], [24, 32]]) == expected


def test_a_step_that_would_reach_into_a_range_is_refused() -> None:
    refuse_straddling(0, [[8, 16]], 8)
    refuse_straddling(16, [[8, 16]], 8)
    with pytest.raises(ConfigError, match=r"global_batch: 6 does not divide the 2 positions .* \[8, 16\)"):
        refuse_straddling(6, [[8, 16]], 6)


@pytest.mark.parametrize(
    ("first", "resumed", "margin", "expected"),
    [(80, 40, 0, [80, 96]), (80, 40, 16, [64, 96]), (80, 72, 16, [72, 96])],
)
def test_the_stretch_begins_a_margin_early_but_not_before_the_checkpoint(
    first: int, resumed: int, margin: int, expected: list[int]
) -> None:
    assert bad_stretch(first, 96, resumed, margin) == expected


def test_ranges_that_touch_are_one() -> None:
    assert merged([[8, 16], [32, 40], [16, 24], [12, 20], [40, 40]]) == [[8, 24], [32, 40]]
    assert merged([]) == []


def folders(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_checkpoints_with_a_bad_step_step_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "diverged-step-00000030").mkdir()
    assert put_aside(tmp_path, 20)
    assert [path.name for path in committed(tmp_path)] == ["step-00000010"]
    assert folders(tmp_path) == ["diverged-step-00000020", "diverged-step-00000030", "step-00000010"]


def test_without_an_older_one_nothing_moves(tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    assert not put_aside(tmp_path, 10)
    assert folders(tmp_path) == ["step-00000010"]
