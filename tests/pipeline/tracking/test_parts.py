"""The parts around the records: the machine's figures, what a start tells, where things came from, a full disk here."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from pipeline.plan.devices import device_called, devices
from pipeline.tracking import (
    config_for_later,
    graphics,
    open_records,
    read_records,
    redact_text,
    redacted_config,
    sync_records,
)
from pipeline.tracking.delivery import tracking_uri
from pipeline.tracking.graphics import Graphics
from pipeline.tracking.journal import Lines
from pipeline.tracking.lineage import inputs_of
from pipeline.tracking.machine import Machine
from pipeline.tracking.names import metrics_of, start_tags
from pipeline.tracking.starts import ALLOWED_ENVIRONMENT, read_starts
from tests.builders import tiny_config
from tests.pipeline.tracking.builders import CANARY


def proc(folder: Path, *, busy: int, idle: int, received: int) -> Path:
    """Write the files of /proc that are read, as Linux does."""
    (folder / "net").mkdir(parents=True, exist_ok=True)
    (folder / "self").mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 5 5\ncpu0 1 2 3\n")
    lines = [
        "Inter-| Receive",
        " face |bytes",
        f"    lo: {'9 ' * 16}",
        f"  eth0: {received} {'1 ' * 7}77 {'0 ' * 7}",
    ]
    (folder / "net/dev").write_text("\n".join(lines) + "\n")
    (folder / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  250 kB\n")
    (folder / "self/statm").write_text("900 100 1 1 0 1 0\n")
    return folder


def test_the_machines_figures_are_those_of_proc(tmp_path: Path) -> None:
    machine = Machine(tmp_path, proc=proc(tmp_path / "proc", busy=100, idle=100, received=1000))
    proc(tmp_path / "proc", busy=175, idle=125, received=3_001_000)
    found = machine.figures()
    assert found["system/cpu_utilization_percentage"] == 75.0
    assert found["system/network_receive_megabytes"] == 3.0
    assert found["system/system_memory_usage_percentage"] == 75.0
    assert found["system/process_memory_megabytes"] == 100 * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert 0 < found["system/disk_usage_percentage"] < 100


class NotToldError(Exception):
    """NVML's error."""


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, the second in MIG mode: it does not tell its load."""

    def load(device: int) -> SimpleNamespace:
        if device == 1:
            raise NotToldError("not supported")
        return SimpleNamespace(gpu=97)

    nvml = SimpleNamespace(
        NVMLError=NotToldError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=load,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetPowerUsage=lambda device: 350_000,
    )
    monkeypatch.setattr(graphics, "pynvml", nvml)
    rest = {"memory_usage_megabytes": 20_000.0, "memory_usage_percentage": 25.0, "power_usage_watts": 350.0}
    assert Graphics().figures() == {
        "system/gpu_0_utilization_percentage": 97.0,
        **{f"system/gpu_{index}_{name}": value for index in (0, 1) for name, value in rest.items()},
    }


def test_without_a_driver_there_are_no_gpus() -> None:
    """The library itself, on a machine that has no NVIDIA driver; where there is one, its devices are told."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert Graphics().figures() == {}
    else:
        assert len(Graphics().figures()) >= pynvml.nvmlDeviceGetCount()


def test_away_from_linux_it_knows_the_disk(tmp_path: Path) -> None:
    found = Machine(tmp_path, proc=tmp_path / "no-proc").figures()
    assert "system/disk_usage_percentage" in found and "system/cpu_utilization_percentage" not in found


def test_a_start_tells_its_machine_and_nothing_of_the_rest_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("MY_OWN", CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    paths = RunPaths(tmp_path / "run")
    config = tiny_config(tmp_path, warm_start={"source": str(tmp_path / "other")})
    other = tmp_path / "other" / "mlflow_run.json"
    other.parent.mkdir()
    other.write_text('{"train": {"run_id": "r7"}}')
    for attempt, step in (("a1", 0), ("a2", 30)):
        hosts = ["node2", "node1", "node2"]
        open_records(paths, config, kind="train", attempt=attempt, resumed_step=step, hosts=hosts).close()
    first, last = read_starts(paths.starts, "train")
    assert "resumed_from" not in first and last["resumed_from"] == "checkpoints/step-00000030"
    assert last["host"] == socket.gethostname() and last["environment"]["SLURM_RESTART_COUNT"] == "2"
    assert last["environment"].keys() <= set(ALLOWED_ENVIRONMENT)
    assert last["forked_from"]["mlflow_run"] == "r7"
    assert CANARY not in paths.starts.read_text()
    tags = start_tags([first, last])
    assert (tags["hosts"], tags["processes"]) == ("node1 node2", "3")
    assert tags["starts"] == "2" and tags["lineage.resumes"] == '["checkpoints/step-00000030"]'
    assert (
        tags["env.SLURM_RESTART_COUNT"] == "2"
        and json.loads(tags["lineage.forked_from"])["mlflow_run"] == "r7"
    )


def test_inputs_name_the_runs_that_made_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, name="run")
    paths = RunPaths(tmp_path / "run")
    paths.latents.mkdir(parents=True)
    manifest = {"digest": "d" * 64, "encoder": {"autoencoder": "a" * 64}, "counts": {"written": 3}}
    (paths.latents / "manifest.json").write_text(json.dumps(manifest))
    paths.mlflow_run.write_text('{"encode": {"run_id": "e1"}, "autoencoder": {"run_id": "v1"}}')
    data, autoencoder, text_encoder = inputs_of(paths, config, "train")
    assert (data.name, data.digest, data.made_by) == ("run/latents", "d" * 64, "e1")
    assert (autoencoder.digest, autoencoder.made_by) == ("a" * 64, "v1")
    assert (text_encoder.digest, text_encoder.made_by) == ("", None)


