"""The network under averaged weights, for a while: at any ZeRO stage, without a full fp32 copy on any rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragments

RAW = "raw"


@contextmanager
def weights_of(fragments: Fragments, ema: Ema, kind: str) -> Iterator[None]:
    """Let the engine's weights be those of `kind` within the block; "raw" changes nothing.

    Masters and averages change places fragment by fragment, and the low-precision weights are made of what then
    lies in the masters' place, as after a step; afterwards the same once more. Both ways are exchanges of bits, so
    training goes on as if nothing had been. The extra memory is one fragment. All ranks together, between two
    steps; nothing may be saved or updated within the block.

    An error within it is passed on without the second refresh, which would wait for ranks that are elsewhere.
    """
    if kind == RAW:
        yield
        return
    masters = [fragment.master for fragment in fragments.owned]
    averages = ema.of_kind(kind)
    exchange(masters, averages)
    try:
        fragments.refresh_weights()
        yield
    finally:
        exchange(masters, averages)
    fragments.refresh_weights()


@torch.no_grad()
def exchange(ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Let the tensors of the two sequences change their contents, pair by pair."""
    for one, other in zip(ones, others, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
        del kept  # Before the next one is made.
