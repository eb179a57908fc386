"""Guidance: its two ends, its rescaling, its interval, and what it computes."""

import pytest
import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import GuidedNetwork, drop_captions, guide, rescale

TEXT, AWAY = torch.full((2, 3, 4), 2.0), torch.full((2, 3, 4), -1.0)


def network(z_BCHW: Tensor, times_B: Tensor, text_BLD: Tensor) -> Tensor:
    """A denoiser whose prediction shows the text it was given; like ours it takes several texts a latent."""
    assert len(z_BCHW) == len(times_B)
    return z_BCHW.repeat(len(text_BLD) // len(z_BCHW), 1, 1, 1) * text_BLD.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def guided(share: float = 0.5, **fields: object) -> Tensor:
    sample = SampleConfig.model_validate(fields)
    z = torch.arange(8.0).view(2, 1, 2, 2)
    return GuidedNetwork(network, Conditioning(TEXT), Conditioning(AWAY), sample)(z, torch.tensor(500), share)


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
    null, dropped = torch.zeros(1, 3, 4), torch.tensor([True, False])
    found = drop_captions(Conditioning(TEXT), Conditioning(null), dropped)
    assert torch.equal(found.text_BLD[0], null[0]) and torch.equal(found.text_BLD[1], TEXT[1])
    assert found.inputs == (found.text_BLD,)


def test_states_and_pooled_text_are_dropped_together_and_sizes_stay() -> None:
    pooled, sizes = torch.full((2, 5), 3.0), torch.arange(12.0).view(2, 6)
    null = Conditioning(torch.zeros(1, 3, 4), torch.full((1, 5), -7.0))
    found = drop_captions(Conditioning(TEXT, pooled, sizes), null, torch.tensor([False, True]))
    assert found.pooled_BP is not None and torch.equal(found.text_BLD[0], TEXT[0])
    assert torch.equal(found.text_BLD[1], torch.zeros(3, 4))
    assert found.pooled_BP.tolist() == [[3.0] * 5, [-7.0] * 5]
    assert found.time_ids_BS is sizes


def test_every_condition_meets_its_half_of_the_batch() -> None:
    """SDXL: the away half gets its own text, pooled text and sizes, in front of the other."""
    towards = Conditioning(TEXT, torch.full((2, 5), 3.0), torch.full((2, 6), 1024.0))
    away = Conditioning(AWAY[:1], torch.full((1, 5), -3.0), torch.full((1, 6), 512.0)).expanded(2)
    seen: list[tuple[Tensor, ...]] = []

    def sdxl(z_BCHW: Tensor, times_B: Tensor, *conditions: Tensor) -> Tensor:
        seen.append(conditions)
        return z_BCHW

    GuidedNetwork(sdxl, towards, away, SampleConfig(guidance_scale=3.0))(
        torch.ones(2, 1, 2, 2), torch.tensor(500), 0.5
    )
    (found,) = seen
    for part, first, second in zip(found, away.inputs, towards.inputs, strict=True):
        assert torch.equal(part, torch.cat([first, second]))
