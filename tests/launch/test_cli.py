"""The door: help at once, one clear line and an exit code for a mistake, nothing written."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.demo import Painted
from launch.verbs.answers import JSON, NO_ANSWER
from pipeline.progress import QUIET
from pipeline.training.train import TrainResult

ROOT = Path(__file__).parent.parent.parent
VERBS = (
    "demo init check plan doctor train-autoencoder train-clip encode finalize verify report train evaluate sample gallery export "
    "submit sync status"
).split()
LONG_VERBS = (
    "demo init train-autoencoder train-clip encode finalize verify report train evaluate sample gallery export ema import sync"
).split()


def ldm(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_every_verb() -> None:
    said = ldm("--help")
    assert said.returncode == 0
    assert all(verb in said.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    said = ldm(verb, "--help")
    assert said.returncode == 0 and f"Example: ldm {verb}" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["check", "configs/nowhere.yaml"], 2, "no such config file"),
        (["check", "configs/small.yaml", "engine.globl_batch=3"], 2, "did you mean 'global_batch'?"),
        (["check", "configs/small.yaml", "engine.global_batch=1"], 2, "smaller than processes 2"),
        (["check", "configs/small.yaml", "encode.source=nowhere"], 2, "encode.source: nowhere is no folder"),
        (["check", "configs/small.yaml", "model.cross_attention_dim=64"], 2, "first_stage.clip.width is 128"),
        (["check", "configs/small.yaml", "data.on_bad_sample=skip"], 2, "'stop' or 'substitute'"),
        (
            ["check", "configs/small.yaml", "encode.image_size=72", "first_stage.clip.patch=8"],
            2,
            "a multiple of 16",
        ),
        (
            ["check", "configs/small.yaml", "first_stage.autoencoder.crop=128"],
            2,
            "crop: 128 pixels, but encode",
        ),
        (["check", "configs/small.yaml", "first_stage.processes=3"], 2, "batch 8 is not a multiple of"),
        (["demo", "--long", "--fast"], 2, "it goes with neither --fast nor a CONFIG"),
        (["demo", "--long", "configs/small.yaml"], 2, "it goes with neither --fast nor a CONFIG"),
        (["train", "configs/small.yaml", "data.dataset=nowhere"], 3, "run `ldm encode`"),
        (["train", "configs/small.yaml", "engine.processes=1"], 3, "run `ldm encode`"),
        (["submit", "configs/small.yaml"], 2, "`--stage all` makes it first"),
        (["evaluate", "nowhere"], 2, "not a run folder"),
        (["status", "nowhere"], 2, "neither a run folder"),
        (["verify", "nowhere"], 3, "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    answer = ldm(*arguments, cwd=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert said in answer.stderr and "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["configs", "examples"]


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_data_set_that_does_not_fit_is_refused_with_both_values(tmp_path: Path, verb: str) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    golden = ROOT / "tests" / "golden" / "format1"
    width = json.loads((golden / "manifest.json").read_text())["spec"]["text_width"]
    answer = ldm(verb, "configs/small.yaml", f"data.dataset={golden}", cwd=tmp_path)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert f"model.cross_attention_dim is 128, the data set's text width is {width}" in answer.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["configs"]


def test_a_data_set_without_manifest_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(ROOT / "tests" / "golden" / "format1", tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    answer = ldm("train", "configs/small.yaml", "data.dataset=set", cwd=tmp_path)
    assert answer.returncode == 3 and "has no manifest.json: run `ldm finalize`" in answer.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["trian", "x"], ["check"], ["verify", "x", "--sampels", "3"]])
def test_a_wrong_call_shows_the_usage(arguments: list[str]) -> None:
    said = ldm(*arguments)
    assert said.returncode == 2 and "Usage: " in said.stderr and "Traceback" not in said.stderr


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(path: Path, overrides: list[str]) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.check.check_config", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["check", "configs/small.yaml"])
    assert left.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ldm: interrupted; run the same command to go on"


@pytest.mark.parametrize("given", [[], ["--accept-data-change"]])
def test_the_word_for_changed_data_reaches_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    """By the command of the processes that it starts, and as an argument of the one that it is."""
    started: list[list[str]] = []
    accepted: list[bool] = []
    monkeypatch.setattr("launch.check.refuse_untrainable", lambda run, paths, where: None)
    monkeypatch.setattr("launch.local.run_local", lambda again, *rest, **named: started.append(again) or 0)
    monkeypatch.setattr(
        "launch.rank.train_rank",
        lambda run, paths, placement, *, accept_data_change: (
            accepted.append(accept_data_change) or TrainResult(7, 28, 0.5, stopped=False)
        ),
    )
    for processes in (2, 1):
        with pytest.raises(SystemExit) as left:
            main(["train", "configs/small.yaml", f"engine.processes={processes}", *given])
        assert not left.value.code
    (again,) = started
    assert again[2:] == ["launch.cli", "train", "configs/small.yaml", "engine.processes=2", *given]
    assert (
        accepted == [bool(given)]
        and capsys.readouterr().out == "runs/small: step 7, 28 samples, loss 0.5000\n"
    )


@pytest.mark.parametrize("verb", ["train-autoencoder", "train-clip"])
def test_a_first_stage_starts_its_processes_unless_a_launcher_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    started: list[tuple[list[str], int, int]] = []

    def run_local(again: list[str], processes: int, *, threads: int) -> int:
        started.append((again[2:], processes, threads))
        return 7

    monkeypatch.setattr("launch.local.run_local", run_local)
    monkeypatch.setattr("preprocessing.pairs.prepared_pairs", lambda encode: [])
    for module in ("autoencoder", "clip"):
        monkeypatch.setattr(f"pipeline.first_stage.{module}.train_{module}", lambda *words: Path("made"))
    given = [verb, "configs/small.yaml", "first_stage.processes=4", "engine.threads=4"]
    with pytest.raises(SystemExit) as left:
        main(given)
    assert left.value.code == 7 and started == [(["launch.cli", *given], 4, 2)]
    for rank, said in (("0", "made\n"), ("1", "")):
        world = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        for name, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            main(given)
        assert not left.value.code and capsys.readouterr().out == said
    assert len(started) == 1


@pytest.mark.parametrize(
    ("given", "config", "fast"),
    [([], "demo", False), (["--fast"], "demo", True), (["--long"], "long", False)],
)
def test_each_demo_has_its_config(
    monkeypatch: pytest.MonkeyPatch, given: list[str], config: str, fast: bool
) -> None:
    run: list[object] = []
    monkeypatch.setattr(
        "launch.demo.run_demo", lambda *words, **named: run.extend([*words, named]) or Painted("", {})
    )
    with pytest.raises(SystemExit):
        main(["demo", *given, "seed=1"])
    assert run == [Path(f"configs/{config}.yaml"), ["seed=1"], {"fast": fast}]
    assert Path(f"configs/{config}.yaml").is_file()


def test_json_is_one_line_of_facts_and_quiet_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both reach what runs inside; afterwards the process is as it was."""
    inside: list[str | None] = []

    def trained(*words: object, **named: object) -> TrainResult:
        inside.extend(os.environ.get(name) for name in (QUIET, JSON))
        logging.getLogger("pipeline").info("a remark")
        return TrainResult(7, 28, math.nan, stopped=False)

    monkeypatch.setattr("launch.check.refuse_untrainable", lambda run, paths, where: None)
    monkeypatch.setattr("launch.rank.train_rank", trained)
    with pytest.raises(SystemExit) as left:
        main(["train", "configs/small.yaml", "engine.processes=1", "--json", "--quiet"])
    assert not left.value.code
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("\n") == 1
    assert json.loads(said.out) == {
        "verb": "train",
        "run": "runs/small",
        "step": 7,
        "samples": 28,
        "loss": None,
    }
    assert inside == ["1", "1"] and QUIET not in os.environ and JSON not in os.environ


