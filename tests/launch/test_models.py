"""`ldm import` from the command line."""

from pathlib import Path

import pytest
import torch

from launch.cli import main
from pipeline.config_file import load_config
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import save_unet

DEMO = Path(__file__).parents[2] / "configs" / "small.yaml"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a U-Net's folder; its name would be a number in YAML."""
    with torch.device("cpu"):
        save_unet(UNet(load_config(DEMO).model), tmp_path / "1e5")
    return tmp_path / "1e5"


def ldm(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_import_writes_the_config_and_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ldm("import", source.name, DEMO, "name=mine", "train.freeze=[down_blocks]", "train.steps=7") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "runs/mine/config.yaml written; go on with: ldm train runs/mine/config.yaml"
    config = load_config(tmp_path / "runs" / "mine" / "config.yaml")
    assert config.warm_start is not None and config.warm_start.source == "1e5"
    assert (config.train.freeze, config.train.steps) == (("down_blocks",), 7)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--optimizer"], "warm_start.optimizer: true"),
        (["--step", "4"], "warm_start.step: 4"),
        (["train.freeze=[nothing]"], "'nothing' names no weight"),
        (["model.in_channels=0"], "model.in_channels"),
    ],
)
def test_a_wrong_import_is_one_line_and_exit_code_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert ldm("import", source, DEMO, f"runs={tmp_path}", "name=mine", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
