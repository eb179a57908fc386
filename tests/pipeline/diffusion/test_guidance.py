"""Guidance: its two ends, its rescaling, its interval, and what it computes."""

import pytest
import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.diffusion.guidance import GuidedNetwork, drop_captions, guide, rescale

TEXT, AWAY = torch.full((2, 3, 4), 2.0), torch.full((2, 3, 4), -1.0)


def network(z_BCHW: Tensor, times_B: Tensor, text_BLD: Tensor) -> Tensor:
    """A denoiser whose prediction shows the text it was given."""
    assert len(z_BCHW) == len(times_B) == len(text_BLD)
    return z_BCHW * text_BLD.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def guided(share: float = 0.5, **fields: object) -> Tensor:
    sample = SampleConfig.model_validate(fields)
    z = torch.arange(8.0).view(2, 1, 2, 2)
    return GuidedNetwork(network, TEXT, AWAY, sample)(z, torch.tensor(500), share)


def test_scale_one_is_conditional_and_zero_unconditional() -> None:
    z = torch.arange(8.0).view(2, 1, 2, 2)
    assert torch.equal(guided(guidance_scale=1.0), 2.0 * z)
    assert torch.equal(guided(guidance_scale=0.0), -z)
    assert torch.equal(guided(guidance_scale=3.0), 8.0 * z), "-1 + 3 * (2 - -1)"
    first, second = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    assert torch.equal(guide(first, second, 1.0), first + (second - first))


@pytest.mark.parametrize(("share", "on"), [(0.1, False), (0.2, True), (0.5, True), (0.8, True), (0.9, False)])
def test_outside_its_interval_guidance_is_off(share: float, on: bool) -> None:
    z = torch.arange(8.0).view(2, 1, 2, 2)
    found = guided(share, guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    assert torch.equal(found, (8.0 if on else 2.0) * z)


def test_rescaling_gives_back_the_spread_of_the_conditional_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    conditional = torch.randn(3, 4, 8, 8, generator=generator)
    strong = 5.0 * torch.randn(3, 4, 8, 8, generator=generator) + 1.0
    whole = rescale(strong, conditional, 1.0)
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    torch.testing.assert_close(rescale(strong, conditional, 0.25), 0.25 * whole + 0.75 * strong)
    assert torch.equal(rescale(strong, conditional, 0.0), strong)


def test_dropped_captions_become_the_null_text_and_no_others() -> None:
    null = torch.zeros(1, 3, 4)
    found = drop_captions(TEXT, null, torch.tensor([True, False]))
    assert torch.equal(found[0], null[0]) and torch.equal(found[1], TEXT[1])
