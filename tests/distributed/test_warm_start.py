"""Warm starts over two gloo processes: what is loaded, what is frozen, a fork that is the run itself, two stages."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import DataConfig, WarmStartConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.import_pipeline import import_run
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import open_unet_folder, save_unet
from pipeline.training.frozen import frozen_weights
from pipeline.training.saving.checkpoint import load_weights, read_manifest
from pipeline.training.saving.fragment_file import read_whole
from tests.distributed import dataset
from tests.distributed.cases import make_config, paths_of
from tests.distributed.cases_warm import warm_config
from tests.distributed.dataset import build_dataset
from tests.distributed.starter import start

pytestmark = pytest.mark.distributed

FROM_RUN = {"source": "source", "weights": "raw", "step": 4}
FORK = FROM_RUN | {"optimizer": True}
FREEZE = {"freeze": ["down_blocks", "*.attn2.to_out.0.bias"]}
MATRICES_ONLY = {"freeze": ["*.bias", "*norm*"]}
SECOND_STAGE = {
    "data": {"dataset": "large-latents"},
    "model": {"sample_size": 16},
    "encode": {"image_size": 32},
    "objective": {"prediction": "v_prediction"},
    "train": {"steps": 2},
}
Orders = dict[str, tuple[str, dict[str, Any]]]


def engine(stage: int, precision: str = "fp32") -> dict[str, Any]:
    return {"zero_stage": stage, "precision": precision}


def orders() -> Orders:
    found: Orders = {"source": ("train", {})}
    for stage, precision in [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]:
        settings = {"engine": engine(stage, precision)}
        found[f"raw-{stage}"] = ("begin", {"kind": "raw", "warm_start": FROM_RUN, **settings})
    found |= {
        "ema": ("begin", {"kind": "ema", "warm_start": {"source": "source", "step": 4}}),
        "checkpoint": (
            "begin",
            {"kind": "ema", "warm_start": {"source": "source/checkpoints/step-00000004"}},
        ),
        "fork": ("train", {"warm_start": FORK}),
        "fork-3": ("train", {"warm_start": FORK, "engine": engine(3)}),
        "fork-other-data": ("train", {"warm_start": FORK, "data": {"dataset": "other-latents"}}),
        "frozen": ("train", {"warm_start": {"source": "source"}, "train": {"steps": 2, **FREEZE}}),
        "frozen-on": ("train", {"warm_start": {"source": "source"}, "train": {"steps": 4, **FREEZE}}),
        "frozen-seen": ("frozen_after", {"step": 4}),
        "frozen-3": (
            "train",
            {
                "warm_start": {"source": "source"},
                "train": {"steps": 2, **FREEZE},
                "engine": engine(3, "bf16"),
            },
        ),
        "frozen-3-seen": ("frozen_after", {"step": 2}),
        "matrices": ("train", {"warm_start": {"source": "source"}, "train": {"steps": 2, **MATRICES_ONLY}}),
        "matrices-seen": ("frozen_after", {"step": 2}),
        "frozen-otherwise": ("train", {"warm_start": {"source": "source"}, "train": MATRICES_ONLY}),
        "wider": ("begin", {"kind": "raw", "warm_start": FROM_RUN, "model": {"block_out_channels": [24]}}),
        "no-step": ("begin", {"kind": "raw", "warm_start": FROM_RUN | {"step": 5}}),
        "no-kind": ("begin", {"kind": "raw", "warm_start": {"source": "source", "weights": "ema-0.5"}}),
        "of-frozen": ("train", {"warm_start": {"source": "frozen"}, "train": {"steps": 1}}),
        "second": ("train", {"warm_start": {"source": "source"}, **SECOND_STAGE}),
        "imported": ("train", {"warm_start": {"source": "folder"}, "train": {"steps": 1, **FREEZE}}),
    }
    return found


NAMES = {
    "frozen-on": "frozen",
    "frozen-seen": "frozen",
    "frozen-otherwise": "frozen",
    "frozen-3-seen": "frozen-3",
    "matrices-seen": "matrices",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warm")
    build_dataset(root / "latents", 30)
    build_dataset(root / "other-latents", 30, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "BUCKET", (32, 32))
        build_dataset(root / "large-latents", 30, seed=2)
    torch.manual_seed(7)
    save_unet(UNet(make_config(root, "x").model), root / "folder", max_shard_bytes=40_000)
    return root


@pytest.fixture(scope="module")
def answers(root: Path) -> Iterator[dict[str, list[Any]]]:
    """What each case returned, by rank: all in one start of two processes."""
    named = {
        case: (function, arguments | {"name": NAMES.get(case, case)})
        for case, (function, arguments) in orders().items()
    }
    yield start("tests.distributed.cases_warm", root, 2, named)


@pytest.mark.parametrize("case", ["raw-0", "raw-1", "raw-2", "raw-3", "ema", "checkpoint"])
def test_masters_averages_and_network_are_the_sources(answers: dict[str, list[Any]], case: str) -> None:
    for answer in answers[case]:
        assert answer["wrong"] == [] and answer["pieces"] > 0
        assert (answer["step"], answer["adam"], answer["ema"], answer["moments"]) == (0, 0, 0, 0.0)
        assert answer["difference"] < (2e-2 if case in ("raw-1", "raw-3") else 1e-5)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    files = [checkpoint / name for name in sorted(manifest["files"])]
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
    return {
        f"{kind}/{name}": tensor
        for kind in kinds
        for name, tensor in read_whole(files, kind, manifest["parameters"]).items()
    }


def test_a_fork_with_nothing_changed_is_the_run_itself(root: Path, answers: dict[str, list[Any]]) -> None:
    """From step 4 to 6, bit for bit: weights, Adam's moments, the average, and the counters."""
    assert answers["fork"] == answers["source"]
    source, fork = (paths_of(root, name).checkpoints / "step-00000006" for name in ("source", "fork"))
    wanted, found = state_of(source), state_of(fork)
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    names = ("step", "samples", "applied", "skipped", "ema")
    mine, theirs = read_manifest(fork), read_manifest(source)
    assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}
    assert not (fork.parent / "step-00000002").exists()


