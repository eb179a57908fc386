"""U-Net forward and backward: ours against diffusers' on the CPU, the very same weight tensors on both sides.

    python -m benchmarks.unet                              # three sizes, SD 1.5's U-Net among them (about 8 GiB)
    python -m benchmarks.unet --sizes demo --at-least 0.98

Side A is ours, so a ratio above 1 says that diffusers takes longer. Before the clock starts both must give the
same prediction and the same gradient of every weight. The operators that each side dispatches are counted too.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from pipeline.config import UNetConfig
from pipeline.config_file import load_config
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import diffusers_config
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENS = 77
Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Size:
    """A U-Net, and what it is run on."""

    config: UNetConfig
    side: int
    batch: int


def sizes() -> dict[str, Size]:
    """Return the U-Net of the demo, one of a tenth of SD 1.5's parameters, and SD 1.5's on small latents."""
    demo = load_config(REPOSITORY / "configs" / "small.yaml").model
    tenth = UNetConfig(block_out_channels=(96, 192, 384, 384), cross_attention_dim=256)
    return {
        "demo": Size(demo, side=16, batch=8),
        "tenth": Size(tenth, side=32, batch=1),
        "sd15": Size(UNetConfig(), side=32, batch=1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons; write CSV, PNG and `unet.md`, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold; CheckError where the two sides differ.
    """
    known = sizes()
    options = _parser(list(known)).parse_args(argv)
    rounds = Rounds(measured=options.rounds, warmup=options.warmup)
    comparisons, counts = [], []
    for name in options.sizes:
        comparison, count = _against_diffusers(name, known[name], options.out_dir.resolve(), rounds)
        comparisons.append(comparison)
        counts.append(count)
    rows = [MARKDOWN_HEADER, *map(markdown_row, comparisons), "", *COUNT_HEADER, *counts]
    table = "\n".join(rows)
    with whole_file(options.out_dir / "unet.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if options.at_least is not None:
        for comparison in comparisons:
            gate(comparison, at_least=options.at_least)
    return 0


COUNT_HEADER = ("| operators dispatched, forward and backward | ours | diffusers |", "|---|---|---|")


def _against_diffusers(name: str, size: Size, out_dir: Path, rounds: Rounds) -> tuple[Comparison, str]:
    """Return the comparison, and a row with the operators of each side."""
    torch.manual_seed(0)
    ours = UNet(size.config)
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel.from_config(diffusers_config(size.config))
    # Assigned, not copied: the same tensors in memory, and half of it.
    theirs.load_state_dict(dict(ours.named_parameters()), strict=True, assign=True)
    theirs.train()
    latents = torch.randn(size.batch, size.config.in_channels, size.side, size.side)
    timesteps = torch.randint(0, 1000, (size.batch,))
    text = torch.randn(size.batch, TOKENS, size.config.cross_attention_dim)
    work_a = _step(ours, lambda: ours(latents, timesteps, text))
    work_b = _step(ours, lambda: theirs(latents, timesteps, text, return_dict=False)[0])
    count = f"| {name} | {_operators(work_a)} | {_operators(work_b)} |"
    parameters = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    label = f"{parameters:.0f} M, {size.batch} x {size.side}x{size.side}"
    sides = Side(f"ours ({label})", work_a), Side("diffusers", work_b)
    return compare(*sides, name=f"unet_{name}", out_dir=out_dir, check=_same, rounds=rounds), count


def _step(network: UNet, predict: Callable[[], Tensor]) -> Work:
    weights = list(network.parameters())

    def work() -> tuple[Tensor, ...]:
        prediction = predict()
        return (prediction, *torch.autograd.grad(prediction.square().mean(), weights))

    return work


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def _operators(work: Work) -> int:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Count() as counted:
        work()
    return counted.calls


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unet", description="Time U-Net forward and backward against diffusers'."
    )
    parser.add_argument("--sizes", nargs="+", choices=names, default=names, help="which of the U-Nets")
    parser.add_argument(
        "--rounds", type=int, default=12, help="measured rounds, one run of each side in each"
    )
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--at-least", type=float, help="fail where the interval of the ratio reaches below this"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
