"""`ldm evaluate` from the command line: a table for people, JSON for programs, and settings laid over the run's."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.measure import evaluate_here
from launch.nodes import place
from pipeline.config_file import dump_config
from tests.builders import TinyRun, tiny_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = tiny_run(tmp_path_factory.mktemp("measure"), sample={"steps": 2}, evaluate={"timesteps": 2})
    run.paths.config.write_text(dump_config(run.config))
    return run


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyRun]:
    whole_run.pretend_checkpoint(monkeypatch)
    monkeypatch.setenv("LDM_QUIET", "1")
    threads = torch.get_num_threads()
    yield whole_run
    torch.set_num_threads(threads)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    return output.out


def test_json_is_what_is_written_and_the_table_says_the_same(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = str(run.paths.root), "evaluate.metrics=[kid, clip]"
    result = json.loads(said(capsys, folder, metrics, "--json"))
    assert result == json.loads(run.paths.evaluation.read_text())
    assert result["pictures"]["kid"]["subsets"]["count"] == 100
    shown = said(capsys, folder, metrics)
    assert f"{result['pictures']['kid']['value']:.4f}" in shown and f"{result['ema']['loss']:.4f}" in shown


def test_weights_are_those_asked_for_and_the_loss_alone_is_the_default(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(said(capsys, str(run.paths.root), "--weights", "raw", "--json"))
    assert result["kinds"] == ["raw"] and "ema" not in result and "pictures" not in result
    assert evaluate_here(run.paths, run.config, ["raw"], place({})) == result


def test_a_reference_that_is_not_there_is_said_in_a_line(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "with space")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run.paths.root), "evaluate.metrics=[kid]", "--reference", missing])
    assert (
        ended.value.code == 2 and f"evaluate.reference: {missing} is not a folder" in capsys.readouterr().err
    )
