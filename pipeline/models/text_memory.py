"""While one text is attended to again and again, its keys and values are computed once."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pipeline.models.layers import TransformerBlock


@contextmanager
def text_remembered(network: nn.Module) -> Iterator[None]:
    """Let the cross-attention layers of `network` keep K and V of every text tensor they meet inside the block.

    A text is known by its identity: the caller hands in the same unchanged tensor at every step. Only for sampling,
    without gradients.
    """
    attentions = [block.attn2 for block in network.modules() if isinstance(block, TransformerBlock)]
    for attention in attentions:
        attention.memory = {}
    try:
        yield
    finally:
        for attention in attentions:
            attention.memory = None
