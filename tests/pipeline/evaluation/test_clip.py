"""CLIP's towers against transformers' own whole model and image processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.clip import PROCESSOR, ClipCaptions, ClipImages, unit
from pipeline.publish import write_json
from tests.builders import CAPTIONS, tiny_clip, tiny_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clip")
    tiny_clip(root / "text_encoder", root / "clip")
    return root / "clip"


def of_transformers(folder: Path, pictures: np.ndarray) -> np.ndarray:
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = (
            CLIPModel.from_pretrained(folder, local_files_only=True)
            .eval()
            .get_image_features(pixel_values=pixels)
        )
    return getattr(found, "pooler_output", found).numpy()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 40), (9, 12)])
def test_features_are_those_of_transformers(folder: Path, height: int, width: int) -> None:
    """At the tower's own size to rounding; resized ones as far as Pillow's and torch's bicubic agree."""
    pictures = np.ascontiguousarray(tiny_pictures(3, 48)[:, :height, :width])
    found, expected = ClipImages(folder, "a CLIP", CPU)(pictures), of_transformers(folder, pictures)
    assert found.shape == (3, 32) and found.dtype == np.float32
    tolerance = 1e-5 if height == width == 16 else 0.02
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_captions_are_those_of_transformers(folder: Path) -> None:
    tokens = CLIPTokenizer.from_pretrained(folder, local_files_only=True)(
        list(CAPTIONS), padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        found = model.get_text_features(input_ids=tokens["input_ids"])
    expected = getattr(found, "pooler_output", found).numpy()
    np.testing.assert_allclose(ClipCaptions(folder, CPU)(CAPTIONS), expected, atol=1e-5)


def test_a_tower_alone_is_a_feature_network_and_no_judge_of_captions(folder: Path, tmp_path: Path) -> None:
    whole = CLIPModel.from_pretrained(folder, local_files_only=True)
    config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    config.projection_dim = whole.config.projection_dim
    tower = CLIPVisionModelWithProjection(config)
    tower.vision_model.load_state_dict(whole.vision_model.state_dict())
    tower.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / PROCESSOR).write_bytes((folder / PROCESSOR).read_bytes())
    pictures = tiny_pictures(2)
    np.testing.assert_allclose(
        ClipImages(tmp_path / "tower", "", CPU)(pictures), ClipImages(folder, "", CPU)(pictures), atol=1e-6
    )
    with pytest.raises((ConfigError, DataError)):
        ClipCaptions(tmp_path / "tower", CPU)


def test_what_is_no_clip_or_holds_code_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        ClipImages(tmp_path / "nothing", "", CPU)
    with pytest.raises(ConfigError, match="no CLIP image tower"):
        ClipImages(folder.parent / "text_encoder", "", CPU)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / PROCESSOR).unlink()
    with pytest.raises(ConfigError, match="must be prepared as in the training"):
        ClipImages(copy, "", CPU)
    write_json(copy / PROCESSOR, {"size": {"shortest_edge": 16}, "image_mean": [0.5], "image_std": [0.5]})
    with pytest.raises(DataError, match="image_mean and image_std"):
        ClipImages(copy, "", CPU)
    (copy / "modeling.py").write_text("print('code')")
    with pytest.raises(DataError, match="Python code is refused"):
        ClipImages(copy, "", CPU)


def test_unit_features_have_length_one() -> None:
    assert np.linalg.norm(unit(np.array([[3.0, 4.0], [0.0, 2.0]])), axis=1) == pytest.approx([1.0, 1.0])
