"""Training over two gloo processes: the promises on resume, sharding, EMA, skips and saves, against oracles."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loader import LatentLoader
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import drop_captions
from pipeline.diffusion.objective import denoising_loss
from pipeline.diffusion.posterior import sample_posterior, scale_latents
from pipeline.diffusion.schedule import Schedule
from pipeline.latents.reader import LatentDataset
from pipeline.models.unet import UNet
from pipeline.tracking import read_records
from pipeline.training.averages.ema import ramped_decay
from pipeline.training.learning_rate import learning_rate
from pipeline.training.saving.checkpoint import committed, load_weights, newest_checkpoint, read_manifest
from pipeline.training.saving.fragment_file import read_whole
from tests.distributed.cases import STEPS, make_config, paths_of
from tests.distributed.conftest import PLAIN, SETTINGS, STOPS, Results
from tests.distributed.dataset import build_dataset
from tests.faults.ranks import run_ranks

pytestmark = pytest.mark.distributed
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
STREAM = ("loss", "grad_norm", "learning_rate", "ema_decay", "skipped", "samples")


def stream(results: Results, name: str) -> list[dict[str, Any]]:
    """Return what the run recorded at each step, without what a clock enters."""
    records = read_records(paths_of(results.root, name).metrics, "train")
    return [{key: record[key] for key in ("step", *STREAM)} for record in records]


def losses(results: Results, name: str) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in stream(results, name)], dtype=torch.float64)


def file_digests(results: Results, name: str, step: int) -> dict[str, Any]:
    return read_manifest(paths_of(results.root, name).checkpoints / f"step-{step:08d}")["files"]


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    files = [checkpoint / name for name in sorted(manifest["files"])]
    return {
        f"{kind}/{name}": tensor
        for kind in KINDS
        for name, tensor in read_whole(files, kind, manifest["parameters"]).items()
    }


@pytest.mark.parametrize(("name", "stop"), [(name, stop) for name in SETTINGS for stop in STOPS[name]])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(results: Results, name: str, stop: int) -> None:
    """Masters, moments and EMA by the files' hashes, and every record; with dropout on."""
    cut, straight = f"{name}-cut-{stop}", f"{name}-straight"
    assert results.by_case[cut][0]["step"] == STEPS
    assert file_digests(results, cut, STEPS) == file_digests(results, straight, STEPS)
    assert stream(results, cut) == stream(results, straight)


def test_killed_within_an_interval_of_records_is_uninterrupted(results: Results) -> None:
    """A record every 4 steps, killed in step 5, resumed from step 2: the mean over steps 1 to 4 is the same."""
    assert results.by_case["killed-begun"] == ["killed", "killed"]
    assert file_digests(results, "killed", STEPS) == file_digests(results, "rare", STEPS)
    assert stream(results, "killed") == stream(results, "rare")
    assert [record["step"] for record in stream(results, "rare")] == [4, STEPS]


def test_each_rank_holds_half_of_the_optimizer_and_of_the_average(results: Results) -> None:
    shards = results.by_case["shard"]
    for kind in ("adam", "ema"):
        total = sum(shard[kind] for shard in shards)
        assert all(0.45 < shard[kind] / total < 0.55 for shard in shards), shards
    weights = load_weights(
        newest_checkpoint(paths_of(results.root, "alone").checkpoints), "raw", verified=True
    )
    count = sum(tensor.numel() for tensor in weights.values())
    assert sum(shard["ema"] for shard in shards) == 4 * count
    assert 8 * count <= sum(shard["adam"] for shard in shards) < 8 * count + 4096


@pytest.mark.parametrize("name", SETTINGS)
def test_sharded_average_is_the_average_of_the_whole_masters(results: Results, name: str) -> None:
    config = make_config(results.root, name, **SETTINGS[name])
    torch.manual_seed(config.seed)
    average = {key: value.clone() for key, value in UNet(config.model).state_dict().items()}
    checkpoints = committed(paths_of(results.root, f"{name}-straight").checkpoints)
    assert len(checkpoints) == STEPS
    for updates, checkpoint in enumerate(checkpoints):
        masters = load_weights(checkpoint, "raw", verified=True)
        for key, value in average.items():
            value.lerp_(masters[key], 1.0 - ramped_decay(config.ema, updates))
        saved = load_weights(checkpoint, "ema", verified=True)
        assert all(torch.equal(saved[key], value) for key, value in average.items()), checkpoint
        assert not torch.equal(saved["conv_in.weight"], masters["conv_in.weight"])


