"""To the first batch after a resume: our seek against accelerate's `skip_first_batches` over webdataset's reader.

    python -m benchmarks.resume --skipped 2048

Both have the same tars and are to go on after the same number of samples. Ours is opened and sought by arithmetic;
`skip_first_batches` reads and throws away. Its time grows with what is skipped, ours does not: both are shown at two
distances.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import webdataset
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from benchmarks.loaders.samples import build
from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.latents.reader import LatentDataset
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH, SAMPLES = 64, 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run both distances; write CSV, PNG and `resume.md`, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold for the longer one.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument(
        "--skipped", type=int, default=2048, help="samples before the resume; a quarter of it too"
    )
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds")
    parser.add_argument(
        "--at-least", type=float, help="fail where replaying may take less than this times seeking"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = build(Path(folder), "8KB", SAMPLES)
        comparisons = [
            _compare(dataset, skipped, options) for skipped in (options.skipped // 4, options.skipped)
        ]
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(options.out_dir / "resume.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if options.at_least is not None:
        gate(comparisons[-1], at_least=options.at_least)
    return 0


def _compare(dataset: Path, skipped: int, options: argparse.Namespace) -> Comparison:
    return compare(
        Side("ours, sought", _sought(dataset, skipped)),
        Side("skip_first_batches", _replayed(dataset, skipped)),
        name=f"resume_after_{skipped}",
        out_dir=options.out_dir,
        check=lambda mine, theirs: mine.shape == theirs.shape,
        rounds=Rounds(measured=options.rounds, warmup=1),
    )


def _sought(dataset: Path, skipped: int) -> Callable[[], Tensor]:
    def resume() -> Tensor:
        with closing(LatentDataset(dataset)) as reader:
            loader = LatentLoader(
                reader,
                seed=0,
                engine=EngineConfig(global_batch=BATCH, micro_batch=BATCH),
                objective=ObjectiveConfig(),
                data=DataConfig(verify="off"),
                rank=0,
                world_size=1,
            )
            with closing(loader.steps(skipped)) as stream:
                return next(stream)[0].moments

    return resume


def _replayed(dataset: Path, skipped: int) -> Callable[[], Tensor]:
    tars = sorted(map(str, dataset.glob("*/*.tar")))

    def resume() -> Tensor:
        samples = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("latent.npy")
        loader = DataLoader(samples, batch_size=BATCH)  # type: ignore[arg-type]
        (latents,) = next(iter(skip_first_batches(loader, skipped // BATCH)))
        return torch.as_tensor(np.asarray(latents))

    return resume


if __name__ == "__main__":
    sys.exit(main())
