"""Which weights a pattern names, and the file that keeps them."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.config import UNetConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.unet import UNet
from pipeline.training.frozen import (
    frozen_names,
    frozen_weights,
    read_frozen,
    refuse_other_names,
    write_frozen,
)

with torch.device("meta"):
    NAMES = [name for name, _ in UNet(UNetConfig()).named_parameters()]


@pytest.mark.parametrize(
    "pattern, expression",
    [
        ("down_blocks", r"down_blocks\."),
        ("down_blocks.*", r"down_blocks\."),
        ("down_blocks.1", r"down_blocks\.1\."),
        ("*.attn2.to_[kv].weight", r".*\.attn2\.to_[kv]\.weight$"),
        ("*.bias", r".*\.bias$"),
        ("conv_in.weight", r"conv_in\.weight$"),
    ],
)
def test_a_pattern_names_what_its_expression_does(pattern: str, expression: str) -> None:
    wanted = [name for name in NAMES if re.match(expression, name)]
    assert wanted and frozen_names(NAMES, [pattern]) == wanted


def test_patterns_add_up_in_the_models_order() -> None:
    both = frozen_names(NAMES, ["up_blocks", "conv_in", "up_blocks.3"])
    assert both == [name for name in NAMES if name.startswith(("up_blocks.", "conv_in."))]
    assert frozen_names(NAMES, []) == []


# docs/recipes.md has these.
ONLY_THE_TEXT = [
    *("conv_in", "conv_out", "time_embedding", "*.resnets", "*.attn1", "*.ff", "*norm*", "*samplers"),
    *("*.proj_in", "*.proj_out"),
]


def test_the_recipe_leaves_sd15s_cross_attention() -> None:
    """80 tensors with 43,962,560 parameters, as counted with diffusers 0.42.1."""
    with torch.device("meta"):
        parameters = dict(UNet(UNetConfig()).named_parameters())
    left = parameters.keys() - set(frozen_names(list(parameters), ONLY_THE_TEXT))
    assert all(".attn2." in name for name in left)
    assert (len(left), sum(parameters[name].numel() for name in left)) == (80, 43_962_560)


def test_wrong_patterns_are_all_told_with_the_likely_one() -> None:
    with pytest.raises(ConfigError) as raised:
        frozen_names(NAMES, ["down_block.*", "conv_in", "zzzzzzzz"])
    assert raised.value.problems == [
        "train.freeze: 'down_block.*' names no weight of the model; did you mean 'down_blocks'?",
        "train.freeze: 'zzzzzzzz' names no weight of the model; names begin with conv_in, time_embedding, "
        "down_blocks, mid_block, up_blocks, conv_norm_out, conv_out",
    ]


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(ConfigError, match=r"train\.freeze: \* leave no weight to train"):
        frozen_names(NAMES, ["*"])


def test_the_file_gives_the_weights_back_and_belongs_to_the_run(tmp_path: Path) -> None:
    weights = {"a.b": torch.randn(3, 2), "c": torch.ones(4, dtype=torch.float16)}
    path = tmp_path / "frozen.safetensors"
    write_frozen(path, weights)
    found = frozen_weights(tmp_path / "checkpoints" / "step-00000003")
    assert found.keys() == weights.keys() and all(torch.equal(found[n], weights[n].float()) for n in weights)
    assert read_frozen(tmp_path / "none.safetensors") == {}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"frozen\.safetensors: not readable"):
        read_frozen(path)


def test_changed_patterns_are_refused(tmp_path: Path) -> None:
    refuse_other_names(tmp_path, ["a", "b"], ["b", "a"])
    with pytest.raises(ConfigError, match=r"now freezes c \(1 such\) and no longer freezes a \(2 such\)"):
        refuse_other_names(tmp_path, ["a", "b"], ["c"])
