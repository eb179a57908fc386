"""Decoding ahead: threads prepare the next samples of a shard while the encoder works on the present ones.

Pillow lets go of the interpreter while it decodes and resizes, so threads are enough and nothing is copied between
processes. Order and outcome are those of a plain loop, whatever the number of threads.
"""

import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import PriorityQueue
from types import TracebackType
from typing import Self

from preprocessing.filters import Failure, Rejection
from preprocessing.images import Decode, PreparedSample
from preprocessing.samples import RawSample

Outcome = PreparedSample | Rejection | Failure
AHEAD_BYTES = 256 << 20
"""Most bytes of undecoded files that wait at once, whatever their number."""
GROUP = 4
"""Samples that one thread prepares in a row: fewer hand-overs between threads, and still short waits."""

SWITCH_SECONDS = 1e-4
"""How long a thread may keep the interpreter while another waits for it. A decoder comes back from Pillow every few
milliseconds; by Python's own 5 ms it would stand idle while a shard's thread stacks, sums and writes."""

LEAVE = -1


@dataclass(order=True)
class _Task:
    """Samples of one shard to prepare; the shard that was begun first goes first."""

    shard: int
    number: int
    raws: Sequence[RawSample] = field(compare=False, default=())
    prepare: Callable[[RawSample], Outcome] | None = field(compare=False, default=None)
    future: Future[list[Outcome]] = field(compare=False, default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        assert self.prepare is not None
        try:
            self.future.set_result([self.prepare(raw) for raw in self.raws])
        except BaseException as error:
            self.future.set_exception(error)

    @property
    def size_bytes(self) -> int:
        return sum(len(raw.image) for raw in self.raws)


class Decoders:
    """A bounded crew of threads that all shards under way share.

    The elder shard comes first and the younger fills the gaps. Were they equals, they would end together, and the
    threads would stand idle while both are finished and published.
    """

    def __init__(self, threads: int, ahead: int, decode: Decode | None = None) -> None:
        """Take `threads` threads; a shard has at most `ahead` samples decoded or waiting for it, and a group.

        `decode` turns bytes into a picture somewhere else (`isolation`); None = in these threads.
        """
        self.decode = decode
        self._ahead = ahead
        self._tasks: PriorityQueue[_Task] = PriorityQueue()
        self._shards, self._numbers = itertools.count(), itertools.count()
        self._crew = [
            threading.Thread(target=self._work, name=f"decode_{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        for thread in self._crew:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.setswitchinterval(self._switch_seconds)
        for _ in self._crew:
            self._tasks.put(_Task(LEAVE, next(self._numbers)))
        for thread in self._crew:
            thread.join()
        while not self._tasks.empty():
            self._tasks.get().future.cancel()

    def _work(self) -> None:
        while (task := self._tasks.get()).shard != LEAVE:
            task.run()

    def outcomes(
        self, raws: Iterable[RawSample], prepare: Callable[[RawSample], Outcome]
    ) -> Generator[tuple[RawSample, Outcome], None, None]:
        """Yield each sample with what `prepare` made of it, in order."""
        shard = next(self._shards)
        waiting: deque[_Task] = deque()
        samples = size_bytes = 0
        try:
            for group in _groups(raws):
                task = _Task(shard, next(self._numbers), group, prepare)
                self._tasks.put(task)
                waiting.append(task)
                samples, size_bytes = samples + len(group), size_bytes + task.size_bytes
                while samples > self._ahead or (size_bytes > AHEAD_BYTES and len(waiting) > 1):
                    first = waiting.popleft()
                    samples, size_bytes = samples - len(first.raws), size_bytes - first.size_bytes
                    yield from zip(first.raws, first.future.result(), strict=True)
            while waiting:
                first = waiting.popleft()
                yield from zip(first.raws, first.future.result(), strict=True)
        finally:
            for task in waiting:
                task.future.cancel()


def _groups(raws: Iterable[RawSample]) -> Generator[list[RawSample], None, None]:
    """Yield the samples in lists of GROUP, shorter where the files are large: memory is bounded by bytes."""
    group: list[RawSample] = []
    size_bytes = 0
    for raw in raws:
        group.append(raw)
        size_bytes += len(raw.image)
        if len(group) == GROUP or size_bytes > AHEAD_BYTES // GROUP:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group