def plain_losses(results: Results) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with nothing but torch over the same global batches, each one batch; return losses and weights."""
    config = make_config(results.root, "plain", engine={"micro_batch": 8})
    dataset = LatentDataset(results.root / "latents")
    engine, objective, data = config.engine, config.objective, config.data
    loader = LatentLoader(
        dataset, seed=0, engine=engine, objective=objective, data=data, rank=0, world_size=1
    )
    torch.manual_seed(0)
    network = UNet(config.model)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, foreach=False)
    schedule = Schedule.from_config(objective)
    null_text = torch.from_numpy(dataset.null_text()["text"]).float()
    found = []
    for step, (batch,) in zip(range(STEPS), loader.steps(0), strict=False):
        assert batch.text is not None
        x0 = scale_latents(sample_posterior(batch.moments, batch.posterior_noise), 0.7, 0.1)
        text = drop_captions(Conditioning(batch.text.float()), Conditioning(null_text), batch.dropped)
        loss = denoising_loss(
            network, x0, text, batch.noise, batch.timesteps, schedule, objective.prediction
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        adamw.step()
        adamw.zero_grad()
        found.append(loss.item())
    return found, {name: weight.detach() for name, weight in network.named_parameters()}


def test_every_stage_and_world_size_is_plain_torch(results: Results) -> None:
    """One process with 4 micro-batches, two with 2 at ZeRO 0 to 3: the losses of one plain batch of 8 to 1e-6."""
    expected, weights = plain_losses(results)
    for name in ["alone", *(f"pair-{stage}" for stage in PLAIN)]:
        found = losses(results, name)[:STEPS]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        checkpoint = paths_of(results.root, name).checkpoints / f"step-{STEPS:08d}"
        saved = load_weights(checkpoint, "raw")
        for key, weight in weights.items():
            torch.testing.assert_close(saved[key], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("odd", 1e-6), ("bf16", 5e-4)])
def test_two_processes_lose_what_one_does(results: Results, kind: str, tolerance: float) -> None:
    """A global batch of 7 gives the ranks 3 and 4 samples, with a filler; bf16 to its own promise."""
    alone, pair = (losses(results, f"{who}-{kind}") for who in ("alone", "pair"))
    assert len(alone) == STEPS
    torch.testing.assert_close(pair, alone, rtol=tolerance, atol=tolerance)
    assert stream(results, f"pair-{kind}")[-1]["samples"] == STEPS * (7 if kind == "odd" else 8)


@pytest.mark.parametrize(
    ("source", "arrived"),
    [("alone", f"from-alone-{stage}") for stage in PLAIN]
    + [("pair-1", "from-pair-1"), ("pair-2", "from-pair-2"), ("zero3-bf16-straight", "from-zero3-bf16")],
)
def test_state_arrives_bit_for_bit_at_another_world_size_and_stage(
    results: Results, source: str, arrived: str
) -> None:
    """Saved by one process and loaded by two at each stage, and back, at once saved again."""
    for answer in results.by_case[arrived]:
        assert answer == {"step": STEPS, "updates": STEPS}
    before = whole_state(paths_of(results.root, source).checkpoints / f"step-{STEPS:08d}")
    after = whole_state(newest_checkpoint(paths_of(results.root, arrived).checkpoints))
    assert before.keys() == after.keys() and len(before) > 4 * 20
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_run_goes_on_at_another_world_size(results: Results) -> None:
    """Two processes for 6 steps and one for 2 lose what one process loses over 8, to 1e-6."""
    assert [answer["step"] for answer in results.by_case["pair-1-goes-on"]] == [8]
    torch.testing.assert_close(losses(results, "pair-1"), losses(results, "alone"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*(f"nan-{stage}" for stage in PLAIN), "nan-bf16", "alone-nan"])
def test_nan_on_one_rank_skips_the_step_on_all(results: Results, name: str) -> None:
    """The third step leaves masters, moments and EMA as the second left them, and the run goes on."""
    assert file_digests(results, name, 3) == file_digests(results, name, 2)
    assert file_digests(results, name, 4) != file_digests(results, name, 3)
    for answer in results.by_case[name]:
        assert answer["step"] == STEPS
    said = results.by_case[name][0]["said"]
    assert any("step 3: gradients not finite" in line for line in said), said
    records = {record["step"]: record for record in stream(results, name)}
    assert records[3]["loss"] is None and records[4]["loss"] is not None
    assert [records[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    manifest = read_manifest(newest_checkpoint(paths_of(results.root, name).checkpoints))
    assert (manifest["applied"], manifest["skipped"], manifest["ema"]["updates"]) == (5, 1, 5)
    assert manifest["samples"] == STEPS * 8


def test_three_nan_steps_in_a_row_end_the_run_and_name_the_samples(results: Results) -> None:
    config = make_config(results.root, "diverged")
    dataset = LatentDataset(results.root / "latents")
    second = LatentLoader(
        dataset,
        seed=0,
        engine=config.engine,
        objective=config.objective,
        data=config.data,
        rank=1,
        world_size=2,
    )
    steps = second.steps(4 * 8)
    guilty = sorted({int(index) for batch in next(steps) for index in batch.indices})
    for answer in results.by_case["diverged"]:
        assert (answer["error"], answer["code"]) == ("DivergedError", 5)
        assert "step 5:" in answer["said"] and "3 of at most 3" in answer["said"]
        assert f"samples {', '.join(f'k{index:06d}' for index in guilty)} of" in answer["said"]


def test_one_flipped_bit_falls_back_to_the_checkpoint_before(results: Results) -> None:
    assert results.by_case["damage"] == [2, 2]
    first, second = results.by_case["damaged"]
    assert first["step"] == second["step"] == 8
    said = next(line for line in first["said"] if "sha256" in line)
    assert f"step-{STEPS:08d}/rank-00001.safetensors: sha256" in said and "going back to" in said
    paths = paths_of(results.root, "damaged")
    assert said.endswith("step-00000004") and (paths.checkpoints / f"damaged-step-{STEPS:08d}").is_dir()
    resumed = {json.loads(line).get("resumed_step") for line in paths.metrics.read_text().splitlines()}
    assert resumed == {None, 4}
    # The steps done twice are the same steps.
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    twice = [line["loss"] for line in lines if line["step"] in (5, 6)]
    assert len(twice) == 4 and twice[:2] == twice[2:]


def test_nothing_valid_is_an_error_and_never_a_restart(results: Results) -> None:
    for answer in results.by_case["all-damaged"]:
        assert (answer["error"], answer["code"]) == ("CheckpointError", 4)
        assert "step-00000001/checkpoint.json" in answer["said"] and "none of its 1" in answer["said"]


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(results: Results) -> None:
    first, second = results.by_case["full-once"]
    assert first["step"] == second["step"] == STEPS
    said = next(line for line in first["said"] if "not saved" in line)
    assert "step-00000001: not saved: rank 1: No space left on device" in said
    assert "failure 1 of 3" in said and "training goes on" in said
    folder = paths_of(results.root, "full-once").checkpoints
    assert [path.name for path in committed(folder)] == ["step-00000005", "step-00000006"]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    assert stream(results, "full-once") == stream(results, "pair-1")[:STEPS]


def test_the_third_failed_save_in_a_row_ends_the_run_with_the_old_checkpoint_intact(results: Results) -> None:
    for answer in results.by_case["full"]:
        assert (answer["error"], answer["code"]) == ("CheckpointError", 4)
        assert "step-00000001 is intact; failure 3 of 3" in answer["said"]
    folder = paths_of(results.root, "full").checkpoints
    assert newest_checkpoint(folder).name == "step-00000001"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("name", "reason"), [("stop-file", "stop file"), ("max-seconds", "max seconds")])
def test_a_request_to_stop_is_obeyed_one_step_later_on_all_ranks(
    results: Results, name: str, reason: str
) -> None:
    first, second = results.by_case[name]
    assert first["stopped"] and first["reason"] == reason
    assert {key: second[key] for key in ("step", "stopped", "reason")} == {
        "step": 1,
        "stopped": True,
        "reason": reason,
    }
    assert [path.name for path in committed(paths_of(results.root, name).checkpoints)] == ["step-00000001"]
    assert not first.get("file_left") and not second.get("file_left")


def test_shards_that_are_not_the_model_are_refused_at_the_start(results: Results) -> None:
    """A real one: with round_robin_gradients DeepSpeed 0.19.8 links weights to other weights' shards."""
    for answer in results.by_case["wrong-shards"]:
        assert answer["error"] == "ToolError" and "differ from the weights in " in answer["said"]
    assert committed(paths_of(results.root, "wrong-shards").checkpoints) == []


