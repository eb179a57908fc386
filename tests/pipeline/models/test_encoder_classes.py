"""Every class of frozen model that a user may bring, tiny and random, against its own library's words."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from pipeline.errors import ConfigError
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder, train_tokenizer
from pipeline.models.text_pair import TextEncoderPair, load_text_encoder
from preprocessing.encoder import PairEncoder
from tests.builders import CAPTIONS, tiny_autoencoder, tiny_pictures
from tests.preprocessing.builders import encode_config
from tests.sdxl import TOKENS, clip_pair

IMAGES = torch.from_numpy(tiny_pictures(2, 64)).permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoders() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "AutoencoderTiny": AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ),
        "AutoencoderDC": AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="pixel_unshuffle",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 8),
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        "VQModel": VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
    }


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL", "VQModel"])
def test_any_autoencoder_of_diffusers(kind: str, tmp_path: Path) -> None:
    model = autoencoders()[kind].eval()
    model.save_pretrained(tmp_path / kind)
    frozen = FrozenAutoencoder.load(tmp_path / kind)
    with torch.no_grad():
        encoded = model.encode(IMAGES)
    expected = encoded.latent if kind == "AutoencoderDC" else getattr(encoded, "latents", None)
    if kind == "AsymmetricAutoencoderKL":
        expected = encoded.latent_dist.mean
    assert expected is not None
    moments = frozen.encode(IMAGES)
    mean, logvar = moments.chunk(2, dim=1)
    assert (frozen.channels, frozen.downsampling) == (expected.shape[1], 64 // expected.shape[2])
    assert torch.allclose(mean, expected, atol=1e-6)
    if kind != "AsymmetricAutoencoderKL":
        assert (logvar == -30).all()  # a point, not a distribution
    assert frozen.decode(mean).shape == IMAGES.shape
    assert frozen.scaling_factor == model.config["scaling_factor"]


def test_tiles_are_nearly_the_whole_and_are_refused_where_unknown(tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "kl")
    whole, tiled = FrozenAutoencoder.load(folder), FrozenAutoencoder.load(folder, tile_size=32)
    small = IMAGES[:, :, :32, :32]
    assert torch.equal(whole.encode(small), tiled.encode(small))  # one tile is the whole
    difference = (whole.encode(IMAGES) - tiled.encode(IMAGES)).abs()
    assert difference.max() > 0
    oracle = AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
    oracle.enable_tiling()
    oracle.tile_sample_min_size, oracle.tile_latent_min_size = 32, 16
    with torch.no_grad():
        assert torch.allclose(tiled.encode(IMAGES)[:, :4], oracle.encode(IMAGES).latent_dist.mean, atol=1e-6)
    with pytest.raises(ConfigError, match=r"encode.tile_size: 30 is not a multiple of 8"):
        FrozenAutoencoder.load(folder, tile_size=30)
    autoencoders()["VQModel"].save_pretrained(tmp_path / "vq")
    with pytest.raises(ConfigError, match=r"VQModel in .* knows no tiles"):
        FrozenAutoencoder.load(tmp_path / "vq", tile_size=32)
    autoencoders()["AutoencoderTiny"].save_pretrained(tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"of downsampling 8 and 4 channels alone; .*tiny has 4 and 4"):
        FrozenAutoencoder.load(tmp_path / "tiny", tile_size=32)


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC"])
def test_tiles_of_other_classes_are_diffusers_own(kind: str, tmp_path: Path) -> None:
    """Against the class itself, told its tiles by its own attributes; one tile is the whole."""
    model = autoencoders()[kind].eval()
    if kind == "AutoencoderTiny":  # as TAESD: diffusers' tiles know f8 alone
        blocks: dict[str, Any] = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
        blocks |= {f"num_{half}_blocks": (1,) * 4 for half in ("encoder", "decoder")}
        model = AutoencoderTiny(**blocks).eval()
    model.save_pretrained(tmp_path / kind)
    whole = FrozenAutoencoder.load(tmp_path / kind)
    side = 16 * whole.downsampling
    tiled = FrozenAutoencoder.load(tmp_path / kind, tile_size=side)
    assert torch.equal(whole.encode(IMAGES[:, :, :side, :side]), tiled.encode(IMAGES[:, :, :side, :side]))
    large = IMAGES.repeat(1, 1, 4, 4)
    if kind == "AutoencoderDC":
        model.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    else:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = side, 16
    with torch.no_grad():
        encoded = model.encode(large)
    expected = encoded.latent if kind == "AutoencoderDC" else encoded.latents
    mean = tiled.encode(large)[:, : tiled.channels]
    assert torch.allclose(mean, expected, atol=1e-6)
    assert (mean - whole.encode(large)[:, : tiled.channels]).abs().max() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_has_an_exact_twin(precision: Any, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "kl")
    exact, half = FrozenAutoencoder.load(folder), FrozenAutoencoder.load(folder, precision=precision)
    assert half.digest == exact.digest
    assert (
        0 < (half.encode(IMAGES) - exact.encode(IMAGES)).abs().max() < (0.2 if precision == "bf16" else 0.02)
    )
    assert torch.equal(half.in_fp32().encode(IMAGES), exact.encode(IMAGES)) and exact.in_fp32() is exact


def test_what_overflows_fp16_inside_the_model_is_stored_all_the_same(tmp_path: Path) -> None:
    """As SDXL's autoencoder: activations beyond 65504, results within."""
    folder = tiny_autoencoder(tmp_path / "kl")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    for name, factor in (("encoder.conv_in.weight", 1e6), ("encoder.conv_in.bias", 1e6)):
        weights[name] = weights[name] * factor
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    clip_folder = clip_pair(tmp_path)[0]
    text = FrozenTextEncoder.load(clip_folder)
    images, captions = tiny_pictures(2, 16), [("a red square",), ("a disc",)]
    fp32, fp16 = (
        PairEncoder(FrozenAutoencoder.load(folder, precision=p), text, encode_config(precision=p)).encode(
            images, captions
        )
        for p in ("fp32", "fp16")
    )
    assert fp32.problems == fp16.problems == (None, None)
    assert fp16.retried.all() and not fp32.retried.any()
    assert np.array_equal(fp16.arrays["latent"], fp32.arrays["latent"])
    assert fp16.remarks(0)[-1] == "fp32_retry"


