"""Reading with a policy for samples that cannot be read: stop, or another sample of the same shape, recorded."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.mixture import Lookup, Mixture
from pipeline.diffusion import draws
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

ATTEMPTS = 8


class Substitutes:
    """Fills arrays with the samples of positions; what took whose place is kept in `taken`."""

    def __init__(self, order: Mixture, seed: int, data: DataConfig, taken: Mapping[int, int]) -> None:
        """Begin with the substitutions `taken` before: position -> sample number."""
        self._order, self._seed = order, seed
        self._substitute, self._verify = data.on_bad_sample == "substitute", data.verify == "all"
        self.taken = dict(taken)

    def apply(self, positions: np.ndarray, found: Lookup) -> Lookup:
        """Return the look-up with the substitutions known so far."""
        if not self.taken:
            return found
        sets, indices = found.sets.copy(), found.indices.copy()
        for number, position in enumerate(positions.tolist()):
            if position in self.taken:
                sets[number], indices[number] = self._order.sample_of(self.taken[position])
        return Lookup(found.shape, sets, indices)

    def read(
        self, positions: np.ndarray, found: Lookup, arrays: dict[str, np.ndarray], *, with_records: bool
    ) -> list[dict[str, Any]]:
        """Fill `arrays` and return the json of each sample (empty unless asked for).

        `found` says afterwards what was read.

        Raises:
            DataError, OSError: naming every sample that cannot be read, with the policy "stop" or after 8 substitutes.
        """
        records: list[dict[str, Any]] = [{} for _ in positions] if with_records else []
        failed: dict[int, DataError | OSError] = {}
        numbers = np.unique(found.sets).tolist()
        for set_number in numbers:
            rows = np.flatnonzero(found.sets == set_number)
            dataset, whole = self._order.sets[set_number], len(numbers) == 1
            into = arrays if whole else dataset.empty_arrays(found.shape.bucket, len(rows))
            read = dataset.read_batch(found.indices[rows], into, records=with_records, verify=self._verify)
            if not whole:
                for name, array in into.items():
                    arrays[name][rows] = array
            failed |= {int(rows[number]): error for number, error in read.failed.items()}
            for number, record in enumerate(read.records):
                records[rows[number]] = record
        if failed and not self._substitute:
            raise _all_in_one(failed)
        for number, error in failed.items():
            record = self._replace(int(positions[number]), number, found, arrays, error, with_records)
            if with_records:
                records[number] = record
        return records

    def _replace(
        self,
        position: int,
        number: int,
        found: Lookup,
        arrays: dict[str, np.ndarray],
        error: DataError | OSError,
        with_records: bool,
    ) -> dict[str, Any]:
        """Read another sample of the same data set and bucket into row `number`."""
        set_number = int(found.sets[number])
        group = next(group for group in found.shape.groups if group.set_number == set_number)
        dataset = self._order.sets[set_number]
        last = error
        for attempt in range(ATTEMPTS):
            place = draws.substitute(self._seed, position, group.order.count, attempt)
            index = group.indices[np.array([place])]
            single = {name: array[number : number + 1] for name, array in arrays.items()}
            read = dataset.read_batch(index, single, records=with_records, verify=self._verify)
            if not read.failed:
                found.indices[number] = index[0]
                self.taken[position] = int(self._order.numbers(found)[number])
                logger.warning(
                    "position %d: %s; sample %d takes its place", position, error, self.taken[position]
                )
                return read.records[0] if with_records else {}
            last = read.failed[0]
        raise last


def _all_in_one(failed: Mapping[int, DataError | OSError]) -> DataError | OSError:
    """Return one error that says all: damage if any is, since that stays when the job is tried again."""
    lines = "; ".join(str(error) for error in failed.values())
    if any(isinstance(error, DataError) for error in failed.values()):
        return DataError(lines)
    return next(iter(failed.values())) if len(failed) == 1 else OSError(lines)
