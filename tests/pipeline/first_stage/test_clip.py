"""CLIP learns to match, resumes to the bit, and its loss and recalls are those of independent formulas."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPModel

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.first_stage.clip import clamp_temperature, train_clip
from pipeline.first_stage.contrastive import contrastive_loss, gathered_loss
from pipeline.first_stage.measure import retrieval
from pipeline.first_stage.stage import checkpoint_folder
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from tests.pipeline.first_stage.tiny import FailingPairs, InterruptedTrainingError, Pair

MakeConfig = Callable[..., RunConfig]
MakePaths = Callable[[str], RunPaths]


def weights(paths: RunPaths) -> dict[str, torch.Tensor]:
    """Return the trained tensors of both folders."""
    text = load_file(paths.text_encoder / "model.safetensors")
    return load_file(paths.clip / "model.safetensors") | {
        f"alone.{name}": tensor for name, tensor in text.items()
    }


def interrupt(config: RunConfig, pairs: list[Pair], paths: RunPaths, step: int) -> None:
    """Train until the process dies inside `step` (from 0)."""
    assert config.first_stage is not None
    with pytest.raises(InterruptedTrainingError):
        train_clip(config, FailingPairs(pairs, step * config.first_stage.clip.batch + 1), paths)
    assert not paths.clip.exists() and not paths.text_encoder.exists()


def test_it_learns_and_reports(make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths) -> None:
    paths = run_paths("run")
    config = make_config(
        clip={"steps": 150, "batch": 16, "learning_rate": 4e-3, "log_every": 50, "width": 32}
    )
    assert train_clip(config, pairs, paths) == paths.clip
    report = json.loads((paths.clip / "clip.json").read_text())
    assert report["last_loss"] < 0.5 * report["first_loss"]
    assert report["retrieval"]["train"]["pairs"] == 32 and report["retrieval"]["validation"]["pairs"] == 8
    assert report["retrieval"]["train"]["text_to_image_r1"] > 0.8
    assert (
        report["retrieval"]["train"]["text_to_image_r5"] >= report["retrieval"]["train"]["text_to_image_r1"]
    )
    assert [record["step"] for record in read_records(paths.metrics, "clip")] == [1, *range(5, 151, 5)]
    frozen = FrozenTextEncoder.load(paths.text_encoder)
    assert frozen.digest == report["text_encoder_digest"] == FrozenTextEncoder.load(paths.clip).digest
    assert frozen.tokenizer_digest == report["tokenizer_digest"]
    assert (paths.text_encoder / "clip.json").read_text() == (paths.clip / "clip.json").read_text()


def test_reported_recall_is_that_of_the_saved_model(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    train_clip(make_config(clip={"steps": 60}), pairs, paths)
    model = CLIPModel.from_pretrained(paths.clip).eval()
    frozen = FrozenTextEncoder.load(paths.text_encoder)
    held_out = [pair for pair in pairs if pair.split == "validation"]
    pixels = torch.stack([torch.from_numpy(pair.image) for pair in held_out])
    tokens, _ = frozen.tokenize([pair.caption for pair in held_out])
    with torch.no_grad():
        scores = model(input_ids=tokens, pixel_values=images_from_pixels(pixels)).logits_per_text
    right = [int(scores[row].argmax()) == row for row in range(8)]
    report = json.loads((paths.clip / "clip.json").read_text())
    assert report["retrieval"]["validation"]["text_to_image_r1"] == sum(right) / 8


def test_killed_and_resumed_equals_straight(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config, straight, killed = make_config(), run_paths("straight"), run_paths("killed")
    train_clip(config, pairs, straight)
    interrupt(config, pairs, killed, step=7)
    interrupt(config, pairs, killed, step=6)
    assert max(path.name for path in checkpoint_folder(killed, "clip").iterdir()) == "step-00000010"
    train_clip(config, pairs, killed)
    left, right = weights(straight), weights(killed)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert (straight.clip / "clip.json").read_text() == (killed.clip / "clip.json").read_text()
    assert not checkpoint_folder(killed, "clip").exists()


def test_finished_folders_return_at_once_and_a_missing_one_is_made_again(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config, paths = make_config(), run_paths("run")
    train_clip(config, pairs, paths)
    before = weights(paths)
    train_clip(config, FailingPairs(pairs, 0), paths)
    for file in paths.text_encoder.iterdir():
        file.unlink()
    paths.text_encoder.rmdir()
    train_clip(config, pairs, paths)
    after = weights(paths)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(ConfigError, match="learning_rate = "):
        train_clip(make_config(clip={"learning_rate": 0.5}), pairs, paths)


def test_captions_decide_the_tokenizer_and_held_out_ones_do_not(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config, first, second = make_config(clip={"steps": 1}), run_paths("first"), run_paths("second")
    train_clip(config, pairs, first)
    renamed = [
        Pair(
            pair.image,
            "zebra zebra zebra" if pair.split == "validation" else pair.caption,
            pair.key,
            pair.split,
        )
        for pair in pairs
    ]
    train_clip(config, renamed, second)
    digests = [FrozenTextEncoder.load(paths.text_encoder).tokenizer_digest for paths in (first, second)]
    assert digests[0] == digests[1]


def test_loss_is_clip_s_when_captions_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (functional.normalize(torch.randn(6, 4, generator=generator)) for _ in range(2))
    logits = 7.0 * text @ image.T
    rows = -(logits.diagonal() - logits.logsumexp(dim=1)).mean()
    columns = -(logits.diagonal() - logits.logsumexp(dim=0)).mean()
    loss = contrastive_loss(image, text, torch.tensor(7.0), torch.arange(6))
    torch.testing.assert_close(loss, (rows + columns) / 2)


def test_equal_captions_are_no_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (functional.normalize(torch.randn(5, 4, generator=generator)) for _ in range(2))
    ids = torch.tensor([3, 1, 3, 2, 4])
    logits = 7.0 * text @ image.T
    total = torch.tensor(0.0)
    for row in range(5):
        kept = [other for other in range(5) if other == row or ids[other] != ids[row]]
        total = total - logits[row, row] + logits[row, kept].logsumexp(0)
        total = total - logits[row, row] + logits[kept, row].logsumexp(0)
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(7.0), ids), total / 10)
    everything_equal = contrastive_loss(image, text, torch.tensor(7.0), torch.zeros(5, dtype=torch.int64))
    assert float(everything_equal) == 0.0


@dataclass(frozen=True)
class OneOf:
    """What `gathered_loss` sees of accelerate in one of several processes."""

    process_index: int
    num_processes: int
    rows: list[torch.Tensor]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return all processes' rows: those of `rows` that our own are a part of."""
        share = len(own)
        mine = slice(self.process_index * share, (self.process_index + 1) * share)
        return next(rows for rows in self.rows if torch.allclose(rows[mine], own))


