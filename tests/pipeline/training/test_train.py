"""The small pure parts of the run; the run itself is in tests/distributed."""

from importlib import metadata
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.training.facts import changed_settings, versions
from pipeline.training.saving.interval import due
from pipeline.training.step import micro_batch_seed
from pipeline.training.train import _open_datasets
from pipeline.training.world import World
from tests.distributed.cases import make_config, paths_of
from tests.distributed.dataset import build_dataset


def test_due() -> None:
    assert [step for step in range(1, 13) if due(step, 4)] == [4, 8, 12]


def test_every_micro_batch_of_every_step_and_rank_has_its_own_seed() -> None:
    seeds = {
        micro_batch_seed(seed, step, micro_batch, rank)
        for seed in range(3)
        for step in range(12)
        for micro_batch in range(12)
        for rank in range(12)
    }
    assert len(seeds) == 3 * 12**3 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_seed_is_part_of_every_runs_definition() -> None:
    """`echo -n dropout/0/0/0/0 | sha256sum` begins 6b5873ebe031d83a: eight bytes, little end first, halved."""
    assert micro_batch_seed(0, 0, 0, 0) == 0x3AD831E0EB73586B >> 1


def test_changed_settings_are_dotted_with_both_values() -> None:
    before = {"train": {"steps": 10, "x": None}, "seed": 0, "gone": 1}
    after = {"train": {"steps": 20, "x": None}, "seed": 0, "new": [1]}
    assert list(changed_settings(before, after)) == [
        "gone: 1 -> None",
        "new: None -> [1]",
        "train.steps: 10 -> 20",
    ]
    assert list(changed_settings(before, before)) == []


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["torch"] == metadata.version("torch") and found["deepspeed"] == metadata.version("deepspeed")
    assert found["python"].startswith("3.")


def test_a_data_set_that_fits_is_opened_and_one_that_does_not_is_refused(tmp_path: Path) -> None:
    build_dataset(tmp_path / "latents", 30)
    paths = paths_of(tmp_path, "run")
    (dataset,) = _open_datasets(make_config(tmp_path, "run"), paths, World())
    assert len(dataset) == 30
    dataset.close()
    with pytest.raises(ConfigError, match=r"latents: model\.cross_attention_dim is 16, .*text width is 32"):
        _open_datasets(make_config(tmp_path, "run", model={"cross_attention_dim": 16}), paths, World())
