"""Classifier-free guidance: captions dropped in training, two predictions combined in sampling."""

import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objective import Network


def drop_captions(conditions: Conditioning, null_text: Conditioning, dropped_B: Tensor) -> Conditioning:
    """Return the conditions with the states and pooled text of dropped captions replaced by those of the null text.

    Both go together, since guidance will lead away from both; the sizes say nothing of the caption and stay.
    """
    dropped_B1 = dropped_B.unsqueeze(-1)
    text_BLD, pooled_BP = conditions.text_BLD, conditions.pooled_BP
    text_BLD = torch.where(dropped_B1.unsqueeze(-1), null_text.text_BLD.to(text_BLD.dtype), text_BLD)
    if pooled_BP is not None:
        assert null_text.pooled_BP is not None
        pooled_BP = torch.where(dropped_B1, null_text.pooled_BP.to(pooled_BP.dtype), pooled_BP)
    return Conditioning(text_BLD, pooled_BP, conditions.time_ids_BS)


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
    """The denoiser under guidance: both predictions from one forward pass under 2B texts, or one where one is enough.

    The network takes B latents under 2B texts (`UNet.forward`), so what precedes the first text is computed once.
    At scale 1 the unconditional half, at scale 0 the conditional half has no weight and is not computed; outside
    the guidance interval only the conditional half is.

    Source: Ho & Salimans 2022, algorithm 2; Kynkäänniemi et al. 2024 for the interval.
    """

    def __init__(
        self, network: Network, towards: Conditioning, away: Conditioning, sample: SampleConfig
    ) -> None:
        """Guide towards the prompts and `away` from the null text or a negative prompt."""
        self._network, self._towards, self._away = network, towards, away
        self._both = away.followed_by(towards)
        self._scale, self._rescale = sample.guidance_scale, sample.guidance_rescale
        self._low, self._high = sample.guidance_interval

    def __call__(self, z_BCHW: Tensor, time: Tensor, share: float) -> Tensor:
        """Return the prediction [B, C, H, W] at `time`, which is the share t / T of the schedule."""
        scale = self._scale if self._low <= share <= self._high else 1.0
        if scale in (0.0, 1.0):
            return self._predict(z_BCHW, time, self._towards if scale else self._away)
        unconditional, conditional = self._predict(z_BCHW, time, self._both).chunk(2)
        guided = guide(unconditional, conditional, scale)
        return rescale(guided, conditional, self._rescale) if self._rescale else guided

    def _predict(self, z_BCHW: Tensor, time: Tensor, conditions: Conditioning) -> Tensor:
        return self._network(z_BCHW, time.to(z_BCHW.device).expand(len(z_BCHW)), *conditions.inputs)
