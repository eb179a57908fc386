"""A U-Net's diffusers folder, in both directions; the oracle is diffusers' own reader and writer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import UNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import (
    FIXED,
    diffusers_config,
    modern_name,
    open_unet_folder,
    save_unet,
    unet_config,
)
from tests.pipeline.models.unets import (
    REFINER,
    SD2,
    SD15,
    SDXL,
    SMALL,
    SMALL_SDXL,
    changed,
    random_inputs,
    reference_forward,
)

DISTILLED = changed(
    SMALL,
    layers_per_block=(1, 2, 1),
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(1, 1, (2,)),
    reverse_transformer_layers_per_block=((1, 2), 1, (1, 2)),
)
CONFIGS = {"conv": SMALL, "sdxl": SMALL_SDXL, "distilled": DISTILLED}
FILE = "diffusion_pytorch_model.safetensors"


def read_by_diffusers(folder: Path, **options: Any) -> Any:
    return UNet2DConditionModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, **options
    )


def written_by_diffusers(folder: Path, config: UNetConfig = SMALL, **options: Any) -> Any:
    torch.manual_seed(3)
    reference: Any = UNet2DConditionModel(**config.model_dump())
    reference.save_pretrained(folder, safe_serialization=True, **options)
    return reference


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name].float()) for name in ours
    )


def respell(folder: Path, changes: dict[str, str], drop: str = "") -> None:
    """Store the weights under other names: `changes` maps a part of a name to what it becomes."""
    tensors = {}
    for name, tensor in load_file(folder / FILE).items():
        for old, new in changes.items():
            name = name.replace(old, new)
        if name != drop:
            tensors[name] = tensor
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_diffusers_wrote_is_read(tmp_path: Path, config: UNetConfig) -> None:
    reference = written_by_diffusers(tmp_path, config)
    found = open_unet_folder(tmp_path)
    assert found.config == config
    network = found.load()
    assert same(network.state_dict(), reference.state_dict()) and network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    inputs = random_inputs(config, dtype=torch.float32)
    torch.testing.assert_close(network(**inputs), reference_forward(reference, inputs))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000], ids=["one_file", "shards"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_diffusers_reads_what_we_wrote(tmp_path: Path, config: UNetConfig, max_shard_bytes: int) -> None:
    torch.manual_seed(4)
    network = UNet(config)
    save_unet(network, tmp_path, max_shard_bytes=max_shard_bytes)
    reference, loading = read_by_diffusers(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert same(network.state_dict(), reference.state_dict())
    assert dict(reference.config).items() >= config.model_dump(mode="json").items()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_bytes == 10**9
    again = open_unet_folder(tmp_path)
    assert again.config == config and same(again.load().state_dict(), network.state_dict())
    assert not [path for path in tmp_path.iterdir() if path.suffix not in {".json", ".safetensors"}]


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "40KB"},
        {"max_shard_size": "40KB"},
        {"variant": "bf16"},
    ],
    ids=["fp16", "fp16_shards", "shards", "bf16"],
)
def test_variants_and_shards_are_read_as_float32(tmp_path: Path, options: dict[str, str]) -> None:
    torch.manual_seed(3)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.get("variant", ""), torch.float32)
    reference: Any = UNet2DConditionModel(**SMALL.model_dump()).to(dtype)
    reference.save_pretrained(tmp_path, safe_serialization=True, **options)
    weights = dict(open_unet_folder(tmp_path).weights())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert same(weights, reference.state_dict())


def test_half_precision_can_be_written(tmp_path: Path) -> None:
    network = UNet(SMALL)
    save_unet(network, tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.float16}
    assert same(network.half().float().state_dict(), read_by_diffusers(tmp_path).state_dict())
    assert same(dict(open_unet_folder(tmp_path).weights()), network.half().state_dict())


def test_a_pipeline_folder_gives_its_unet(tmp_path: Path) -> None:
    reference = written_by_diffusers(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert same(dict(open_unet_folder(tmp_path).weights()), reference.state_dict())


OLD = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
    "samplers.0.conv.": "samplers.0.Conv2d_0.",
}


def test_old_spellings_are_today_s_weights(tmp_path: Path) -> None:
    reference = written_by_diffusers(tmp_path)
    respell(tmp_path, OLD)
    stored = load_file(tmp_path / FILE)
    assert not [name for name in stored if ".to_q." in name or "samplers.0.conv." in name]
    assert same(dict(open_unet_folder(tmp_path).weights()), reference.state_dict())
    assert {modern_name(name) for name in stored} == set(reference.state_dict())


def test_today_s_spelling_wins_where_a_file_has_both(tmp_path: Path) -> None:
    reference = written_by_diffusers(tmp_path)
    tensors = load_file(tmp_path / FILE)
    both = {name.replace("samplers.0.conv.", "samplers.0.Conv2d_0."): t for name, t in tensors.items()}
    save_file({name: torch.zeros_like(t) for name, t in both.items()} | tensors, tmp_path / FILE)
    assert same(dict(open_unet_folder(tmp_path).weights()), reference.state_dict())


@pytest.mark.parametrize("name", ["mid_block.attentions.0.keyhole", "conv_in.weight", "a.query.weight"])
def test_other_names_stay(name: str) -> None:
    assert modern_name(name) == name


def test_wrong_and_missing_weights_are_listed(tmp_path: Path) -> None:
    written_by_diffusers(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["conv_in.bias"]
    tensors["stranger.weight"] = torch.zeros(2)
    tensors["conv_out.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(DataError) as raised:
        open_unet_folder(tmp_path)
    assert str(raised.value).splitlines() == [
        f"{tmp_path}: conv_in.bias [8] is missing",
        f"{tmp_path}: stranger.weight [2] is not in the model",
        f"{tmp_path}: conv_out.bias is [5], the model's is [4]",
    ]


def test_a_long_list_ends_with_how_many_more(tmp_path: Path) -> None:
    written_by_diffusers(tmp_path)
    save_file({"conv_in.bias": torch.zeros(8)}, tmp_path / FILE)
    with pytest.raises(DataError) as raised:
        open_unet_folder(tmp_path)
    lines = str(raised.value).splitlines()
    total = len(UNet(SMALL).state_dict())
    assert len(lines) == 21 and lines[-1] == f"{tmp_path}: and {total - 1 - 20} more weights"


def test_integers_are_no_weights(tmp_path: Path) -> None:
    written_by_diffusers(tmp_path)
    save_file(
        {name: tensor.to(torch.int8) for name, tensor in load_file(tmp_path / FILE).items()}, tmp_path / FILE
    )
    with pytest.raises(DataError, match=r"is I8 .*only F64, F32, F16, BF16"):
        open_unet_folder(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    reference = written_by_diffusers(tmp_path)
    (tmp_path / FILE).unlink()
    torch.save(reference.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never read"):
        open_unet_folder(tmp_path)


@pytest.mark.parametrize("config", [SD15, SD2, SDXL, REFINER, *CONFIGS.values()])
def test_a_config_survives_the_way_there_and_back(config: UNetConfig) -> None:
    """Also through diffusers' own reading of it, which knows every one of the names."""
    there = json.loads(json.dumps(diffusers_config(config)))
    assert unet_config(there, "x") == config
    with torch.device("meta"):
        reference: Any = UNet2DConditionModel.from_config(there)
    assert not set(there) - set(dict(reference.config)) - {"_class_name"}
    assert unet_config(json.loads(reference.to_json_string()), "x") == config


