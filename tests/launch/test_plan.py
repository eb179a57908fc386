"""`ldm plan` from the command line's side: the page, the JSON, the picture, calibration, refusals; no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from launch.cli import app
from launch.plan import Request, plan_config
from pipeline.config_file import dump_config, load_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SD15, DEMO = ROOT / "configs" / "sd15-512.yaml", ROOT / "configs" / "small.yaml"


def planned(path: Path = SD15, *overrides: str, **request: Any) -> str:
    return plan_config(path, overrides, Request(**request)).page


def as_json(path: Path = SD15, *overrides: str, **request: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(planned(path, *overrides, as_json=True, **request))
    return found


def write_run(folder: Path, *overrides: str, base: float, per_sample: float) -> Path:
    """Write the folder of a demo run whose records follow base + per_sample x a rank's samples."""
    config = load_config(DEMO, [*overrides, "engine.processes=1", "engine.zero_stage=1"])
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    batch = config.engine.global_batch
    speed = batch / (base + per_sample * batch)
    records = [
        {"kind": "train", "attempt": "a", "step": 20 * n, "samples_per_second": value}
        for n, value in enumerate([speed / 9, speed * 1.1, speed, speed * 0.9, speed])
    ]
    records.append({"kind": "evaluate", "attempt": "evaluate", "step": 99})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')
    return folder


def test_the_page_says_what_is_published_and_what_was_measured() -> None:
    page = planned()
    assert "859.5 M parameters in 686 tensors" in page
    for said in (
        "bound s*",
        "other people's tuned code",
        "host floor: measured with this project",
        "not measured with this",
    ):
        assert said in page
    for wanted in (
        "fits",
        "MFU",
        "goodput",
        "dollars",
        "GB/s node",
        "by ZeRO stage",
        "best every",
        "H100-hours",
    ):
        assert wanted in page


def test_json_holds_what_the_page_holds() -> None:
    found = as_json(gpus="8,64")
    assert [plan["ranks"] for plan in found["plans"]] == [8, 64]
    assert found["plans"][0]["fits"] is True
    assert found["storage"]["checkpoint_bytes"] == 16 * 859_520_964
    assert set(found["memory_gib_by_stage"]["8"]) == {"0", "1", "2", "3"}
    assert found["network"]["parameters"] == 859_520_964
    assert found["sources"] and found["advice"]


def test_known_samples_price_the_whole_data_set() -> None:
    found = as_json(samples=5_000_000)["storage"]
    assert (
        found["samples_known"]
        and found["dataset_bytes"] == 5_000_000 * found["bytes_per_sample"]["embeddings"]
    )
    assert found["epochs"] == pytest.approx(1_304_000 * 2048 / 5_000_000)


def test_the_default_devices_are_those_that_the_global_batch_allows() -> None:
    assert [plan["ranks"] for plan in as_json()["plans"]] == [8, 64, 512]
    assert [plan["ranks"] for plan in as_json(DEMO)["plans"]] == [2]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"gpus": "8,x"}, "no list of numbers"),
        ({"gpus": "4096"}, "4096 devices for a global batch of 2048"),
        ({"device": "abacus"}, "'abacus' is not known; there are H100"),
        ({"runs": (Path("nowhere"),)}, "nowhere is no run folder"),
    ],
)
def test_refusals_name_what_is_allowed(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(**request_)


def test_two_runs_give_back_both_constants(tmp_path: Path) -> None:
    runs = tuple(
        write_run(
            tmp_path / str(batch),
            f"engine.global_batch={batch}",
            "engine.micro_batch=4",
            base=0.2,
            per_sample=0.01,
        )
        for batch in (4, 16)
    )
    found = as_json(DEMO, "engine.global_batch=32", gpus="1,2", runs=runs)
    assert found["plans"][0]["step_seconds"] == pytest.approx(0.2 + 0.01 * 32)
    assert found["plans"][1]["step_seconds"] == pytest.approx(0.2 + 0.01 * 16)
    assert found["plans"][0]["bound_seconds"] is not None
    assert any(line.startswith("speed: measured on") for line in found["sources"])


def test_one_run_gives_the_speed_beyond_the_host_floor(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "engine.global_batch=16", base=0.0, per_sample=0.05)
    found = as_json(DEMO, "engine.global_batch=16", gpus="1", runs=(run,))
    assert found["plans"][0]["step_seconds"] == pytest.approx(0.8)
    doubled = as_json(DEMO, "engine.global_batch=32", gpus="1", runs=(run,))["plans"][0]["step_seconds"]
    assert 1.4 < doubled < 1.6


def test_a_run_without_enough_records_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", base=0.1, per_sample=0.01)
    (run / "metrics.jsonl").write_text(
        '{"kind": "train", "attempt": "a", "step": 1, "samples_per_second": 3.0}\n'
    )
    with pytest.raises(ConfigError, match="has 0 records of speed after the first; needs 2"):
        planned(DEMO, runs=(run,))


def test_runs_that_disturbed_each_other_are_refused(tmp_path: Path) -> None:
    runs = tuple(
        write_run(tmp_path / str(batch), f"engine.global_batch={batch}", base=10.0 / batch, per_sample=0.0)
        for batch in (4, 16)
    )
    with pytest.raises(ConfigError, match="do not grow with the samples"):
        planned(DEMO, runs=runs)


def test_the_command_draws_and_prints(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = CliRunner().invoke(app, ["plan", str(SD15), "--gpus", "8,64,512", "--png", str(picture)])
    assert done.exit_code == 0, done.output
    assert "what binds, what to change" in done.output
    with Image.open(picture) as drawn:
        assert drawn.size == (1000, 430) and len(drawn.convert("L").getcolors(256) or []) > 20


def test_no_torch_and_no_matplotlib_without_a_picture() -> None:
    code = (
        "import sys; from launch.plan import plan_config; from pathlib import Path; "
        f"plan_config(Path({str(SD15)!r})); sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
