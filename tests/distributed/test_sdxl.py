"""SDXL from pictures to pictures: encoded with the pair, trained by two gloo processes, painted, exported, begun anew.

One start of processes trains at every ZeRO stage, stops and resumes, trains on tokens, and looks midway.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from pipeline.config import SampleConfig, WarmStartConfig
from pipeline.config_file import load_config
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.diffusion.posterior import sample_posterior, scale_latents
from pipeline.diffusion.schedule import Schedule
from pipeline.export import export_pipeline
from pipeline.generate import Generator
from pipeline.import_pipeline import import_run
from pipeline.latents.reader import LatentDataset
from pipeline.models.text_pair import load_text_encoder
from pipeline.models.unet import UNet
from pipeline.tracking import read_records
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint, read_manifest
from tests.builders import CAPTIONS
from tests.distributed.cases import STEPS, make_config, paths_of
from tests.distributed.starter import Orders, start
from tests.sdxl import MODEL, POOLED, TOKENS, WIDTHS, encode_pictures, encoders, write_pictures

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
FP16_ROUNDING = 2.0**-11
STREAM = ("step", "loss", "grad_norm")
PROMPTS = ["a red square", "a green cross"]


@dataclass(frozen=True)
class Trained:
    """The folder of all runs, their common sections, and how each ended, by rank."""

    root: Path
    sections: dict[str, Any]
    ended: dict[str, list[Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    root = tmp_path_factory.mktemp("sdxl")
    write_pictures(root, 28)
    encode = encoders(root)
    sections: dict[str, Any] = {"encode": encode, "model": MODEL, "objective": {"caption_dropout": 0.5}}
    for text in ("embeddings", "tokens"):
        config = {"encode": encode | {"text": text}, "model": MODEL, "data": {"dataset": text}}
        encode_pictures(make_config(root, text, **config))
    stored = sections | {"data": {"dataset": "embeddings"}}
    tokens = sections | {"data": {"dataset": "tokens"}, "encode": encode | {"text": "tokens"}}
    looking = {"sample": {"every": 2, "steps": 2, "prompts": PROMPTS}, "evaluate": {"every": 2}}
    orders: dict[str, dict[str, Any]] = {"tokens": tokens, "looking": stored | looking}
    for stage in STAGES:
        engine = {"zero_stage": stage}
        orders[f"zero{stage}"] = {"engine": engine, **stored}
        orders[f"begun{stage}"] = {"name": f"cut{stage}", "engine": engine, **stored, "train": {"steps": 3}}
        orders[f"cut{stage}"] = {"attempt": "a2", "engine": engine, **stored}
    named: Orders = {case: ("run_counted", {"name": case, **order}) for case, order in orders.items()}
    yield Trained(root, stored, start("tests.distributed.cases_sdxl", root, 2, named))


def records(trained: Trained, name: str) -> list[dict[str, Any]]:
    found = read_records(paths_of(trained.root, name).metrics, "train")
    return [{key: record[key] for key in STREAM} for record in found if "loss" in record]


def test_the_data_set_has_pooled_text_and_the_sizes_of_every_picture(trained: Trained) -> None:
    dataset = LatentDataset(trained.root / "embeddings")
    assert (dataset.spec.text_width, dataset.spec.pooled_width, dataset.spec.text_tokens) == (
        sum(WIDTHS),
        POOLED,
        TOKENS,
    )
    sizes = {
        (r["original_height"], r["original_width"], *r["crop"])
        for r in (dataset.read(index).record for index in range(len(dataset)))
    }
    assert len(sizes) > 12, sizes


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(trained: Trained, stage: int) -> None:
    digests = [
        read_manifest(newest_checkpoint(paths_of(trained.root, f"{name}{stage}").checkpoints))["files"]
        for name in ("zero", "cut")
    ]
    assert [rank["step"] for rank in trained.ended[f"begun{stage}"]] == [3, 3]
    assert digests[0] == digests[1]
    assert records(trained, f"cut{stage}") == records(trained, f"zero{stage}")
    assert len(records(trained, f"zero{stage}")) == STEPS


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_trains_alike(trained: Trained, stage: int) -> None:
    for ours, plain in zip(records(trained, f"zero{stage}"), records(trained, "zero0"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


def plain_first_step(trained: Trained) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the first step by nothing but torch, each condition taken from the stored sample."""
    config = make_config(trained.root, "plain", **trained.sections, engine={"micro_batch": 8})
    dataset = LatentDataset(trained.root / "embeddings")
    loader = LatentLoader(
        dataset,
        seed=0,
        engine=config.engine,
        objective=config.objective,
        data=config.data,
        rank=0,
        world_size=1,
    )
    (batch,) = next(iter(loader.steps(0)))
    assert 0 < int(batch.dropped.sum()) < batch.size
    torch.manual_seed(0)
    network, schedule = UNet(config.model), Schedule.from_config(config.objective)
    spec = dataset.spec
    z0 = scale_latents(
        sample_posterior(batch.moments, batch.posterior_noise), spec.scaling_factor, spec.shift_factor
    )
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in schedule.alpha_sigma(batch.timesteps))
    predicted = network(alpha * z0 + sigma * batch.noise, batch.timesteps, *plain_conditions(dataset, batch))
    loss = (predicted - batch.noise).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def plain_conditions(dataset: LatentDataset, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor]:
    """SDXL section 2.2, from the json: (original h, w), (top, left) of the crop after resizing, (target h, w)."""
    null, texts, pooleds, sizes = dataset.null_text(), [], [], []
    for index, dropped in zip(batch.indices.tolist(), batch.dropped.tolist(), strict=True):
        sample = dataset.read(index)
        texts.append((null["text"] if dropped else sample.arrays["text"])[0])
        pooleds.append((null["pooled"] if dropped else sample.arrays["pooled"])[0])
        top, left, height, width = sample.record["crop"]
        original = [sample.record["original_height"], sample.record["original_width"]]
        sizes.append([*original, top * 16 / height, left * 16 / width, 16, 16])
    return (
        torch.from_numpy(np.stack(texts)).float(),
        torch.from_numpy(np.stack(pooleds)).float(),
        torch.tensor(sizes),
    )


