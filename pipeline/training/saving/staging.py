"""Host memory that holds one state while it is written: the step waits for this copy and for nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.training.saving.fragment_file import Stretch

BUFFER_ELEMENTS = 2**26
"""256 MiB: a power of two, for torch rounds pinned memory up to one."""


class Staging:
    """Buffers for one state, made at the first copy and used again by every later one."""

    def __init__(self, *, pinned: bool) -> None:
        """`pinned` memory lets a GPU copy at the full speed of its link."""
        self._pinned = pinned
        self._layout: list[tuple[str, int]] = []
        self._staged: list[Stretch] = []

    @torch.no_grad()
    def copy(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        """Return the stretches as they are now, in host memory; valid until the next call."""
        layout = [(stretch.key, stretch.tensor.numel()) for stretch in stretches]
        if layout != self._layout:
            self._staged = []  # Gives the old buffers back before new ones are made.
            self._staged = self._allocate(stretches)
            self._layout = layout
        if stretches:
            staged, live = ([part.tensor for part in parts] for parts in (self._staged, stretches))
            torch._foreach_copy_(staged, live, non_blocking=self._pinned)
            if self._pinned:
                torch.cuda.current_stream().synchronize()
        return self._staged

    def _allocate(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        staged: list[Stretch] = []
        left = sum(stretch.tensor.numel() for stretch in stretches)
        buffer = torch.empty(0)
        for stretch in stretches:
            count = stretch.tensor.numel()
            if buffer.numel() < count:
                buffer = self._buffer(max(count, min(left, BUFFER_ELEMENTS)))
            staged.append(Stretch(stretch.kind, stretch.name, stretch.start, buffer[:count]))
            buffer = buffer[count:]
            left -= count
        return staged

    def _buffer(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float32, pin_memory=self._pinned)
