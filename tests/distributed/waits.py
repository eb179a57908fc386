"""Counts what makes the host wait within steps of a training: reads of tensors, and collectives that block.

Every call is put to the account of the innermost file of ours or of DeepSpeed on its stack. Only the thread that
steps is watched: loader and writer threads hold nothing up.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.faults.outcome import ROOT

READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "barrier", "monitored_barrier", "all_to_all_single", "gather", "scatter"),
    *("all_gather_object", "broadcast_object_list", "send", "recv", "all_gather_single"),
    *("reduce_scatter_single", "_all_gather_base", "_reduce_scatter_base"),
)
OURS, DEEPSPEED = f"{ROOT}/pipeline/", "/deepspeed/"


class Waits:
    """The waits between `begin` and `end`, as "file:function call" -> count."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._thread: int | None = None
        self._inside = False

    @property
    def counting(self) -> bool:
        """Whether a call of this thread would be counted now."""
        return self._thread == threading.get_ident()

    def begin(self) -> None:
        """Count from now on, what this thread does."""
        self._thread = threading.get_ident()

    def end(self) -> None:
        """Count no more."""
        self._thread = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put counters in front of everything that can wait."""
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(Tensor, name, self._counted(getattr(Tensor, name), name, lambda given: True))
            patch.setattr(Tensor, "to", self._counted(Tensor.to, 'to("cpu")', _to_host))
            for name in filter(partial(hasattr, dist), COLLECTIVES):
                blocks: Callable[[dict[str, Any]], bool] = lambda given: not given.get("async_op")  # noqa: E731
                patch.setattr(dist, name, self._counted(getattr(dist, name), name, blocks))
            yield

    def _counted(self, plain: Any, name: str, waits: Callable[[dict[str, Any]], bool]) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            # What a counted call makes of others inside is the same wait.
            if not self.counting or self._inside or not waits({"args": given} | named):
                return plain(*given, **named)
            self.found[f"{_account(sys._getframe(1))} {name}"] += 1
            self._inside = True
            try:
                return plain(*given, **named)
            finally:
                self._inside = False

        return call


def _to_host(given: dict[str, Any]) -> bool:
    # On a CPU the device of the run goes by the same name: only a "cpu" that stands in the code is meant for the host.
    return "cpu" in [*filter(lambda value: isinstance(value, str), given["args"][1:]), given.get("device")]


def _account(frame: FrameType | None) -> str:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_code.co_name}"
        if DEEPSPEED in file and "/deepspeed/comm/" not in file:
            return f"deepspeed/{file.rpartition(DEEPSPEED)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
