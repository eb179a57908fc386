"""The loader under `torch.utils.data.DataLoader`, for those who want its workers: safe to fork and to spawn.

Our own training needs none of it: threads of one process are cheaper for latents. The state is one number, as
torchdata's `StatefulDataLoader` expects it of a data set.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.loader import LatentBatch, LatentLoader


class LatentIterable(IterableDataset[LatentBatch]):
    """The micro-batches of one rank, without end; give it to `DataLoader(..., batch_size=None)`.

    Worker w of n makes the micro-batches w, w + n, ...: the DataLoader takes turns, so their order is that of
    `LatentLoader.steps` for any number of workers.
    """

    def __init__(self, open_loader: Callable[[], LatentLoader], consumed: int = 0) -> None:
        """Begin at `consumed` samples of the run.

        `open_loader` must be picklable where workers are spawned; each worker calls it once, so no descriptor and no
        lock crosses a fork.
        """
        self._open_loader, self._consumed, self._done = open_loader, consumed, 0

    def __iter__(self) -> Iterator[LatentBatch]:
        """Yield from where the state stands."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Built here, in the process that reads: a loader of the parent may hold locks and descriptors.
        loader = self._open_loader()
        start = self._done
        parts = itertools.islice(loader.parts(self._consumed), number + start * workers, None, workers)
        for part in parts:
            batch = loader.batch(part)
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return where this process (or worker) stands: micro-batches done since `consumed`."""
        return {"consumed": self._consumed, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same rank, world size and number of workers.

        Across those, start anew with `consumed`: it alone is the state of the run.
        """
        self._consumed, self._done = int(state["consumed"]), int(state["done"])
