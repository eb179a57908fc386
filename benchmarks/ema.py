"""What an update of the average costs: ours against diffusers' `EMAModel.step`, on the shapes of an SD U-Net.

python -m benchmarks.ema --at-least 4
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from benchmarks.harness import MARKDOWN_HEADER, Rounds, Side, compare, gate, markdown_row
from pipeline.config import EmaConfig
from pipeline.config_file import load_config
from pipeline.models.unet import UNet
from pipeline.training.averages.ema import Ema

REPOSITORY = Path(__file__).resolve().parents[1]
CHANNELS = (96, 192, 384, 384)


@dataclass(frozen=True)
class Owned:
    """One whole tensor as the average sees it."""

    master: Tensor


@dataclass(frozen=True)
class AllOwned:
    """The fragments of one rank alone."""

    owned: tuple[Owned, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Check that both averages are equal after three steps, time them, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ema", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument(
        "--at-least", type=float, help="fail where the peer may take less than this times ours"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in sd_shapes()]
    ours = Ema(AllOwned(tuple(Owned(p.detach().view(-1)) for p in parameters)), EmaConfig())  # type: ignore[arg-type]
    peer = EMAModel(parameters, decay=0.9999)

    def step_ours() -> list[Tensor]:
        ours.update()
        return ours.averages

    def step_peer() -> list[Tensor]:
        peer.step(parameters)
        return peer.shadow_params

    # The peer's first step copies; while nothing has moved ours comes to the same.
    step_ours(), step_peer()
    with torch.no_grad():
        torch._foreach_mul_(parameters, 1.01)
    comparison = compare(
        Side("ours", step_ours),
        Side("diffusers EMAModel.step", step_peer),
        name="ema_update",
        out_dir=options.out_dir,
        check=same,
        rounds=Rounds(measured=options.rounds),
    )
    print(f"{len(parameters)} tensors, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters")
    print(MARKDOWN_HEADER, markdown_row(comparison), sep="\n")
    if options.at_least is not None:
        gate(comparison, at_least=options.at_least)
    return 0


def sd_shapes() -> list[torch.Size]:
    """Return the shapes of the SD 1.5 U-Net's 686 tensors at 0.3 of its width."""
    model = load_config(REPOSITORY / "configs" / "sd15-512.yaml", ()).model
    with torch.device("meta"):
        network = UNet(model.model_copy(update={"block_out_channels": CHANNELS}))
    return [parameter.shape for parameter in network.parameters()]


def same(ours: list[Tensor], peers: list[Tensor]) -> bool:
    """Return whether the averages agree to the rounding of fp32."""
    pairs = zip(ours, peers, strict=True)
    return all(torch.allclose(a, b.view(-1), rtol=1e-6, atol=1e-7) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
