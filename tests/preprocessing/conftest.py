"""One small finished data set, made by the real worker and finalize, copied for each test that asks."""

import shutil
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from preprocessing.finalize import finalize_dataset
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.builders import tiny_config
from tests.preprocessing.builders import NumpyEncoder, three_shards
from tests.preprocessing.torch_stubs import StubTextEncoder


class Prepared:
    """A source, the data set made of it, and the config of both."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.out = root, root / "in", root / "out"
        self.config: RunConfig = tiny_config(
            root / "runs",
            encode={"source": str(self.source), "image_size": 16, "batch": 4, "validation_samples": 4},
        )

    def encode(self, encoder: NumpyEncoder | None = None) -> None:
        encode_shards(Work(list_shards(self.source), self.out), encoder or NumpyEncoder(), self.config.encode)

    def finalize(self) -> str:
        return finalize_dataset(self.config, self.out, self.source, text_encoder=StubTextEncoder()).digest


@pytest.fixture(scope="session")
def _prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    prepared = Prepared(tmp_path_factory.mktemp("prepared"))
    three_shards(prepared.source)
    prepared.encode()
    prepared.finalize()
    return prepared


@pytest.fixture
def prepared(_prepared_once: Prepared, tmp_path: Path) -> Prepared:
    """Return a private copy of the finished data set and its source."""
    shutil.copytree(_prepared_once.root, tmp_path, dirs_exist_ok=True)
    return Prepared(tmp_path)