@pytest.mark.parametrize("verb", LONG_VERBS)
def test_every_long_verb_can_be_quiet_and_answer_in_json(verb: str) -> None:
    said = ldm(verb, "--help").stdout
    assert "--quiet" in said and "--json" in said


def test_processes_of_a_larger_work_do_not_answer_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []

    def started(command: list[str], processes: int, **named: object) -> int:
        asked.append(os.environ.get(JSON))
        return 0

    monkeypatch.setattr("launch.local.run_local", started)
    monkeypatch.setattr("launch.status.describe_dataset", lambda folder: "words")
    with pytest.raises(SystemExit):
        main(["encode", "configs/small.yaml", "encode.processes=2", "--json"])
    assert asked == [NO_ANSWER]
    assert json.loads(capsys.readouterr().out) == {"verb": "encode", "dataset": "runs/small/latents"}


def test_check_says_what_follows_from_the_config() -> None:
    said = ldm("check", "configs/small.yaml", "engine.global_batch=30", "engine.micro_batch=4")
    assert said.returncode == 0
    assert "30 samples = 2 ranks x 4 micro-batches of up to 4" in said.stdout and "'stage': 1" in said.stdout


def test_doctor_names_every_package() -> None:
    said = ldm("doctor")
    assert said.returncode == 0, said.stdout
    assert "torch" in said.stdout and "device" in said.stdout and "MISSING" not in said.stdout
