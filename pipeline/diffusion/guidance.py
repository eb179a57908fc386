"""Classifier-free guidance: captions dropped in training, two predictions combined in sampling."""

import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.diffusion.objective import Network


def drop_captions(text_BLD: Tensor, null_text_1LD: Tensor, dropped_B: Tensor) -> Tensor:
    """Return the text states with those of dropped captions replaced by the null text, [B, L, D]."""
    return torch.where(dropped_B.view(-1, 1, 1), null_text_1LD.to(text_BLD.dtype), text_BLD)


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided prediction: scale 1 is the conditional one, 0 the unconditional.

    Source: Ho & Salimans 2022, eq. 6, with w = guidance_scale - 1.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """Return the guided prediction with `share` of its excess spread over each sample taken back.

    A high guidance scale burns the contrast; the conditional prediction has the right spread.
    Source: Lin et al. 2023, eq. 14 to 16, with phi = share.
    """
    axes = tuple(range(1, guided_BCHW.dim()))
    wanted = conditional_BCHW.std(dim=axes, keepdim=True)
    found = guided_BCHW.std(dim=axes, keepdim=True)
    return share * (guided_BCHW * (wanted / found)) + (1.0 - share) * guided_BCHW


class GuidedNetwork:
    """The denoiser under guidance: both predictions from one forward pass on 2B latents, or one where one is enough.

    At scale 1 the unconditional half, at scale 0 the conditional half has no weight and is not computed; outside
    the guidance interval only the conditional half is.

    Source: Ho & Salimans 2022, algorithm 2; Kynkäänniemi et al. 2024 for the interval.
    """

    def __init__(self, network: Network, text_BLD: Tensor, away_BLD: Tensor, sample: SampleConfig) -> None:
        """Guide towards `text_BLD` and away from `away_BLD`, the null text or a negative prompt."""
        self._network, self._text_BLD, self._away_BLD = network, text_BLD, away_BLD
        self._both = torch.cat([away_BLD, text_BLD])
        self._scale, self._rescale = sample.guidance_scale, sample.guidance_rescale
        self._low, self._high = sample.guidance_interval

    def __call__(self, z_BCHW: Tensor, time: Tensor, share: float) -> Tensor:
        """Return the prediction [B, C, H, W] at `time`, which is the share t / T of the schedule."""
        scale = self._scale if self._low <= share <= self._high else 1.0
        if scale in (0.0, 1.0):
            return self._predict(z_BCHW, time, self._text_BLD if scale else self._away_BLD)
        unconditional, conditional = self._predict(z_BCHW.repeat(2, 1, 1, 1), time, self._both).chunk(2)
        guided = guide(unconditional, conditional, scale)
        return rescale(guided, conditional, self._rescale) if self._rescale else guided

    def _predict(self, z_BCHW: Tensor, time: Tensor, text_BLD: Tensor) -> Tensor:
        return self._network(z_BCHW, time.to(z_BCHW.device).expand(len(z_BCHW)), text_BLD)
