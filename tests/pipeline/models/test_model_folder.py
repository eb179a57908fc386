"""Model folders: what is refused before a library reads them, and what their digest depends on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import model_digest, open_model_folder, tensor_digests

REMEDY = "set some.key or run `some verb`"
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config and two tensors."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"width": 3}))
    save_file(TENSORS, made / "weights.safetensors", metadata={"format": "pt"})
    return made


def digest(folder: Path) -> str:
    """Return the digest as the loaders take it."""
    found = open_model_folder(folder, "weights", REMEDY)
    return model_digest(found, found.config)


def split_into_shards(folder: Path) -> None:
    """Store the same tensors as two files and an index."""
    (folder / "weights.safetensors").unlink()
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        names[name] = f"weights-{number}.safetensors"
        save_file({name: tensor}, folder / names[name])
    (folder / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_digest_follows_values_not_storage(folder: Path) -> None:
    before = digest(folder)
    (folder / "config.json").write_text(
        json.dumps({"_diffusers_version": "9", "width": 3, "_name_or_path": "x"})
    )
    split_into_shards(folder)
    assert digest(folder) == before
    (folder / "config.json").write_text(json.dumps({"width": 4}))
    assert digest(folder) != before


@pytest.mark.parametrize(
    "changed",
    [
        {**TENSORS, "a.weight": TENSORS["a.weight"] + 1e-6},
        {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(3, 2)},
        {**TENSORS, "b.bias": TENSORS["b.bias"].half()},
        {"a.weight": TENSORS["a.weight"], "b.other": TENSORS["b.bias"]},
    ],
    ids=["value", "shape", "type", "name"],
)
def test_digest_sees_every_part_of_a_tensor(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    before = digest(folder)
    save_file(changed, folder / "weights.safetensors")
    assert digest(folder) != before


def test_renamed_and_dropped_tensors(folder: Path) -> None:
    found = open_model_folder(folder, "weights", REMEDY)
    kept = model_digest(found, found.config, lambda name: None if name == "b.bias" else "c")
    save_file({"c": TENSORS["a.weight"]}, folder / "weights.safetensors")
    assert digest(folder) == kept


def test_missing_folder_and_missing_weights_name_the_remedy(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such model folder; set some\.key"):
        open_model_folder(folder / "nowhere", "weights", REMEDY)
    with pytest.raises(
        ConfigError, match=r"no other\.safetensors \(pickled weights are never read\); set some"
    ):
        open_model_folder(folder, "other", REMEDY)
    with pytest.raises(ConfigError, match=r"no config\.json; name one of its subfolders: model"):
        open_model_folder(folder.parent, "weights", REMEDY)


@pytest.mark.parametrize("place", ["modeling.py", "deep/inside/code.py"])
def test_python_files_are_refused(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("raise SystemExit")
    with pytest.raises(DataError, match="Python code is refused"):
        open_model_folder(folder, "weights", REMEDY)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_map_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(DataError, match="auto_map names code to run"):
        open_model_folder(folder, "weights", REMEDY)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_object_is_damage(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"config\.json"):
        open_model_folder(folder, "weights", REMEDY)


@pytest.mark.parametrize("weight_map", [{"a": "../outside.safetensors"}, {"a": "gone.safetensors"}, {}])
def test_an_index_stays_inside_the_folder(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "weights.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match="not in the folder"):
        open_model_folder(folder, "weights", REMEDY)


def test_every_cut_of_a_weights_file_is_damage(folder: Path) -> None:
    path = folder / "weights.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"weights\.safetensors"):
            list(tensor_digests(path))
    path.write_bytes(b"\x10" + b"\x00" * 7 + b"[" + b" " * 14 + b"]")
    with pytest.raises(DataError, match="not safetensors' JSON"):
        list(tensor_digests(path))
