"""The validation splits of all data sets that a run trains on, end to end, as if they were one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sets import known_datasets, open_datasets
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import LatentSample
from pipeline.latents.spec import Bucket, LatentSpec

SPLIT = "validation"


class HeldOut:
    """Samples that no training sees, numbered through all data sets; those of one set and bucket are neighbours."""

    def __init__(self, sets: Sequence[LatentDataset], most: int | None = None) -> None:
        """Join validation splits; of more than `most` samples in all each set gives its share, from its beginning."""
        self.sets = list(sets)
        lengths = np.array([len(dataset) for dataset in self.sets], np.int64)
        self._starts = np.cumsum([0, *_shares(lengths, most)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> LatentSample:
        """Return the sample with this number."""
        dataset, index = self._place(number)
        return dataset.read(index)

    def bucket(self, number: int) -> Bucket:
        """Return the height and width in pixels of the sample with this number."""
        dataset, index = self._place(number)
        return dataset.table.place(index).bucket

    def captions(self, most: int) -> list[str]:
        """Return the first captions of at most `most` samples from all over the splits."""
        count = min(len(self), most)
        return [self.read(n * len(self) // count).record["captions"][0] for n in range(count)]

    def close(self) -> None:
        """Close all shards."""
        for dataset in self.sets:
            dataset.close()

    @property
    def spec(self) -> LatentSpec:
        """The spec that all sets have, or the training would have refused them."""
        return self.sets[0].spec

    @property
    def encoder(self) -> Mapping[str, str]:
        """The digests of the encoders that made all sets."""
        return self.sets[0].manifest.encoder

    @property
    def where(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(dataset.folder) for dataset in self.sets)

    def _place(self, number: int) -> tuple[LatentDataset, int]:
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sets[place], number - int(self._starts[place])


def open_held_out(data: DataConfig, default: Path, most: int | None = None) -> HeldOut:
    """Return the validation splits of the data sets that `data` names. Raises as `open_datasets`."""
    return HeldOut(open_datasets(data, default, SPLIT), most)


def known_captions(data: DataConfig, default: Path, most: int) -> list[str]:
    """Return validation captions of the data sets that are still there, none if none is."""
    held = HeldOut(known_datasets(data, default, SPLIT))
    captions = held.captions(most)
    held.close()
    return captions


def _shares(lengths: np.ndarray, most: int | None) -> np.ndarray:
    """Return how many of each set are taken: in proportion, `most` in all or as many as there are."""
    total = int(lengths.sum())
    if most is None or total <= most:
        return lengths
    ends = np.cumsum(lengths) * most // total
    return np.diff(ends, prepend=0)
