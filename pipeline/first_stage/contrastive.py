"""The contrastive loss over the global batch, and its rows gathered from all processes with the exact gradient.

Shape letters: B this process's share, G global batch, D width.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional


def contrastive_loss(one_GD: Tensor, other_GD: Tensor, scale: Tensor, ids_G: Tensor) -> Tensor:
    """Return the symmetric cross-entropy, a scalar: each row's own partner among all, and the reverse.

    Other pairs with an equal id (an equal caption, the same picture) are neither right nor wrong: they are left out
    of the softmax. Source: Radford et al. 2021, figure 3.
    """
    logits_GG = scale * other_GD @ one_GD.T
    same_GG = ids_G[:, None] == ids_G[None, :]
    same_GG.fill_diagonal_(False)
    logits_GG = logits_GG.masked_fill(same_GG, -math.inf)
    own_G = torch.arange(len(logits_GG), device=logits_GG.device)
    return 0.5 * (functional.cross_entropy(logits_GG, own_G) + functional.cross_entropy(logits_GG.T, own_G))


def gathered_loss(
    accelerator: Accelerator, one_BD: Tensor, other_BD: Tensor, scale: Tensor, ids_G: Tensor
) -> Tensor:
    """Return the global batch's loss from this process's rows; each process has the same value.

    `backward` on it times the number of processes, with gradients then averaged over them (as DDP does), gives the
    gradient of one process with the whole batch.
    """
    # The scale is in every process's loss: a share of its gradient each, at its full value.
    shared_scale = scale.detach() + (scale - scale.detach()) / accelerator.num_processes
    rows = (with_others(accelerator, one_BD), with_others(accelerator, other_BD))
    return contrastive_loss(*rows, shared_scale, ids_G)


def with_others(accelerator: Accelerator, own_BD: Tensor) -> Tensor:
    """Return the global batch's rows [G, D]: the other processes' as constants, our own with their gradient.

    Every process computes the whole loss, so the gradients that reach the processes' own rows add up to the
    exact gradient: no collective needs a backward of its own.
    """
    if accelerator.num_processes == 1:
        return own_BD
    rows = list(accelerator.gather(own_BD.detach()).chunk(accelerator.num_processes))
    rows[accelerator.process_index] = own_BD
    return torch.cat(rows)
