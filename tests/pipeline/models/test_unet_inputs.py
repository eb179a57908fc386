"""What the U-Net refuses: inputs that would broadcast or be left out, and shapes that cannot be built."""

import re
from typing import Any

import pytest
import torch

from pipeline.config import UNetConfig
from pipeline.models.unet import UNet
from tests.pipeline.models.unets import (
    SMALL,
    SMALL_SDXL,
    changed,
    random_inputs,
)


@pytest.mark.parametrize(
    "config, name, shape, allowed",
    [
        (SMALL, "latents_BCHW", (2, 3, 8, 8), "[2, 4, None, None]"),
        (SMALL, "timesteps_B", (1,), "[2]"),
        (SMALL, "timesteps_B", (), "[2]"),
        (SMALL, "text_BLD", (1, 5, 12), "[2, None, 12]"),
        (SMALL, "text_BLD", (2, 5, 11), "[2, None, 12]"),
        (SMALL, "pooled_BP", (2, 10), "None"),
        (SMALL, "time_ids_BS", (2, 6), "None"),
        (SMALL_SDXL, "pooled_BP", None, "[2, 10]"),
        (SMALL_SDXL, "pooled_BP", (2, 9), "[2, 10]"),
        (SMALL_SDXL, "time_ids_BS", None, "[2, None]"),
    ],
)
def test_inputs_that_would_broadcast_or_be_ignored_are_refused(
    config: UNetConfig, name: str, shape: tuple[int, ...] | None, allowed: str
) -> None:
    inputs: dict[str, Any] = random_inputs(config, dtype=torch.float32)
    inputs[name] = None if shape is None else torch.zeros(shape)
    got = "None" if shape is None else str(list(shape))
    with pytest.raises(ValueError, match=re.escape(f"{name} is {got}, must be {allowed}")):
        UNet(config)(**inputs)


def test_sizes_and_pooled_text_must_fill_the_embedding_together() -> None:
    inputs = random_inputs(SMALL_SDXL, dtype=torch.float32) | {"time_ids_BS": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=re.escape("pooled_BP is [2, 10], must be [2, 16]")):
        UNet(SMALL_SDXL)(**inputs)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"attention_head_dim": 3}, r"attention_head_dim 3 \(heads\) does not divide"),
        ({"layers_per_block": (1, 1)}, r"layers_per_block has 2 entries, block_out_channels has 3"),
        ({"transformer_layers_per_block": (1, (1,), 1)}, r"give those of the way up as reverse_transformer"),
        (
            {
                "transformer_layers_per_block": (1, (1, 2), 1),
                "reverse_transformer_layers_per_block": (1, 1, 1),
            },
            r"level 1 has 1 layers on the way down, its depths are \[1, 2\]",
        ),
        (
            {"reverse_transformer_layers_per_block": ((1, 1), (1, 1), (1, 1, 1))},
            r"level 0 has 2 layers on the way up, its depths are \[1, 1, 1\]",
        ),
        ({"norm_num_groups": 3}, r"block_out_channels 8 is not a multiple of norm_num_groups 3"),
        ({"addition_embed_type": "text_time"}, r"go together"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(SMALL, **fields)
