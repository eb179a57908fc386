"""The exported folder, read back by stock diffusers, paints what our Generator paints."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from pipeline.config import ObjectiveConfig, SampleConfig
from pipeline.config.outcome import SamplerKind, sampler_problem
from pipeline.diffusion.samplers import KINDS, make_sampler
from pipeline.errors import ConfigError, DataError
from pipeline.export import Parts, copy_text_encoder, copy_tokenizer, export_pipeline, write_pipeline
from pipeline.generate import Generator
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.models.unet import UNet
from tests.builders import TinyRun, tiny_autoencoder, tiny_clip, tiny_config, tiny_run

PROMPTS = [
    "a red square",
    "a green cross",
    "something quite else, and much longer than the text encoder takes",
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("export"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    return whole_run


def stock_pipeline(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction": "epsilon"},
    "v": {"prediction": "v_prediction"},
    "x0": {"prediction": "x0", "schedule": "cosine"},
    "v to pure noise": {"prediction": "v_prediction", "zero_terminal_snr": True},
    "flow": {"prediction": "flow"},
    "shifted flow": {"prediction": "flow", "flow_shift": 2.0, "flow_shift_side": 4},
}
PAIRS = [
    (name, kind)
    for name, objective in OBJECTIVES.items()
    for kind in KINDS
    if not sampler_problem(kind, ObjectiveConfig.model_validate(objective))
]


@pytest.fixture(scope="module")
def stock(whole_run: TinyRun) -> Any:
    """The exported folder as stock diffusers reads it, once: objectives and samplers differ in the scheduler only."""
    with pytest.MonkeyPatch.context() as patch:
        whole_run.pretend_checkpoint(patch)
        return stock_pipeline(export_pipeline(whole_run.paths, whole_run.config))


@pytest.mark.parametrize(("objective", "sampler"), PAIRS)
def test_stock_diffusers_paints_the_same_picture(
    run: TinyRun,
    stock: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    sampler: SamplerKind,
) -> None:
    """Every sampler that an objective can be sampled with, its scheduler read back from what the export writes."""
    trained = run.with_config(objective=OBJECTIVES[objective])
    trained.pretend_checkpoint(monkeypatch)
    made: Any = make_sampler(sampler, trained.config.objective, trained.config.model.sample_size**2)
    made.save_config(tmp_path)
    stock.scheduler = type(made).from_pretrained(tmp_path, local_files_only=True)
    sample = SampleConfig(sampler=sampler, steps=6, guidance_scale=3.0)
    ours, theirs = both_paint(Generator.load(run.paths, "ema", "cpu"), stock, sample)
    assert theirs.shape == ours.shape == (3, 16, 16, 3)
    assert np.abs(theirs - ours).max() < 1e-4
    assert theirs.std() > 0.05 and np.mean((theirs <= 0) | (theirs >= 1)) < 0.5, "the pictures could not tell"


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_the_exported_folder_as_a_whole_paints_the_same_picture(run: TinyRun, sampler: SamplerKind) -> None:
    sample = SampleConfig(sampler=sampler, steps=6, guidance_scale=3.0)
    folder = export_pipeline(run.paths, run.config.model_copy(update={"sample": sample}))
    ours, theirs = both_paint(Generator.load(run.paths, "ema", "cpu"), stock_pipeline(folder), sample)
    assert np.abs(theirs - ours).max() < 1e-4


@pytest.mark.parametrize(
    "changed", [{"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"negative_prompt": "a"}]
)
def test_guidance_is_stock_diffusers(run: TinyRun, stock: Any, changed: dict[str, Any]) -> None:
    stock.scheduler = make_sampler("ddim", run.config.objective)
    generator = Generator.load(run.paths, "ema", "cpu")
    plain = SampleConfig(sampler="ddim", steps=6, guidance_scale=3.0)
    ours, theirs = both_paint(generator, stock, plain.model_copy(update=changed))
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(ours - both_paint(generator, stock, plain)[0]).max() > 1e-3


def both_paint(generator: Generator, stock: Any, sample: SampleConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return what our Generator and the stock pipeline paint of the same noise and generators, in [0, 1]."""
    numbers = range(len(PROMPTS))
    noise = generator.noise(numbers, seed=0)
    ours = generator.images(PROMPTS, noise, sample, generator.generators(numbers, seed=0))
    theirs = stock(
        PROMPTS,
        negative_prompt=[sample.negative_prompt] * len(PROMPTS),
        latents=noise,
        generator=generator.generators(numbers, seed=0),
        num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        guidance_rescale=sample.guidance_rescale,
        output_type="np",
    ).images
    return np.clip(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5, 0.0, 1.0), theirs


def test_the_folder_is_whole_and_says_what_it_is(run: TinyRun) -> None:
    folder = export_pipeline(run.paths, run.config, weights="raw")
    assert folder == run.paths.export
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["requires_safety_checker"] is False
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["steps_offset"]) == ("DPMSolverMultistepScheduler", 1)
    assert (scheduler["beta_schedule"], scheduler["beta_end"]) == ("scaled_linear", 0.012)
    card = (folder / "README.md").read_text()
    for fact in (run.manifest.digest, "| optimizer steps | 7 |", "| weights | raw |", "Licence", "16 x 16"):
        assert fact in card
    assert FrozenAutoencoder.load(folder / "vae").digest == run.manifest.encoder["autoencoder"]
    words = FrozenTextEncoder.load(folder / "text_encoder")
    assert words.digest == run.manifest.encoder["text_encoder"]
    assert words.tokenizer_digest == run.manifest.encoder["tokenizer"]
    unet = stock_pipeline(folder).unet
    for name, tensor in run.weights["raw"].items():
        assert torch.equal(unet.state_dict()[name], tensor)
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_a_second_export_replaces_the_first_whole(run: TinyRun) -> None:
    (export_pipeline(run.paths, run.config) / "left over").write_text("x")
    folder = export_pipeline(run.paths, run.config)
    assert not (folder / "left over").exists()
    assert [path.name for path in run.paths.root.glob(".*")] == []


