"""Fixtures around the tiny first stage of `tiny.py`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from tests.pipeline.first_stage.tiny import Pair, drawn_pairs, tiny_config


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other when the machine is busy."""
    monkeypatch.setenv("LDM_QUIET", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs() -> list[Pair]:
    """Return the 40 drawn pairs."""
    return drawn_pairs()


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Return a maker of tiny configs: `make_config(autoencoder={...}, clip={...}, seed=...)`."""
    return tiny_config


@pytest.fixture
def run_paths(tmp_path: Path) -> Callable[[str], RunPaths]:
    """Return a maker of run folders."""
    return lambda name: RunPaths(tmp_path / name)