# The published unet/config.json of Stable Diffusion 1.4, 2.1, and SDXL refiner, as they are.
SD14_FILE = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD21_FILE = SD14_FILE | {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96,
    "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip
REFINER_FILE = SD14_FILE | {
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536], "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 1280,
    "cross_attention_norm": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2560, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": 4, "upcast_attention": None,
    "use_linear_projection": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "described, config",
    [(SD14_FILE, SD15), (SD21_FILE, changed(SD2, sample_size=96)), (REFINER_FILE, REFINER)],
    ids=["sd14", "sd21", "refiner"],
)
def test_published_files_give_the_published_models(described: dict[str, Any], config: UNetConfig) -> None:
    assert unet_config(described, "x") == config


def test_what_a_file_leaves_out_is_diffusers_default_not_ours() -> None:
    assert unet_config({"sample_size": 32}, "x").cross_attention_dim == 1280


def other_values() -> Iterator[tuple[str, Any]]:
    for name, choices in FIXED.items():
        yield (
            name,
            {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2}.get(
                type(choices[0]), lambda v: "other"
            )(choices[0]),
        )


@pytest.mark.parametrize("name, value", list(other_values()))
def test_every_setting_that_our_unet_lacks_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"f.json: {name} is .*our U-Net has"):
        unet_config(SD14_FILE | {name: value}, "f.json")


def test_all_problems_of_a_config_come_at_once() -> None:
    described = SD14_FILE | {
        "_class_name": "UNet2DModel",
        "act_fn": "gelu",
        "novel": 1,
        "sample_size": None,
        "in_channels": 0,
    }
    with pytest.raises(ConfigError) as raised:
        unet_config(described, "f.json")
    said = str(raised.value)
    for part in (
        "_class_name is 'UNet2DModel'",
        'act_fn is "gelu"',
        "novel is no setting",
        "sample_size is null",
        "in_channels: ",
    ):
        assert f"f.json: {part}" in said
    assert len(raised.value.problems) == 5