def test_the_sdxl_pair(tmp_path: Path) -> None:
    """Against transformers as diffusers' SDXL pipeline calls it: hidden_states[-2] of both, text_embeds of the second."""
    first, second = clip_pair(tmp_path)
    encode = encode_config(text_encoder_2=str(second), text_layer="penultimate")
    pair = load_text_encoder(encode, first)
    assert isinstance(pair, TextEncoderPair)
    assert (pair.max_tokens, pair.width, pair.pooled_width) == (TOKENS, 16 + 24, 20)
    captions = ["a red square", "", "a green disc and a red cross and a green square and a red disc"]
    tokens, truncated = pair.tokenize(captions)
    assert truncated.tolist() == [False, False, True]
    states, pooled = pair.encode_pooled(tokens)
    expected, expected_pooled = [], None
    for number, folder in enumerate((first, second)):
        tokenizer = CLIPTokenizer.from_pretrained(
            tmp_path / ("tokenizer", "tokenizer_2")[number], local_files_only=True
        )
        model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval()
        ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        expected.append(output.hidden_states[-2])
        expected_pooled = output.text_embeds
    assert expected_pooled is not None and pooled is not None
    assert torch.allclose(states, torch.cat(expected, dim=-1), atol=1e-6)
    assert torch.allclose(pooled, expected_pooled, atol=1e-6)
    assert not torch.allclose(states[:, :, :16], FrozenTextEncoder.load(first).encode(tokens))
    assert pair.digest != load_text_encoder(encode_config(text_encoder_2=str(second)), first).digest