def test_the_first_step_is_plain_torch_on_what_the_samples_say(trained: Trained) -> None:
    loss, gradients = plain_first_step(trained)
    first = records(trained, "zero0")[0]
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    inner = gradients["add_embedding.linear_1.weight"]
    assert inner[:, :POOLED].norm() > 0 and inner[:, POOLED:].norm() > 0


def test_tokens_train_as_stored_states_to_fp16_rounding(trained: Trained) -> None:
    """Both towers run in the step; states and pooled text of dropped captions are of the same empty caption."""
    assert [rank["loads"]["text"] for rank in trained.ended["tokens"]] == [2, 2], "the pair, on each rank"
    for ours, stored in zip(records(trained, "tokens"), records(trained, "zero1"), strict=True):
        assert ours["loss"] == pytest.approx(stored["loss"], rel=FP16_ROUNDING)
    assert records(trained, "tokens") != records(trained, "zero1")


def test_looking_midway_measures_paints_and_changes_nothing(trained: Trained) -> None:
    paths = paths_of(trained.root, "looking")
    assert records(trained, "looking") == records(trained, "zero1")
    said = [
        record for record in read_records(paths.metrics, "train") if any("val_loss" in key for key in record)
    ]
    assert said and 0.0 < said[-1]["val_loss_raw"] < 10.0
    grids = sorted(path.name for path in paths.samples.glob("*.json"))
    assert grids == [f"step-{step:08d}.json" for step in (2, 4, 6)]
    for step in (2, 4, 6):
        assert json.loads((paths.samples / f"step-{step:08d}.json").read_text())["step"] == step
    loads = [rank["loads"] for rank in trained.ended["looking"]]
    assert loads == [{"autoencoder": 1, "text": 2}] * 2, "once a run, however many grids"


@pytest.fixture(scope="module")
def exported(trained: Trained) -> tuple[Generator, Path]:
    paths = paths_of(trained.root, "zero1")
    config = load_config(paths.config).model_copy(update={"sample": SAMPLE})
    return Generator.load(paths, "ema", "cpu"), export_pipeline(paths, config)


SAMPLE = SampleConfig(sampler="ddim", steps=4, guidance_scale=3.0)


