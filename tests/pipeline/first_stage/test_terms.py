"""Each term of the autoencoder's loss, and SSIM, against formulas written out another way."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.first_stage.measure import psnr_db, ssim
from pipeline.first_stage.terms import (
    adaptive_weight,
    feature_distances,
    gradient_l1_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    l1_loss,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_constant_error_has_l1_and_no_gradient_l1() -> None:
    images = drawn(2, 3, 8, 8)
    assert float(l1_loss(images + 0.25, images)) == pytest.approx(0.25)
    assert float(gradient_l1_loss(images + 0.25, images)) == pytest.approx(0.0, abs=1e-6)


def test_gradient_l1_of_an_edge_by_hand() -> None:
    images, decoded = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    decoded[..., 2:] = 1.0  # one step of height 1 in each of 4 rows of 3 differences
    assert float(gradient_l1_loss(decoded, images)) == pytest.approx(4 / 12)


def test_kl_is_torch_s_own() -> None:
    mean, logvar = drawn(2, 4, 3, 3), drawn(2, 4, 3, 3, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_loss(mean, logvar, 100), expected / 100)
    assert float(kl_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 4)) == 0.0


def test_feature_distance_is_one_minus_the_cosine_without_weights() -> None:
    one, other = drawn(3, 5, 4, 4), drawn(3, 5, 4, 4, seed=1)
    cosine = functional.cosine_similarity(one, other, dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(feature_distances([one], [other], [None]), 1.0 - cosine)
    assert float(feature_distances([3.0 * one], [one], [None]).abs().max()) < 1e-6, "length does not count"


def test_feature_distance_with_weights_is_lpips() -> None:
    taps = [(drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)), (drawn(2, 6, 2, 2), drawn(2, 6, 2, 2, seed=2))]
    weights = [torch.tensor([0.1, 2.0, 0.0]), torch.arange(6.0)]
    expected = torch.zeros(2)
    for (one, other), weight in zip(taps, weights, strict=True):
        for b in range(2):
            for y in range(one.shape[2]):
                for x in range(one.shape[3]):
                    p, q = one[b, :, y, x], other[b, :, y, x]
                    gap = p / p.norm() - q / q.norm()
                    expected[b] += (weight * gap * gap).sum() / (one.shape[2] * one.shape[3])
    found = feature_distances([a for a, _ in taps], [b for _, b in taps], weights)
    torch.testing.assert_close(found, expected)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    )
    assert float(hinge_discriminator_loss(torch.zeros(4), torch.zeros(4))) == 1.0
    assert float(hinge_discriminator_loss(torch.full((4,), 1.5), torch.full((4,), -1.5))) == 0.0
    assert float(hinge_generator_loss(fake)) == pytest.approx(1 / 3)


def test_adaptive_weight_makes_the_gradients_equally_long() -> None:
    one, other = drawn(3, 4), 0.01 * drawn(3, 4, seed=1)
    weight = adaptive_weight(one, other)
    assert float((weight * other).norm()) == pytest.approx(float(one.norm()), rel=1e-2)
    assert float(adaptive_weight(one, torch.zeros(3, 4))) == 1e4
    assert float(adaptive_weight(torch.zeros(3, 4), other)) == 0.0


def test_psnr_and_ssim_against_numpy() -> None:
    images = drawn(2, 3, 14, 13).clamp(-1, 1)
    decoded = (images + 0.2 * drawn(2, 3, 14, 13, seed=1)).clamp(-1, 1)
    x, y = ((part.double().numpy() + 1.0) / 2.0 for part in (decoded, images))
    assert psnr_db(decoded, images).tolist() == pytest.approx(
        [-10.0 * math.log10(float(np.mean((x[b] - y[b]) ** 2))) for b in range(2)]
    )
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    for b, found in enumerate(ssim(decoded, images).tolist()):
        values = []
        for c in range(3):
            for i in range(14 - 10):
                for j in range(13 - 10):
                    p, q = x[b, c, i : i + 11, j : j + 11], y[b, c, i : i + 11, j : j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                    values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert found == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    assert ssim(images[..., :8, :8], images[..., :8, :8]).tolist() == pytest.approx([1.0, 1.0])
