"""Tokens and text states equal transformers' own, in both key layouts; the trained tokenizer is CLIP's kind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.config import ClipConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import (
    FrozenTextEncoder,
    build_clip,
    save_clip,
    text_encoder_digest,
    tokenizer_digest,
    train_tokenizer,
)

CAPTIONS = [
    "a red heart",
    "A red  square on white",
    "grinning face with smiling eyes",
    "crème brûlée, 2 cups!",
    "flag: Åland Islands",
    "日本 face's 😀",
    "",
    "one two three four five six seven eight nine ten eleven twelve",
]
SMALL = ClipConfig(
    width=16, vision_layers=1, text_layers=2, heads=2, patch=8, vocabulary=560, max_tokens=12, steps=1
)
VALUES = "import sys; from pipeline.models.text_encoder import train_tokenizer, tokenizer_digest; "


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer trained on the captions."""
    return train_tokenizer(CAPTIONS, 560, 12)


@pytest.fixture(scope="module")
def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a fresh CLIP."""
    torch.manual_seed(0)
    return build_clip(SMALL, 16, tokenizer).eval()


@pytest.fixture
def folders(clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of the whole CLIP and of its text tower."""
    save_clip(clip, tokenizer, tmp_path / "clip", tmp_path / "text_encoder")
    return tmp_path / "clip", tmp_path / "text_encoder"


