"""Memory of batches, used again when the batch is gone: fresh megabytes cost more to map than to fill.

Where there is a GPU the memory is pinned, and torch's own allocator gives it out again, after the copies that
still read it. Elsewhere this pool does, when the last tensor or array over a block has died.
"""

import math
import threading
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

TORCH_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<u2": torch.uint16}


class Buffers:
    """Gives out uninitialised tensors; at most `kept` idle blocks of a size stay for the next batches."""

    def __init__(self, *, pinned: bool, kept: int) -> None:
        """Give out pinned memory, or pageable memory of a pool of our own."""
        self._pinned, self._kept = pinned, kept
        self._idle: defaultdict[int, list[bytearray]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised CPU tensor of the numpy `dtype` ("<f2", "<f4", "<u2")."""
        if self._pinned:
            return torch.empty(shape, dtype=TORCH_DTYPES[dtype], pin_memory=True)
        size_bytes = max(1, math.prod(shape)) * np.dtype(dtype).itemsize
        with self._lock:
            blocks = self._idle[size_bytes]
            block = blocks.pop() if blocks else bytearray(size_bytes)
        # All views of the block hold this array: numpy keeps the chain of bases down to the memoryview's owner.
        lease = np.frombuffer(memoryview(block), dtype)
        weakref.finalize(lease, self._give_back, block)
        return torch.from_numpy(lease[: math.prod(shape)].reshape(shape))

    def _give_back(self, block: bytearray) -> None:
        with self._lock:
            blocks = self._idle[len(block)]
            if len(blocks) < self._kept:
                blocks.append(block)