def test_a_failed_export_leaves_the_old_one(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_pipeline(run.paths, run.config)
    before = (folder / "README.md").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.export.copy_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(run.paths, run.config)
    assert (folder / "README.md").read_bytes() == before
    assert [path.name for path in run.paths.root.glob(".*")] == []


def test_an_exported_pipeline_feeds_the_next_run(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vae/ and text_encoder/ folders (tokenizer/ beside it) are encoders of another run."""
    folder = export_pipeline(run.paths, run.config)
    encode = {"autoencoder": str(folder / "vae"), "text_encoder": str(folder / "text_encoder")}
    run.with_config(encode=encode).pretend_checkpoint(monkeypatch)
    Generator.load(run.paths, "ema", "cpu")
    assert (export_pipeline(run.paths, run.config) / "tokenizer" / "vocab.json").is_file()


def test_of_a_whole_clip_only_the_text_tower_goes_over(run: TinyRun, tmp_path: Path) -> None:
    copy_text_encoder(run.paths.clip, tmp_path / "text_encoder")
    copy_tokenizer(run.paths.clip, tmp_path / "tokenizer")
    tower, whole = FrozenTextEncoder.load(tmp_path / "text_encoder"), FrozenTextEncoder.load(run.paths.clip)
    tokens, _ = whole.tokenize(PROMPTS)
    assert torch.equal(tower.tokenize(PROMPTS)[0], tokens)
    assert torch.equal(tower.encode(tokens), whole.encode(tokens))


def test_a_text_encoder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json or vocab\.json"):
        copy_tokenizer(tmp_path / "text", tmp_path / "out")


def test_a_weight_that_diffusers_does_not_know_is_an_error(run: TinyRun, tmp_path: Path) -> None:
    network = UNet(run.config.model)
    network.register_parameter("stranger", torch.nn.Parameter(torch.zeros(1)))
    sampler = make_sampler("ddim", run.config.objective)
    with pytest.raises(DataError, match=r"unet: stranger \[1\] is not in the model"):
        write_pipeline(tmp_path, Parts(network, sampler, run.paths.autoencoder, (run.paths.text_encoder,)))


SDXL_FIELDS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


@pytest.fixture(scope="module")
def sdxl_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Return random parts: text states of 32 + 32, the pooled text of the second encoder's projection, 32."""
    root = tmp_path_factory.mktemp("sdxl")
    tiny_autoencoder(root / "vae")
    tiny_clip(root / "first", root / "clip")
    config = tiny_config(root, model=SDXL_FIELDS)
    torch.manual_seed(5)
    sampler = make_sampler("euler", config.objective)
    return Parts(UNet(config.model).eval(), sampler, root / "vae", (root / "first", root / "clip"))


def test_sdxl_is_loaded_by_its_own_pipeline_and_paints(sdxl_parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    write_pipeline(folder, sdxl_parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    weights = stock.unet.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in sdxl_parts.network.state_dict().items())
    assert stock.config.force_zeros_for_empty_prompt is False, "the null text is the encoders' own"
    text, _, pooled, _ = stock.encode_prompt(PROMPTS[0], do_classifier_free_guidance=True)
    assert text.shape == (1, 16, 64) and pooled.shape == (1, 32)

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = {"original_size": (40, 30), "crops_coords_top_left": (2, 1), "target_size": (16, 16)}
    seen = []
    stock.unet.register_forward_hook(
        lambda _, inputs, options, out: seen.append((inputs, options, out)), with_kwargs=True
    )
    picture = stock(
        PROMPTS[0], latents=latents, num_inference_steps=2, height=16, width=16, output_type="np", **sizes
    )
    assert picture.images.shape == (1, 16, 16, 3) and np.isfinite(picture.images).all()
    (scaled, timestep), options, predicted = seen[0]
    added = options["added_cond_kwargs"]
    assert added["time_ids"][1].tolist() == [40, 30, 2, 1, 16, 16], "the order that training has to use"
    ours = sdxl_parts.network(
        scaled, timestep.expand(2), options["encoder_hidden_states"], added["text_embeds"], added["time_ids"]
    )
    torch.testing.assert_close(ours, predicted[0], rtol=1e-5, atol=1e-5)


def test_sdxl_read_at_the_last_layer_is_refused(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """StableDiffusionXLPipeline reads the penultimate layer of both: the folder would paint other pictures."""
    generator = Generator.load(run.paths, "ema", "cpu")
    encode = run.config.encode.model_copy(update={"text_encoder_2": str(run.paths.clip)})
    trained = replace(generator.trained, config=run.config.model_copy(update={"encode": encode}))
    generator.trained = trained
    monkeypatch.setattr(Generator, "load", lambda *_: generator)
    with pytest.raises(
        ConfigError, match="reads the penultimate layer for this model, this run the last one"
    ):
        export_pipeline(run.paths, run.config)
    assert not list(run.paths.root.glob(".*"))


def test_sdxl_needs_both_text_encoders_and_the_projection(sdxl_parts: Parts, tmp_path: Path) -> None:
    first, _ = sdxl_parts.text_encoders
    for number, (encoders, kind, said) in enumerate(
        [
            (
                (first,),
                ConfigError,
                "has 2 text encoders, this run 1; set encode.text_encoder_2 to its second",
            ),
            ((first, first), DataError, "has no text_projection.weight"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(kind, match=said):
            write_pipeline(folder, replace(sdxl_parts, text_encoders=encoders))
