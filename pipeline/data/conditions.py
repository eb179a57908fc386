"""What a batch conditions on: the caption chosen for each position, and SDXL's sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import draws
from pipeline.errors import DataError
from pipeline.latents.spec import Bucket


def chosen_captions(
    seed: int, positions: Sequence[int], records: Sequence[Mapping[str, Any]], arrays: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the members that depend on the caption, [b, *shape], for the caption drawn for each position.

    `records` is empty where the data set stores one caption a sample: then there is nothing to choose.
    """
    stored = {name: tensor for name, tensor in arrays.items() if name != "latent"}
    if not records or next(iter(stored.values())).shape[1] == 1:
        return {name: tensor[:, 0] for name, tensor in stored.items()}
    chosen = [
        draws.caption_choice(seed, position, len(record["captions"]))
        for position, record in zip(positions, records, strict=True)
    ]
    rows = np.arange(len(chosen))
    return {name: torch.from_numpy(tensor.numpy()[rows, chosen]) for name, tensor in stored.items()}


def time_ids(records: Sequence[Mapping[str, Any]], bucket: Bucket, flipped: np.ndarray) -> Tensor | None:
    """Return float32 [b, 6]: original size, corner of the crop after resizing, target size; None if not recorded.

    A flipped picture shows the crop that its mirrored original would have.
    """
    height, width = bucket
    rows = []
    for record, mirrored in zip(records, flipped, strict=True):
        if "crop" not in record or "original_height" not in record:
            return None
        top, left, crop_height, crop_width = record["crop"]
        if mirrored:
            left = record["original_width"] - left - crop_width
        corner = (top * height / crop_height, left * width / crop_width)
        rows.append([record["original_height"], record["original_width"], *corner, height, width])
    return torch.tensor(rows, dtype=torch.float32)


def require_sizes(time_ids_B6: Tensor | None) -> Tensor:
    """Return the sizes of a batch.

    Raises:
        DataError: the data set does not record them.
    """
    if time_ids_B6 is None:
        raise DataError(
            "the json of the data set's samples has no original_height or crop, which model.addition_embed_type "
            "'text_time' (SDXL) takes; encode the data set again with `ldm encode`"
        )
    return time_ids_B6
