"""`ldm compare`: the page says what the runs' own files say, whatever state they are in."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.compare.page import MOST_POINTS, MOST_STAGES, render
from launch.compare.runs import compared_runs
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError
from tests.builders import tiny_config
from tests.launch.test_cli import ldm

CELLS = re.compile(r"<tr>(.*?)</tr>")


def write_run(
    root: Path, *, losses: list[float] | None = None, grids: tuple[int, ...] = (), **sections: Any
) -> Path:
    """Write a run folder with these losses, one a step of 4 samples, and a grid at each of the steps."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(dump_config(tiny_config(root.parent, **sections)))
    lines = [
        {
            "time": 0.0,
            "kind": "train",
            "attempt": "a",
            "step": n,
            "samples": 4 * n,
            "loss": loss,
            "loss/t0": 9.0,
        }
        for n, loss in enumerate(losses or [], 1)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in grids:
        path = root / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), step % 256, np.uint8)).save(path)
        path.with_suffix(".json").write_text(json.dumps({"prompts": [f"<i>painted</i> {step}"]}))
    return root


def rows(page: str) -> dict[str, list[str]]:
    cells = (re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in CELLS.findall(page))
    return {row[0]: row[1:] for row in cells if row}


def page_of(*roots: Path) -> str:
    return render(compared_runs(roots))


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", train={"steps": 7})
    two = write_run(tmp_path / "two", train={"steps": 9})
    found = rows(page_of(one, two))
    assert found["train.steps"] == ["7", "9"] and found["setting"] == ["one", "two"]
    assert "optimizer.learning_rate" not in found and "name" not in found
    assert "the runs have the same settings" in page_of(one)


def test_curves_are_the_records_by_step_and_by_samples(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", losses=[4.0, 2.0, 1.0])
    two = write_run(tmp_path / "two", losses=[3.0, float("nan")])
    page = page_of(one, two)
    drawings = re.findall(r"<svg.*?</svg><figcaption><b>(.*?)</b><br>(.*?)</figcaption>", page)
    assert drawings == [
        ("train: loss by step", "1 to 4; step 1 to 3"),
        ("train: loss by samples", "1 to 4; samples 4 to 12"),
    ]
    assert [len(line.split()) for line in re.findall("points='([^']*)'", page)] == [3, 3]
    assert page.count("<circle") == 2, "of two's losses one is finite"


def test_what_a_resume_replaced_is_not_drawn(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", losses=[4.0, 3.0, 50.0])
    again = {
        "time": 1.0,
        "kind": "train",
        "attempt": "b",
        "resumed_step": 2,
        "step": 3,
        "samples": 12,
        "loss": 2.0,
    }
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert "2 to 4; step 1 to 3" in page_of(root)


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    count = 2 * MOST_POINTS + 1
    page = page_of(write_run(tmp_path / "long", losses=[1.0] * count))
    (drawn, _) = re.findall("points='([^']*)'", page)
    assert len(drawn.split()) <= MOST_POINTS + 1 and f"step 1 to {count:,}" in page


def test_every_number_of_the_evaluation_stands_there_and_an_absent_one_is_a_dash(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    tree = {"ema": {"loss": 0.25, "by": [1, 2]}, "step": 40, "name": "x", "kid": {"value": None}, "ok": True}
    (one / "evaluation.json").write_text(json.dumps(tree))
    assert rows(page_of(one, two)) | {"": 0, "setting": 0} == {
        "ema.loss": ["0.25", "\N{EM DASH}"],
        "step": ["40", "\N{EM DASH}"],
        "": 0,
        "setting": 0,
    }
    (two / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match=r"two/evaluation\.json: not JSON"):
        page_of(one, two)


def test_the_newest_grids_stand_side_by_side_and_the_earlier_ones_in_a_strip(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", grids=tuple(range(10, 200, 10)))
    two = write_run(tmp_path / "two", grids=(5,))
    page = page_of(one, two)
    shown = re.findall(r"alt='(\w+), step (\d+)'", page)
    assert shown[:2] == [("one", "190"), ("two", "5")]
    steps = [int(step) for _, step in shown[2:]]
    assert len(steps) == MOST_STAGES and steps[0] == 10 and steps[-1] == 190 and steps == sorted(set(steps))
    assert "&lt;i&gt;painted&lt;/i&gt; 190" in page and "<i>" not in page


def test_runs_without_anything_yet_make_a_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    for said in ("No run has a record yet", "No run has been measured", "No run has painted yet"):
        assert said in page


def test_equal_names_are_told_apart_and_wrong_folders_are_all_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / where / "demo") for where in ("x", "y")]
    assert [run.name for run in compared_runs(runs)] == ["x/demo", "y/demo"]
    with pytest.raises(ConfigError, match=r"nowhere, .*elsewhere: not a run folder"):
        compared_runs([*runs, tmp_path / "nowhere", tmp_path / "elsewhere"])
    with pytest.raises(ConfigError, match="given twice"):
        compared_runs([*runs, tmp_path / "y" / ".." / "x" / "demo"])


def test_the_verb_writes_the_page_and_says_where(tmp_path: Path) -> None:
    roots = [write_run(tmp_path / name, losses=[2.0, 1.0]) for name in ("one", "two")]
    answer = ldm("compare", *map(str, roots), "--out", "page.html", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "page.html" and (tmp_path / "page.html").read_text() == page_of(*roots)
    wrong = ldm("compare", "nowhere", cwd=tmp_path)
    assert wrong.returncode == 2 and "not a run folder" in wrong.stderr and "Traceback" not in wrong.stderr