def test_a_full_disk_holds_the_lines_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third write takes a part of a line and the fourth none; then there is room again."""
    real, room = os.write, [200, 200, 7, 0]

    def write(descriptor: int, payload: bytes) -> int:
        left = room.pop(0) if room else len(payload)
        if not left:
            raise OSError(28, "No space left on device")
        return real(descriptor, payload[:left])

    lines = Lines(tmp_path / "lines.jsonl")
    monkeypatch.setattr(os, "write", write)
    for number in range(6):
        lines.add({"number": number})
    lines.close()
    monkeypatch.undo()
    found = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert found == [{"number": number} for number in range(6)]
    assert capsys.readouterr().err.count("No space left") == 1


def test_there_must_be_somewhere_to_send_records_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.mlflow: off means nowhere"):
        sync_records(RunPaths(tmp_path / "run"), tiny_config(tmp_path))


def test_what_the_tracker_costs_is_in_its_record(tmp_path: Path) -> None:
    paths, config = RunPaths(tmp_path / "run"), tiny_config(tmp_path)
    with open_records(paths, config, kind="train", attempt="a1") as records:
        for step in (1, 2, 3):
            records.log(step, {"loss": 1.0, "samples_per_second": 4.0})
        blocked = records.blocked_seconds
    (record,) = read_records(paths.system, "train")
    assert record["step"] == 1 and 0 <= record["tracker/blocked_seconds"] <= blocked
    assert read_records(paths.metrics, "train")[0].keys() == {
        "time", "kind", "attempt", "step", "samples", "loss", "samples_per_second",
    }  # fmt: skip


def test_a_verbs_figures_have_names_of_their_own_in_the_trainings_run() -> None:
    record = {"time": 1.0, "attempt": "a", "step": 7, "samples": 28, "val_loss_ema": 0.5}
    assert metrics_of(record | {"kind": "train"}) == {"val_loss_ema": 0.5, "samples": 28.0}
    assert metrics_of(record | {"kind": "evaluate"}) == {"evaluate/val_loss_ema": 0.5}


def secret_config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, tracking={"mlflow": f"http://me:{CANARY}@host:5000"})


def test_a_hidden_password_comes_back_from_the_environment(tmp_path: Path) -> None:
    written = redacted_config(secret_config(tmp_path)).tracking.mlflow
    assert CANARY not in written
    assert tracking_uri(written, tmp_path, {}) == "http://host:5000"
    whole = f"http://me:{CANARY}@host:5000"
    assert tracking_uri(written, tmp_path, {"MLFLOW_TRACKING_URI": whole}) == whole


def test_a_job_is_not_given_a_config_that_lacks_what_it_needs(tmp_path: Path) -> None:
    assert CANARY not in config_for_later(secret_config(tmp_path)).model_dump_json()
    config = tiny_config(tmp_path, data={"dataset": f"https://me:{CANARY}@host/set"})
    with pytest.raises(ConfigError, match=r"^data\.dataset: holds a secret") as refused:
        config_for_later(config)
    assert CANARY not in str(refused.value)


def test_the_environments_secrets_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.sock")
    assert redact_text(f"refused {CANARY} at /run/agent.sock") == "refused [redacted] at /run/agent.sock"


def test_only_a_device_that_is_known_by_its_exact_name_has_a_peak() -> None:
    assert device_called("NVIDIA H200") == devices()["H200"]
    assert device_called("NVIDIA H100 80GB HBM3") == devices()["H100"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "H200", "cpu"):
        assert device_called(other) is None