def test_a_fork_at_another_stage_agrees_and_with_other_data_does_not(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    last = {
        name: load_weights(paths_of(root, name).checkpoints / "step-00000006", "raw")
        for name in ("source", "fork-3", "fork-other-data")
    }
    torch.testing.assert_close(last["fork-3"], last["source"], rtol=1e-4, atol=1e-6)
    assert answers["fork-other-data"] == answers["source"]
    assert any(
        not torch.equal(last["fork-other-data"][name], weight) for name, weight in last["source"].items()
    )


@pytest.mark.parametrize("case", ["frozen-seen", "frozen-3-seen", "matrices-seen"])
def test_frozen_weights_stay_to_the_bit_and_the_others_learn(
    answers: dict[str, list[Any]], case: str
) -> None:
    """Over a resume, in bf16 at stage 3 too, where the network's own copy is rounded; and with no bias left to train."""
    for answer in answers[case]:
        assert answer["fixed_as_they_were"] and answer["learnt_moved"] and answer["whole"]
        if case != "matrices-seen":
            assert answer["fixed"] and all(
                name.startswith("down_blocks.") or name.endswith("attn2.to_out.0.bias")
                for name in answer["fixed"]
            )
    assert answers["frozen-on"][0]["step"] == 4


def test_a_run_can_begin_with_one_that_had_frozen_weights(root: Path, answers: dict[str, list[Any]]) -> None:
    assert answers["of-frozen"][0]["step"] == 1
    manifest = read_manifest(paths_of(root, "of-frozen").checkpoints / "step-00000001")
    assert len(manifest["parameters"]) == len(UNet(make_config(root, "x").model).state_dict())


@pytest.mark.parametrize(
    "case, said",
    [
        ("wider", ["conv_in.bias is [16], the model's is [24]", "more weights", "ldm import"]),
        ("no-step", ["warm_start.step: 5", "holds the steps 2, 4, 6"]),
        ("no-kind", ["warm_start.weights: 'ema-0.5'", "holds raw, ema"]),
        ("frozen-otherwise", ["train.freeze now freezes", "no longer freezes"]),
    ],
)
def test_what_does_not_fit_is_told_on_every_rank(
    answers: dict[str, list[Any]], case: str, said: list[str]
) -> None:
    for answer in answers[case]:
        assert answer["error"] == "ConfigError" and answer["code"] == 2
        assert all(part in answer["said"] for part in said), answer["said"]


def moved(end: dict[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> float:
    return max(float((weight - start[name]).abs().max()) for name, weight in end.items())


def test_the_two_stage_recipe(root: Path, answers: dict[str, list[Any]]) -> None:
    """docs/recipes.md at toy size: a first stage at 16 px, its average taken over, a second stage at 32 px with v."""
    assert answers["second"] == [{"step": 2, "samples": 16}] * 2
    start = load_weights(paths_of(root, "source").checkpoints / "step-00000006", "ema")
    end = load_weights(paths_of(root, "second").checkpoints / "step-00000002", "raw")
    assert end.keys() == start.keys() and 0 < moved(end, start) < 0.02, "two small steps from there"

    config, paths = warm_config(root, "as-imported", **SECOND_STAGE), paths_of(root, "as-imported")
    said = import_run(WarmStartConfig(source=str(root / "source")), config, paths)
    assert re.fullmatch(r"begins with the ema weights of .*/step-00000006: [\d,]+ parameters", said[0])
    assert any(line.startswith("objective.prediction: 'v_prediction', but the weights") for line in said)
    written = load_config(paths.config)
    assert written.warm_start == WarmStartConfig(source=str(root / "source"))
    assert written.model == config.model and written.data == config.data
    assert written.encode.autoencoder == str(root / "source" / "autoencoder"), (
        "the encoders that the weights know"
    )


def test_an_imported_fork_goes_on_with_the_sources_data(root: Path, answers: dict[str, list[Any]]) -> None:
    source = load_config(paths_of(root, "source").config)
    config, paths = (
        source.model_copy(update={"name": "forked", "data": DataConfig()}),
        paths_of(root, "forked"),
    )
    fork = WarmStartConfig(source=str(root / "source"), weights="raw", step=4, optimizer=True)
    said = import_run(fork, config, paths)
    assert said[1] == "goes on at step 4 with its optimizer, averages and place in the data"
    written = load_config(paths.config)
    assert written.data.dataset == str(root / "latents") and written.warm_start == fork


def test_a_diffusers_folder_begins_a_run(root: Path, answers: dict[str, list[Any]]) -> None:
    assert answers["imported"] == [{"step": 1, "samples": 8}] * 2
    checkpoint = paths_of(root, "imported").checkpoints / "step-00000001"
    start, fixed = dict(open_unet_folder(root / "folder").weights()), frozen_weights(checkpoint)
    assert fixed.keys() >= {name for name in start if name.startswith("down_blocks.")}
    assert moved(fixed, start) == 0.0
    end = {name: weight for name, weight in load_weights(checkpoint, "raw").items() if name not in fixed}
    assert end.keys() | fixed.keys() == start.keys() and 0 < moved(end, start) < 0.01


def test_a_run_that_has_begun_is_not_imported_over(root: Path, answers: dict[str, list[Any]]) -> None:
    with pytest.raises(ConfigError, match="has checkpoints of its own; take another name"):
        import_run(
            WarmStartConfig(source=str(root / "folder")),
            warm_config(root, "imported"),
            paths_of(root, "imported"),
        )
