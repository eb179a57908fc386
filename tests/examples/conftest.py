"""The emoji example for its tests: the script as a module, the committed samples read with the stock tarfile."""

import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """build.py as a module; it lies outside every package."""
    spec = importlib.util.spec_from_file_location("emoji_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emoji_build"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def members() -> dict[str, list[tuple[str, bytes]]]:
    """Shard -> (member name, bytes) in tar order."""
    shards: dict[str, list[tuple[str, bytes]]] = {}
    for shard in ("00000", "00001", "00002"):
        with tarfile.open(FOLDER / f"{shard}.tar", "r:") as archive:
            files = [(member.name, archive.extractfile(member)) for member in archive]
            shards[shard] = [(name, file.read()) for name, file in files if file is not None]
    return shards


@pytest.fixture(scope="session")
def samples(members: dict[str, list[tuple[str, bytes]]]) -> dict[str, dict[str, bytes]]:
    """Key -> {extension: bytes}, over all shards."""
    found: dict[str, dict[str, bytes]] = {}
    for files in members.values():
        for name, payload in files:
            key, extension = name.split(".")
            assert extension not in found.setdefault(key, {}), f"{name} is there twice"
            found[key][extension] = payload
    return found


@pytest.fixture(scope="session")
def rows(samples: dict[str, dict[str, bytes]]) -> list[dict[str, Any]]:
    """The json members, in tar order."""
    return [json.loads(sample["json"]) for sample in samples.values()]
