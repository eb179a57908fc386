"""What the ranks do in the tests of SDXL: train, and count how often the frozen encoders are loaded on the way."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.training.world import World
from tests.distributed.cases import run


def run_counted(world: World, root: Path, **sections: Any) -> dict[str, Any]:
    """Train one run; `loads` counts what was read from the encoders' folders."""
    loads = {"autoencoder": 0, "text": 0}
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((FrozenAutoencoder, "autoencoder"), (FrozenTextEncoder, "text")):
            patch.setattr(kind, "load", classmethod(_counting(kind.load.__func__, loads, name)))  # type: ignore[attr-defined]
        return run(world, root, **sections) | {"loads": loads}


def _counting(load: Any, loads: dict[str, int], name: str) -> Any:
    def counted(kind: Any, *arguments: Any, **options: Any) -> Any:
        loads[name] += 1
        return load(kind, *arguments, **options)

    return counted