def expected_states(clip: CLIPModel, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and states of CAPTIONS by transformers alone."""
    tokens = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return tokens, clip.text_model(input_ids=tokens).last_hidden_state


def test_tokens_and_states_are_transformers_own(
    clip: CLIPModel, tokenizer: CLIPTokenizer, folders: tuple[Path, Path]
) -> None:
    tokens, states = expected_states(clip, tokenizer)
    frozen = FrozenTextEncoder.load(folders[1])
    assert (frozen.max_tokens, frozen.width, frozen.pooled_width) == (12, 16, None)
    ours, truncated = frozen.tokenize(CAPTIONS)
    assert torch.equal(ours, tokens) and ours.dtype == torch.int64
    lengths = [len(row) for row in tokenizer(CAPTIONS).input_ids]
    assert truncated.tolist() == [length > 12 for length in lengths] and 0 < sum(truncated) < len(CAPTIONS)
    encoded = frozen.encode(ours)
    assert torch.equal(encoded, states) and encoded.dtype == torch.float32 and not encoded.requires_grad
    theirs = CLIPTextModel.from_pretrained(folders[1], local_files_only=True)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=tokens).last_hidden_state, states)


def test_a_caption_that_just_fits_is_not_truncated(folders: tuple[Path, Path]) -> None:
    frozen = FrozenTextEncoder.load(folders[1])
    digits = ["1 " * 10, "1 " * 11]
    tokens, truncated = frozen.tokenize(digits)
    assert truncated.tolist() == [False, True] and torch.equal(tokens[0], tokens[1])
    assert frozen.tokenize([])[0].shape == (0, 12)


def test_words_and_where_their_tokens_are(tokenizer: CLIPTokenizer, folders: tuple[Path, Path]) -> None:
    frozen = FrozenTextEncoder.load(folders[1])
    caption = " A red  square, xyzzy 1 2 3 4 5 6"
    tokens, words = frozen.tokenize([caption])[0][0].tolist(), frozen.words(caption)
    assert [word.text for word in words] == caption.split()
    places = [place for word in words for place in word.positions]
    assert places == list(range(1, 11)), "each token between start and end belongs to one word"
    for word in words[:3]:
        spelled = "".join(tokenizer.convert_ids_to_tokens([tokens[place] for place in word.positions]))
        assert spelled.replace("</w>", "") == word.text.lower()
    assert words[-1].positions == [], "what was cut has no token"
    assert frozen.words("") == []


def test_empty_caption_is_start_then_ends(tokenizer: CLIPTokenizer, folders: tuple[Path, Path]) -> None:
    tokens, truncated = FrozenTextEncoder.load(folders[1]).tokenize([""])
    end = len(tokenizer) - 1
    assert tokens.tolist() == [[end - 1] + [end] * 11] and truncated.tolist() == [False]


def test_vocabulary_is_laid_out_as_clip_s(tokenizer: CLIPTokenizer) -> None:
    names = [name for name, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    symbols = list(bytes_to_unicode().values())
    assert names[:256] == symbols
    assert names[256:512] == [symbol + "</w>" for symbol in symbols]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert names[512:-2] == [left + right for left, right in merges] and 10 < len(merges) <= 560 - 514
    assert tokenizer.model_max_length == 12 and tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("A red heart").input_ids, skip_special_tokens=True) == "a red heart"


def test_merges_come_from_frequent_pairs() -> None:
    merges = json.loads(train_tokenizer(["abab abab abab xy"], 520, 8).backend_tokenizer.to_str())["model"]
    assert merges["merges"] == [["a", "b"], ["a", "b</w>"], ["ab", "ab</w>"]]


def test_equal_captions_give_equal_tokenizers_in_any_process_and_order(tokenizer: CLIPTokenizer) -> None:
    words = [f"{a}{b}{c} {c}{a}" for a in "abcdef" for b in "ghijkl" for c in "mnop"]
    expected = tokenizer_digest(train_tokenizer(words, 700, 8))
    assert tokenizer_digest(train_tokenizer(words[::-1], 700, 8)) == expected
    code = VALUES + f"print(tokenizer_digest(train_tokenizer({words!r}, 700, 8)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert found.stdout.split()[-1] == expected
    assert tokenizer_digest(tokenizer) != expected


def test_both_loaders_give_the_same_tokens_from_either_form(
    tokenizer: CLIPTokenizer, folders: tuple[Path, Path]
) -> None:
    expected = tokenizer(CAPTIONS).input_ids
    only_old = folders[1].parent / "old"
    only_old.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folders[1] / name, only_old)
    for folder in (*folders, only_old):
        loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        assert loaded(CAPTIONS).input_ids == expected
        assert (loaded.model_max_length, loaded.pad_token_id) == (12, tokenizer.eos_token_id)
        assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    for folder in folders:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert loaded(CAPTIONS).input_ids == expected


def test_files_with_and_without_the_prefix_and_whole_clips_load_alike(
    clip: CLIPModel, tokenizer: CLIPTokenizer, folders: tuple[Path, Path]
) -> None:
    tokens, states = expected_states(clip, tokenizer)
    clip_folder, text_folder = folders
    stored = load_file(text_folder / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)
    bare = text_folder.parent / "bare"
    shutil.copytree(text_folder, bare)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    save_file(plain, bare / "model.safetensors", metadata={"format": "pt"})
    loaded = [FrozenTextEncoder.load(folder) for folder in (text_folder, bare, clip_folder)]
    assert all(torch.equal(encoder.encode(tokens), states) for encoder in loaded)
    assert len({encoder.digest for encoder in loaded}) == 1
    stored["text_model.final_layer_norm.bias"] += 1e-3
    save_file(stored, text_folder / "model.safetensors", metadata={"format": "pt"})
    assert text_encoder_digest(text_folder) != loaded[0].digest


def test_bf16_has_the_same_digest_and_nearly_the_same_states(folders: tuple[Path, Path]) -> None:
    fp32, bf16 = (FrozenTextEncoder.load(folders[1], precision=kind) for kind in ("fp32", "bf16"))
    tokens, _ = fp32.tokenize(CAPTIONS)
    difference = (fp32.encode(tokens) - bf16.encode(tokens)).abs().max()
    assert bf16.digest == fp32.digest and bf16.encode(tokens).dtype == torch.float32
    assert 0.0 < difference < 0.2


def test_whole_clip_round_trip_pools_at_the_end_token(
    clip: CLIPModel, tokenizer: CLIPTokenizer, folders: tuple[Path, Path]
) -> None:
    tokens, states = expected_states(clip, tokenizer)
    reloaded = CLIPModel.from_pretrained(folders[0], local_files_only=True).eval()
    stored = reloaded.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in clip.state_dict().items())
    with torch.no_grad():
        pooled = reloaded.text_model(input_ids=tokens).pooler_output
    end = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
    assert torch.equal(pooled, states[torch.arange(len(tokens)), end]) and len(set(end.tolist())) > 2
    assert reloaded.config.text_config.eos_token_id == tokenizer.eos_token_id, "2 means a legacy rule"
    assert reloaded.config.projection_dim == reloaded.config.text_config.hidden_size == 16


def test_the_saved_image_processor_is_our_range(folders: tuple[Path, Path]) -> None:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = json.loads((folders[0] / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 16, "width": 16}
    processor = CLIPImageProcessor.from_pretrained(folders[0], local_files_only=True)
    theirs = processor(images=pixels.numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, images_from_pixels(pixels[None]), atol=1e-5, rtol=0.0)


def test_a_diffusers_pipeline_uses_and_stores_it(
    clip: CLIPModel, tokenizer: CLIPTokenizer, folders: tuple[Path, Path]
) -> None:
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel.from_pretrained(folders[1]),
        tokenizer=CLIPTokenizer.from_pretrained(folders[1]),
        unet=UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    root = folders[0].parent / "pipeline"
    pipeline.save_pretrained(root)
    reloaded = StableDiffusionPipeline.from_pretrained(root, local_files_only=True, safety_checker=None)
    states, null = reloaded.encode_prompt(CAPTIONS[:3], "cpu", 1, True)
    frozen = FrozenTextEncoder.load(root / "text_encoder")
    assert torch.equal(states, frozen.encode(frozen.tokenize(CAPTIONS[:3])[0]))
    assert torch.equal(null[:1], frozen.encode(frozen.tokenize([""])[0]))
    assert frozen.digest == FrozenTextEncoder.load(folders[1]).digest
    with pytest.raises(ConfigError, match=r"name one of its subfolders: .*text_encoder"):
        FrozenTextEncoder.load(root)


@pytest.mark.parametrize("change", ["drop", "twice"])
def test_weights_that_would_be_filled_with_random_numbers_are_refused(
    folders: tuple[Path, Path], change: str
) -> None:
    stored = load_file(folders[1] / "model.safetensors")
    if change == "drop":
        del stored["text_model.final_layer_norm.bias"]
    else:
        stored = {f"text_model.{name}": tensor for name, tensor in stored.items()}
    save_file(stored, folders[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="do not fit together, first at"):
        FrozenTextEncoder.load(folders[1])


def test_other_and_coded_folders_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"encode\.text_encoder .*ldm train-clip CONFIG"):
        FrozenTextEncoder.load(folders[1] / "nowhere")
    (folders[0] / "modeling_clip.py").write_text("")
    with pytest.raises(DataError, match="Python code is refused"):
        FrozenTextEncoder.load(folders[0])
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ConfigError, match="model_type is 'vit', which is no text encoder"):
        FrozenTextEncoder.load(folders[1])


def test_another_model_s_tokenizer_or_none_is_refused(folders: tuple[Path, Path]) -> None:
    big = train_tokenizer([f"word{a}{b} word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"], 700, 12)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folders[1] / name).unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json or vocab\.json"):
        FrozenTextEncoder.load(folders[1])
    big.save_pretrained(folders[1])
    with pytest.raises(DataError, match="they belong to different models"):
        FrozenTextEncoder.load(folders[1])
    (folders[1] / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        FrozenTextEncoder.load(folders[1])


def test_sizes_that_do_not_fit_are_named(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match="vocabulary 513 and max_tokens 12; at least 514"):
        train_tokenizer(CAPTIONS, 513, 12)
    with pytest.raises(ConfigError, match=r"patch 8 does not divide encode\.image_size 20"):
        build_clip(SMALL, 20, tokenizer)