def test_the_pair_in_a_data_set(tmp_path: Path) -> None:
    first, second = clip_pair(tmp_path)
    encode = encode_config(text_encoder_2=str(second), text_layer="penultimate", max_captions=2)
    images = tiny_pictures(2, 16)
    pair = load_text_encoder(encode, first)
    autoencoder = FrozenAutoencoder.load(tiny_autoencoder(tmp_path / "kl"))
    encoded = PairEncoder(autoencoder, pair, encode).encode(
        images, [("a red disc", "a cross"), ("a square",)]
    )
    shapes = {name: array.shape[1:] for name, array in encoded.arrays.items()}
    members = {m.name: m.shape for m in PairEncoder(autoencoder, pair, encode).spec.members((16, 16))}
    assert shapes == members and members["text"] == (2, TOKENS, 40) and members["pooled"] == (2, 20)


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first, second = clip_pair(tmp_path)
    weights = load_file(second / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "projection" not in k}, second / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no text_projection.weight"):
        load_text_encoder(encode_config(text_encoder_2=str(second)), first)
    save_file(weights, second / "model.safetensors")
    train_tokenizer(["other words here", "and there"] * 3, 600, TOKENS).save_pretrained(
        tmp_path / "tokenizer_2"
    )
    with pytest.raises(ConfigError, match=r"vocabularies .* must read the same tokens"):
        load_text_encoder(encode_config(text_encoder_2=str(second)), first)


def test_both_layouts_of_a_projected_checkpoint(tmp_path: Path) -> None:
    _, second = clip_pair(tmp_path)
    tokens, _ = FrozenTextEncoder.load(second).tokenize(["a red disc"])
    states, pooled = FrozenTextEncoder.load(second).encode_projected(tokens)
    weights = load_file(second / "model.safetensors")
    bare = tmp_path / "bare/text_encoder_2"
    shutil.copytree(second, bare)
    shutil.copytree(tmp_path / "tokenizer_2", tmp_path / "bare/tokenizer_2")
    save_file(
        {name.removeprefix("text_model."): tensor for name, tensor in weights.items()},
        bare / "model.safetensors",
    )
    again, again_pooled = FrozenTextEncoder.load(bare).encode_projected(tokens)
    assert pooled is not None and again_pooled is not None
    assert torch.equal(states, again) and torch.allclose(pooled, again_pooled, atol=1e-6)
    assert FrozenTextEncoder.load(bare).digest == FrozenTextEncoder.load(second).digest


def word_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: place for place, word in enumerate([*special.values(), "<unk>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if "cls_token" in special:
        ends = [(special[name], vocabulary[special[name]]) for name in ("cls_token", "sep_token")]
        backend.post_processor = TemplateProcessing(
            single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_t5_encoder_with_its_mask(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = T5EncoderModel(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer = word_tokenizer(tmp_path, pad_token="<pad>", eos_token="</s>")
    with pytest.raises(ConfigError, match=r"set encode.max_tokens"):
        FrozenTextEncoder.load(tmp_path)
    frozen = FrozenTextEncoder.load(tmp_path, max_tokens=6)
    tokens, truncated = frozen.tokenize(["a red square", "a red a red a red a red"])
    assert tokens.shape == (2, 6) and truncated.tolist() == [False, True] and frozen.width == 16
    assert [(word.text, word.positions) for word in frozen.words("a red square")] == [
        ("a", [0]),
        ("red", [1]),
        ("square", [2]),
    ]
    assert sum(len(word.positions) for word in frozen.words("a red a red a red a red")) == 6, "a row"
    given = tokenizer(["a red square"], padding="max_length", max_length=6, return_tensors="pt")
    with torch.no_grad():
        expected = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    assert torch.equal(tokens[:1], given.input_ids) and torch.allclose(
        frozen.encode(tokens)[:1], expected, atol=1e-6
    )


def test_a_bert_without_its_pooler(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = word_tokenizer(tmp_path, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    frozen = FrozenTextEncoder.load(tmp_path, max_tokens=8)
    tokens, _ = frozen.tokenize(["a red square"])
    assert [word.positions for word in frozen.words("a red square")] == [[1], [2], [3]]
    mask = (tokens != tokenizer.pad_token_id).long()
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).last_hidden_state
    assert torch.allclose(frozen.encode(tokens), expected, atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