@pytest.mark.parametrize("processes", [2, 4])
def test_gathered_gradient_is_that_of_one_process(processes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 3, 1, 4, 5, 6])
    towers = [torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    leaves = [*towers, scale]

    def rows(part: slice) -> list[torch.Tensor]:
        both = zip((images, texts), towers, strict=True)
        return [functional.normalize(values[part] @ tower, dim=1) for values, tower in both]

    whole = rows(slice(None))
    loss = contrastive_loss(whole[0], whole[1], scale, ids)
    expected = torch.autograd.grad(loss, leaves)
    found = [torch.zeros_like(leaf) for leaf in leaves]
    for rank in range(processes):
        share = 8 // processes
        accelerator: Any = OneOf(rank, processes, [part.detach() for part in rows(slice(None))])
        own = rows(slice(rank * share, (rank + 1) * share))
        part_loss = gathered_loss(accelerator, own[0], own[1], scale, ids)
        assert float(part_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
        grads = torch.autograd.grad(part_loss * processes, leaves)
        found = [total + grad / processes for total, grad in zip(found, grads, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_temperature_stays_between_1_and_100() -> None:
    model: Any = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.tensor(9.0))
    clamp_temperature(model)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100.0)
    model.logit_scale.data.fill_(-1.0)
    clamp_temperature(model)
    assert float(model.logit_scale.detach().exp()) == 1.0


def test_recalls_by_hand() -> None:
    image = torch.eye(6)
    text = torch.eye(6)[[0, 1, 3, 2, 4, 5]]
    found = retrieval(image, text, torch.arange(6))
    assert found["pairs"] == 6
    assert found["text_to_image_r1"] == found["image_to_text_r1"] == pytest.approx(4 / 6)
    assert found["text_to_image_r5"] == 1.0
    forgiving = retrieval(image, text, torch.tensor([0, 1, 2, 2, 4, 5]))
    assert forgiving["text_to_image_r1"] == forgiving["image_to_text_r1"] == 1.0


def test_wrong_sizes_are_named(make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths) -> None:
    paths = run_paths("run")
    with pytest.raises(ConfigError, match=r"batch 33 is more than the 32 training pairs"):
        train_clip(make_config(clip={"batch": 33}), pairs, paths)
    with pytest.raises(ConfigError, match="nothing to train"):
        train_clip(make_config().model_copy(update={"first_stage": None}), pairs, paths)