@pytest.mark.parametrize(
    "changed", [{}, {"negative_prompt": "a red disc"}, {"guidance_rescale": 0.7}, {"guidance_scale": 1.0}]
)
def test_stock_diffusers_paints_our_pictures_with_the_exported_folder(
    exported: tuple[Generator, Path], changed: dict[str, Any]
) -> None:
    generator, folder = exported
    sample = SAMPLE.model_copy(update=changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    noise = generator.noise(range(2), seed=0)
    ours = generator.images(PROMPTS, noise, sample)
    negative = [sample.negative_prompt] * 2 if sample.negative_prompt else None
    theirs = stock(
        PROMPTS,
        negative_prompt=negative,
        latents=noise,
        num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        guidance_rescale=sample.guidance_rescale,
        height=16,
        width=16,
        output_type="np",
    ).images
    difference = np.abs(np.clip(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5, 0.0, 1.0) - theirs).max()
    assert difference < 1e-4
    assert theirs.std() > 0.05 and np.mean((theirs <= 0) | (theirs >= 1)) < 0.5, "the pictures could not tell"


def test_the_sizes_and_the_pooled_text_change_the_picture(
    exported: tuple[Generator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the comparison above says nothing of them."""
    generator, _ = exported
    text, noise = generator.text(PROMPTS), generator.noise(range(2), seed=0)
    plain = generator.denoise(noise, text, SAMPLE)
    for changed in (text.pooled_BP.flip(0), text.pooled_BP * 0):  # type: ignore[union-attr]
        other = generator.denoise(noise, type(text)(text.text_BLD, changed), SAMPLE)
        assert (plain - other).abs().max() > 1e-4
    monkeypatch.setattr(type(generator.autoencoder), "downsampling", 32, raising=False)
    generator.autoencoder.__dict__.pop("downsampling", None)
    assert (plain - generator.denoise(noise, text, SAMPLE)).abs().max() > 1e-4


def test_the_exported_folder_says_what_it_was_trained_with(exported: tuple[Generator, Path]) -> None:
    generator, folder = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False
    encode = make_config(
        folder,
        "again",
        encode={
            "text_encoder_2": str(folder / "text_encoder_2"),
            "text_layer": "penultimate",
        },
    ).encode
    pair = load_text_encoder(encode, folder / "text_encoder")
    assert pair.digest == generator.text_encoder.digest
    assert pair.tokenizer_digest == generator.text_encoder.tokenizer_digest
    ours, theirs = (
        words.encode_pooled(words.tokenize(CAPTIONS)[0]) for words in (pair, generator.text_encoder)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def test_a_run_begins_with_the_exported_folder(trained: Trained, exported: tuple[Generator, Path]) -> None:
    """`ldm import` finds shape, both encoders and the layer; training goes on from those weights on both ranks."""
    _, folder = exported
    wanted = WarmStartConfig(source=str(folder))
    base = make_config(trained.root, "next", data={"dataset": "embeddings"}, train={"steps": 1})
    said = import_run(wanted, base, paths_of(trained.root, "next"))
    config = load_config(paths_of(trained.root, "next").config)
    assert config.model.addition_embed_type == "text_time"
    assert config.encode.text_layer == "penultimate"
    assert config.encode.text_encoder_2 == str(folder / "text_encoder_2")
    assert f"encode.text_encoder_2: {folder}/text_encoder_2" in said
    tree = json.loads(config.model_dump_json())
    tree["optimizer"]["learning_rate"] = 1e-7
    sections = {name: tree[name] for name in ("encode", "model", "warm_start", "optimizer", "train")}
    order = {"name": "next", "data": {"dataset": "embeddings"}, **sections}
    answers = start("tests.distributed.cases_sdxl", trained.root, 2, {"next": ("run_counted", order)})["next"]
    assert [rank["step"] for rank in answers] == [1, 1], answers
    begun = load_weights(newest_checkpoint(paths_of(trained.root, "next").checkpoints), "raw", verified=True)
    source = load_weights(
        newest_checkpoint(paths_of(trained.root, "zero1").checkpoints), "ema", verified=True
    )
    assert begun.keys() == source.keys()
    for name, weight in source.items():
        torch.testing.assert_close(begun[name], weight, rtol=0, atol=2e-7)
