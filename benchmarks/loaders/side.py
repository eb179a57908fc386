"""`python -m benchmarks.loaders.side READER DATASET`: reads an epoch for each line on stdin, says what it cost.

Answers with one JSON line: samples, distinct ids, wall and CPU seconds of this process and its children. Batches of
64, arrays stacked, nothing done with them. Runs in the environment that has the reader's packages.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

BATCH = 64
NPY_HEADER_BYTES = 128
Batch = tuple[list[Any], dict[str, np.ndarray]]


def ours(dataset: Path, *, draws: bool = False) -> Iterator[Batch]:
    """Our loader: positional reads into batch memory, in the order `global`; with `draws` whole batches.

    One thread reads, as in the others: several cost more CPU than they save where nothing waits for a disk.
    """
    from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
    from pipeline.data.loader import LatentLoader
    from pipeline.latents.reader import LatentDataset

    opened = LatentDataset(dataset)
    engine = EngineConfig(global_batch=BATCH, micro_batch=BATCH)
    data = DataConfig(order="global", verify="off", threads=1)
    loader = LatentLoader(
        opened, seed=0, engine=engine, objective=ObjectiveConfig(), data=data, rank=0, world_size=1
    )
    stream = loader.steps(0) if draws else loader.reads(0)
    with closing(stream) as batches:
        for _ in range(len(opened) // BATCH):
            (batch,) = next(batches)
            if draws:
                yield batch.indices.tolist(), {"latent": batch.moments.numpy()}
            else:
                numbers, tensors = batch
                yield numbers.tolist(), {name: tensor.numpy() for name, tensor in tensors.items()}


def ours_with_draws(dataset: Path) -> Iterator[Batch]:
    """Whole training batches: noise, posterior noise and the other draws beside the arrays."""
    return ours(dataset, draws=True)


def webdataset_decode(dataset: Path) -> Iterator[Batch]:
    """The stock pipeline: tar iteration and `.decode()`, sequential."""
    import webdataset

    tars = sorted(str(path) for path in dataset.glob("*/*.tar"))
    names = _members(dataset)
    return _stacked(
        (sample["__key__"], {name: sample[f"{name}.npy"] for name in names})
        for sample in webdataset.WebDataset(tars, shardshuffle=False).decode()
    )


def webdataset_raw(dataset: Path) -> Iterator[Batch]:
    """The stock tar iteration without its decoder: the payload behind the npy header, by hand."""
    import webdataset

    tars = sorted(str(path) for path in dataset.glob("*/*.tar"))
    names = _members(dataset)

    def samples() -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        for sample in webdataset.WebDataset(tars, shardshuffle=False):
            yield (
                sample["__key__"],
                {
                    name: np.frombuffer(
                        sample[f"{name}.npy"],
                        np.uint16 if name == "tokens" else np.float16,
                        offset=NPY_HEADER_BYTES,
                    )
                    for name in names
                },
            )

    return _stacked(samples())


def litdata(dataset: Path) -> Iterator[Batch]:
    """litdata's own chunks, written once beside the tars, read in order (its shuffle costs more)."""
    from litdata import StreamingDataset

    chunks = dataset.parent / f"{dataset.name}-litdata"
    names = _members(dataset)
    return _stacked(
        (int(sample["id"]), {name: np.asarray(sample[name]) for name in names})
        for sample in StreamingDataset(str(chunks))
    )


def prepare_litdata(dataset: Path) -> None:
    """Convert the tars to litdata's chunks."""
    import webdataset
    from litdata.streaming.writer import BinaryWriter

    chunks = dataset.parent / f"{dataset.name}-litdata"
    if (chunks / "index.json").exists():
        return
    chunks.mkdir(exist_ok=True)
    writer = BinaryWriter(str(chunks), chunk_bytes=64 << 20)
    tars = sorted(str(path) for path in dataset.glob("*/*.tar"))
    for number, sample in enumerate(webdataset.WebDataset(tars, shardshuffle=False).decode()):
        item = {name: sample[f"{name}.npy"] for name in _members(dataset)}
        writer.add_item(
            number, {"id": number, **{name: np.ascontiguousarray(array) for name, array in item.items()}}
        )
    writer.done()
    writer.merge()


def energon(dataset: Path) -> Iterator[Batch]:
    """Megatron-Energon's loader on the same tars, prepared by its own tool, without a shuffle buffer."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )

    names = _members(dataset)

    @edataclass
    class Pair(Sample):
        arrays: dict

    @stateless
    def cook(sample: dict) -> Pair:
        return Pair(**basic_sample_keys(sample), arrays={name: sample[f"{name}.npy"] for name in names})

    class Encoder(DefaultTaskEncoder[Pair, Pair, Any, Any]):
        cookers: ClassVar = [Cooker(cook)]

        def batch(self, samples: list[Pair]) -> Any:
            stacked = {name: np.stack([sample.arrays[name] for sample in samples]) for name in names}
            return [sample.__key__ for sample in samples], stacked

        def encode_batch(self, batch: Any) -> Any:
            return batch

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    linked = dataset.parent / f"{dataset.name}-energon"
    found = get_train_dataset(
        str(linked),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=config,
        task_encoder=Encoder(),
        repeat=False,
    )
    yield from get_loader(found)


def prepare_energon(dataset: Path) -> None:
    """Index the tars with energon's own tool."""
    import subprocess

    linked = dataset.parent / f"{dataset.name}-energon"
    if (linked / ".nv-meta" / "dataset.yaml").exists():
        return
    linked.mkdir(exist_ok=True)
    for path in sorted(dataset.glob("*/*.tar")):
        (linked / path.name).hardlink_to(path)
    tool = Path(sys.executable).with_name("energon")
    subprocess.run(
        [
            str(tool),
            "prepare",
            "--non-interactive",
            "--skip-dataset-yaml",
            "--split-parts",
            "train:.*",
            str(linked),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    (linked / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )


def _members(dataset: Path) -> tuple[str, ...]:
    return ("latent", "tokens") if dataset.name.startswith("8KB") else ("latent", "text", "tokens")


def _stacked(samples: Iterator[tuple[Any, dict[str, np.ndarray]]]) -> Iterator[Batch]:
    ids: list[Any] = []
    parts: list[dict[str, np.ndarray]] = []
    for identity, arrays in samples:
        ids.append(identity)
        parts.append(arrays)
        if len(ids) == BATCH:
            yield ids, {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            ids, parts = [], []


READERS: dict[str, Callable[[Path], Iterator[Batch]]] = {
    "ours": ours,
    "ours-with-draws": ours_with_draws,
    "webdataset-decode": webdataset_decode,
    "webdataset-raw": webdataset_raw,
    "litdata": litdata,
    "energon": energon,
}
PREPARE = {"litdata": prepare_litdata, "energon": prepare_energon}


def _cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Read an epoch for each line on stdin."""
    name, dataset = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # What a library prints is no answer.
    PREPARE.get(name, lambda dataset: None)(dataset)
    for _ in sys.stdin:
        wall, cpu, ids, content = time.perf_counter(), _cpu_seconds(), list[Any](), 0
        for batch_ids, arrays in READERS[name](dataset):
            ids += batch_ids
            content = sum(array.nbytes for array in arrays.values())
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": _cpu_seconds() - cpu}
        found = {"samples": len(ids), "distinct": len(set(ids)), "batch_bytes": content}
        print(json.dumps(cost | found), file=answers, flush=True)


if __name__ == "__main__":
    main()
