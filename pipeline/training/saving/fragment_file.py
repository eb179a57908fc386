"""One rank's fragments as a safetensors file, keys `KIND/NAME/START`: any cut of the state is read from any other."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.training.saving.writer import write_file


@dataclass(frozen=True)
class Stretch:
    """Elements [start, start + numel) of the flattened parameter `name` in one `kind` of state.

    Kinds: "master", "exp_avg", "exp_avg_sq" and "ema"; `tensor` is float32 and one-dimensional.
    """

    kind: str
    name: str
    start: int
    tensor: Tensor

    @property
    def key(self) -> str:
        """The name of the tensor in the file."""
        return f"{self.kind}/{self.name}/{self.start}"


def write_stretches(
    path: Path, stretches: Sequence[Stretch], stop: threading.Event | None = None
) -> dict[str, int | str]:
    """Write stretches in host memory to the new file at `path`, fsynced, and return its {"bytes", "sha256"}."""
    tensors: dict[str, memoryview] = {}
    for stretch in stretches:
        assert stretch.tensor.dtype == torch.float32 and stretch.tensor.ndim == 1, stretch.key
        assert stretch.key not in tensors, stretch.key
        tensors[stretch.key] = stretch.tensor.detach().contiguous().numpy().data.cast("B")
    return write_file(path, tensors, stop)


def read_into(paths: Sequence[Path], wanted: Sequence[Stretch]) -> None:
    """Fill every wanted tensor from whatever overlaps it in the files; stops when all are full.

    Raises:
        CheckpointError: naming the stretches that the files do not hold.
    """
    by_parameter: dict[tuple[str, str], list[Stretch]] = {}
    for stretch in wanted:
        by_parameter.setdefault((stretch.kind, stretch.name), []).append(stretch)
    missing = {stretch.key: stretch.tensor.numel() for stretch in wanted}
    for path in paths:
        if not any(missing.values()):
            return
        for key, count in _read_overlaps(path, by_parameter):
            missing[key] -= count
    lacking = sorted(key for key, count in missing.items() if count)
    if lacking:
        raise CheckpointError(
            f"{paths[0].parent if paths else 'no files'}: lacks {len(lacking)} of {len(wanted)} pieces of the state "
            f"({', '.join(lacking[:5])}); take an older checkpoint, or train this model from the start"
        )


def read_whole(paths: Sequence[Path], kind: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the whole tensors of one kind, float32 on the CPU, merged from the stretches in the files.

    Raises:
        CheckpointError: naming the tensors of which something is missing.
    """
    whole = {name: torch.empty(tuple(shape), dtype=torch.float32) for name, shape in shapes.items()}
    read_into(paths, [Stretch(kind, name, 0, tensor.view(-1)) for name, tensor in whole.items()])
    return whole


def _read_overlaps(
    path: Path, by_parameter: Mapping[tuple[str, str], Sequence[Stretch]]
) -> Iterator[tuple[str, int]]:
    """Copy what the file has of the wanted stretches; yield (key of the wanted one, elements copied)."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                kind, _, rest = key.partition("/")
                name, _, start_text = rest.rpartition("/")
                stretches = by_parameter.get((kind, name))
                if not stretches:
                    continue
                saved = file.get_slice(key)
                start = int(start_text)
                stop = start + saved.get_shape()[0]
                for stretch in stretches:
                    first = max(start, stretch.start)
                    last = min(stop, stretch.start + stretch.tensor.numel())
                    if first < last:
                        target = stretch.tensor[first - stretch.start : last - stretch.start]
                        target.copy_(saved[first - start : last - start])
                        yield stretch.key, last - first
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a fragment file ({error})") from error
