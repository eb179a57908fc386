"""The U-Net benchmark at its smallest size."""

from pathlib import Path

import pytest
import torch

from benchmarks import unet
from benchmarks.harness import CheckError, read_csv

SMALLEST = ["--sizes", "demo", "--rounds", "6", "--warmup", "0"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = unet.UNetConfig(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    monkeypatch.setattr(unet, "sizes", lambda: {"demo": unet.Size(small, side=4, batch=2)})


@pytest.mark.usefixtures("tiny")
def test_writes_the_comparison_and_the_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unet.main([*SMALLEST, "--out-dir", str(tmp_path)]) == 0
    comparison = read_csv(tmp_path / "unet_demo.csv")
    assert comparison.side_b == "diffusers" and comparison.conditions["check"] == "passed"
    table = (tmp_path / "unet.md").read_text()
    assert capsys.readouterr().out == table
    ours, theirs = (int(cell) for cell in table.splitlines()[-1].split("|")[2:4])
    assert 0 < ours < theirs


@pytest.mark.usefixtures("tiny")
def test_unlike_numbers_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = unet.UNet.forward
    monkeypatch.setattr(unet.UNet, "forward", lambda *inputs: plain(*inputs) * 1.01)
    with pytest.raises(CheckError, match=r"unet_demo: .* differ, nothing was timed"):
        unet.main([*SMALLEST, "--out-dir", str(tmp_path)])


def test_the_sizes_are_the_demos_a_tenth_and_sd15s() -> None:
    with torch.device("meta"):
        millions = {
            name: sum(p.numel() for p in unet.UNet(s.config).parameters()) / 1e6
            for name, s in unet.sizes().items()
        }
    assert millions["sd15"] == pytest.approx(859.520964)
    assert 0.05 < millions["tenth"] / millions["sd15"] < 0.15 and millions["demo"] < 20
