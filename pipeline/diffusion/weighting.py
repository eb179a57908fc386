"""How much the error at each noise level counts, as a factor on the squared error of what the network predicts.

Every weighting is stated once, as its factor r(SNR) on the error of the noise; the factor on the error of another
prediction follows from how the errors convert at fixed z_t: (x0 error)^2 SNR = (eps error)^2 and
v, flow: (eps error)^2 = alpha^2 (error)^2. Nothing divides by an SNR that may be 0.
"""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased"]
Prediction = Literal["epsilon", "v_prediction", "x0", "flow"]


def noise_error_weight(weighting: Weighting, snr: Tensor, gamma: float) -> Tensor:
    """Return r(SNR), the factor on the squared error of the noise.

    min_snr: min(SNR, gamma) / SNR (Hang et al. 2023, section 3.4), 1 at SNR 0. soft_min_snr: gamma / (SNR + gamma), its
    smooth form (Crowson et al. 2024, section 4.3). debiased: SNR^-1/2 (Yu et al. 2024, eq. 8).
    """
    if weighting == "min_snr":
        return torch.where(snr > gamma, gamma / snr.clamp(min=gamma), torch.ones_like(snr))
    if weighting == "soft_min_snr":
        return gamma / (snr + gamma)
    return snr.rsqrt()


def loss_weight(
    weighting: Weighting, prediction: Prediction, alpha_B: Tensor, sigma_B: Tensor, gamma: float
) -> Tensor:
    """Return the factor on each sample's squared error of `prediction`, like `alpha_B`.

    At SNR 0 the factors on v and flow are 0, on x0 0: there is nothing to be learned of a picture from pure noise.
    """
    if weighting == "none":
        return torch.ones_like(alpha_B)
    snr = (alpha_B / sigma_B).square()
    if prediction == "epsilon":
        return noise_error_weight(weighting, snr, gamma)
    if weighting == "debiased":  # r is infinite at SNR 0, r SNR is not.
        noise_free = alpha_B / sigma_B
        return noise_free if prediction == "x0" else alpha_B * sigma_B
    share = noise_error_weight(weighting, snr, gamma)
    return share * snr if prediction == "x0" else share * alpha_B.square()
