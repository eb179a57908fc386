"""A step of AdamW: torch's fused one, as the engine uses it, against the default that diffusers' examples use.

    python -m benchmarks.optimizer --at-least 5

Every seventh of SD 1.5's 686 tensors at its own width, 98 tensors of 110 million parameters, one thread. (At 0.3 of the
width most of them fit into a core's cache, where the default's many passes cost less than in training.)
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ema import REPOSITORY
from benchmarks.harness import MARKDOWN_HEADER, Rounds, Side, compare, gate, markdown_row
from pipeline.config_file import load_config
from pipeline.models.unet import UNet
from pipeline.publish import whole_file

EVERY = 7


def main(argv: Sequence[str] | None = None) -> int:
    """Check that both move the weights alike, time them, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument(
        "--at-least", type=float, help="fail where the default may take less than this times the fused"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    comparison = compare(
        Side("fused AdamW", _steps(fused=True)),
        Side("torch.optim.AdamW, default", _steps(fused=False)),
        name="optimizer",
        out_dir=options.out_dir,
        check=_same,
        rounds=Rounds(measured=options.rounds),
    )
    table = "\n".join([MARKDOWN_HEADER, markdown_row(comparison)])
    with whole_file(options.out_dir / "optimizer.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if options.at_least is not None:
        gate(comparison, at_least=options.at_least)
    return 0


def _steps(*, fused: bool) -> Callable[[], list[Tensor]]:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in _shapes()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW(weights, lr=1e-3, **({"fused": True} if fused else {}))  # type: ignore[arg-type]

    def step() -> list[Tensor]:
        adamw.step()
        return [weight.detach() for weight in weights]

    return step


def _shapes() -> list[torch.Size]:
    with torch.device("meta"):
        network = UNet(load_config(REPOSITORY / "configs" / "sd15-512.yaml", ()).model)
    return [weight.shape for weight in network.parameters()][::EVERY]


def _same(a: list[Tensor], b: list[Tensor]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    sys.exit(main())
