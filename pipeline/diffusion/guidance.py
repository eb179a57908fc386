"""Classifier-free guidance: captions dropped in training, two predictions combined in sampling."""

import torch
from torch import Tensor


def drop_captions(text_BLD: Tensor, null_text_1LD: Tensor, dropped_B: Tensor) -> Tensor:
    """Return the text states with those of dropped captions replaced by the null text, [B, L, D]."""
    return torch.where(dropped_B.view(-1, 1, 1), null_text_1LD.to(text_BLD.dtype), text_BLD)


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided prediction: scale 1 is the conditional one, 0 the unconditional.

    Source: Ho & Salimans 2022, eq. 6, with w = guidance_scale - 1.
    """
    return unconditional + guidance_scale * (conditional - unconditional)