def test_resume_refuses_another_model_and_other_data_and_says_what_changed(results: Results) -> None:
    (model,), (data,), (changed,) = (
        results.by_case[name] for name in ("other-model", "other-data", "changed")
    )
    assert (model["error"], model["code"]) == ("ConfigError", 2)
    assert "is absent in the checkpoint" in model["said"] and "attentions.1" in model["said"]
    assert (data["error"], data["code"]) == ("DataError", 3)
    assert "the data was " in data["said"] and "--accept-data-change" in data["said"]
    assert any("optimizer.learning_rate: 0.002 -> 0.0001" in line for line in changed["said"])


@pytest.mark.covers("F6")
def test_term_to_one_rank_saves_once_on_all_and_the_run_can_go_on(tmp_path: Path) -> None:
    build_dataset(tmp_path / "latents", 30)
    train = {"steps": 100_000, "checkpoint_every": 100_000}
    arguments = {"root": str(tmp_path), "name": "long", "train": train}
    paths = paths_of(tmp_path, "long")
    with ThreadPoolExecutor(1) as pool:
        target = "tests.distributed.cases:run_until_signal"
        ranks = pool.submit(run_ranks, target, 2, arguments, 150, {"LDM_QUIET": "1"})
        _wait_until(
            lambda: ranks.done() or (paths.metrics.exists() and paths.metrics.read_text().count("\n") >= 3)
        )
        os.kill(int((tmp_path / "long-pid-1").read_text()), signal.SIGTERM)
        first, second = ranks.result()
    assert first["stopped"] and second["stopped"] and first["step"] == second["step"] >= 3
    assert first["reason"] == second["reason"] == "signal"
    saved = committed(paths.checkpoints)
    assert [path.name for path in saved] == [f"step-{first['step']:08d}"]
    assert newest_checkpoint(paths.checkpoints) == saved[0]


def _wait_until(condition: Any, limit_seconds: float = 140) -> None:
    deadline_seconds = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline_seconds, "waited in vain"
        time.sleep(0.05)
