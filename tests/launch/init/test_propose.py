"""From a source with known properties to the proposal that must follow, on cores and on GPUs."""

from pathlib import Path

import pytest

from launch.check import combination_problems
from launch.init.cost import MEASURED, stage_costs, step_seconds
from launch.init.look import Facts, look_at
from launch.init.pictures import Header
from launch.init.proposal import Machine, Proposal, shipped
from launch.init.propose_cpu import propose_for_cpu
from launch.init.propose_gpu import propose_for_gpu
from launch.init.shapes import propose_shapes
from pipeline.errors import DataError
from preprocessing.buckets import best_bucket
from tests.launch.init.folders import drawing, picture, write_folder

TWO_CORES = Machine("cpu", cores=2, gpus=8)
GPUS = Machine("gpu", cores=16, gpus=4)


def facts_of(folder: Path, sizes: list[tuple[int, int]], captions: list[str] | None = None) -> Facts:
    pictures = [picture(number, size) for number, size in enumerate(sizes)]
    return look_at(str(write_folder(folder, pictures, captions or [f"thing {n}" for n in range(len(sizes))])))


def header(width: int, height: int) -> Header:
    return Header(height, width, "RGB", "PNG", False, False, 1000, "")


def proposed(facts: Facts, machine: Machine = TWO_CORES) -> Proposal:
    propose = propose_for_cpu if machine.device == "cpu" else propose_for_gpu
    found = propose(facts, machine, "run")
    assert combination_problems(found.config) == []
    return found


@pytest.mark.parametrize(("side", "size", "latent"), [(28, 32, 8), (40, 32, 8), (64, 64, 8), (500, 64, 8)])
def test_size_follows_the_pictures_up_to_what_cores_can_paint(
    tmp_path: Path, side: int, size: int, latent: int
) -> None:
    config = proposed(facts_of(tmp_path, [(side, side)] * 20)).config
    assert (config.encode.image_size, config.model.sample_size) == (size, latent)
    assert config.encode.min_side == (size if side >= size else 16)


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (3, 2), (16, 8)])
def test_the_first_stage_takes_the_cores_that_share_its_batches(
    tmp_path: Path, cores: int, processes: int
) -> None:
    config = proposed(facts_of(tmp_path, [(64, 64)] * 20), Machine("cpu", cores, 0)).config
    assert config.first_stage is not None and config.first_stage.processes == processes
    assert config.first_stage_threads * processes <= cores


def test_the_demos_recipe_without_its_choice_of_subjects(tmp_path: Path) -> None:
    few, many = (proposed(facts_of(tmp_path / str(count), [(64, 64)] * count)) for count in (20, 200))
    demo = shipped("demo.yaml")
    assert few.base == many.base == "demo.yaml" and demo.encode.filters and demo.evaluate.metrics
    for found in (few, many):
        assert found.config.encode.filters == () and found.config.objective == demo.objective
        assert found.config.first_stage is not None and demo.first_stage is not None
        assert found.config.first_stage.autoencoder.perceptual.weight > 0
    assert (few.config.evaluate.metrics, many.config.evaluate.metrics) == ((), demo.evaluate.metrics)
    assert (few.config.evaluate.batch, many.config.evaluate.batch) == (4, 10)


def test_a_short_time_is_not_spent_on_features(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, [(64, 64)] * 200)
    found = {minutes: proposed(facts, Machine("cpu", 2, 8, minutes=minutes)) for minutes in (3, 60)}
    steps = {}
    for minutes, proposal in found.items():
        seconds = {stage.stage: stage.seconds for stage in proposal.stages}
        assert seconds["features"] <= 0.15 * seconds["autoencoder"]
        assert proposal.config.first_stage is not None
        steps[minutes] = proposal.config.first_stage.autoencoder.perceptual.steps
    assert steps[3] < steps[60] == 300


def test_large_pictures_with_much_time_get_a_smaller_latent(tmp_path: Path) -> None:
    found = proposed(facts_of(tmp_path, [(200, 200)] * 20), Machine("cpu", 2, 8, minutes=180))
    assert found.config.encode.image_size == 128 and found.config.model.sample_size == 16
    assert found.config.first_stage is not None
    assert found.config.first_stage.autoencoder.downsampling == 8
    assert (
        found.config.objective.model_dump()
        == proposed(facts_of(tmp_path / "b", [(64, 64)] * 20)).config.objective.model_dump()
    )


def test_square_where_a_crop_cuts_little_and_buckets_where_they_fill() -> None:
    square = propose_shapes([header(100, 96)] * 50, 64, 16, 2.0, 0.1)
    assert square.buckets is None and square.mean_crop == pytest.approx(0.04)
    half = propose_shapes([header(96, 64)] * 50 + [header(64, 96)] * 50, 64, 16, 2.0, 0.1)
    assert (
        half.buckets is not None
        and half.square_crop == pytest.approx(1 / 3)
        and half.mean_crop == pytest.approx(0.1)
    )
    assert all(side % 16 == 0 for bucket in half.buckets for side in bucket)
    # One odd picture gives no bucket of its own, and one shape is none.
    odd = propose_shapes([header(96, 64)] * 99 + [header(64, 96)], 64, 16, 2.0, 0.1)
    assert odd.buckets is None and "no two buckets" in odd.reason


def test_every_proposed_bucket_holds_its_share() -> None:
    headers = [header(64 + 8 * (n % 9), 64) for n in range(900)] + [
        header(64, 64 + 8 * (n % 9)) for n in range(450)
    ]
    shapes = propose_shapes(headers, 64, 16, 2.0, 0.08)
    assert shapes.buckets is not None
    held = [best_bucket(each.height, each.width, shapes.buckets)[0] for each in headers]
    assert all(held.count(bucket) >= 0.08 * len(headers) for bucket in shapes.buckets)


@pytest.mark.parametrize(("light", "ground"), [(5, 255), (250, 0)])
def test_the_background_is_what_the_drawings_stand_out_from(tmp_path: Path, light: int, ground: int) -> None:
    captions = [f"disc {number}" for number in range(12)]
    facts = look_at(str(write_folder(tmp_path, [drawing(light)] * 12, captions)))
    assert proposed(facts).config.encode.background == (ground,) * 3


def test_steps_follow_the_time_and_stop_where_more_bring_nothing(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, [(64, 64)] * 300)
    short, longer = (proposed(facts, Machine("cpu", 2, 8, minutes=minutes)) for minutes in (10, 40))
    assert longer.config.train.steps > 3 * short.config.train.steps
    for found, minutes in ((short, 10), (longer, 40)):
        assert 0.8 * minutes <= found.minutes <= 1.02 * minutes
        config = found.config
        pairs = 300 - config.encode.validation_samples
        assert found.visits == pytest.approx(config.train.steps * config.engine.global_batch / pairs)
    assert proposed(facts, Machine("cpu", 2, 8, minutes=2000)).visits <= 800
    assert any("--minutes" in note for note in short.notes)
    # Twice the cores, as many minutes: twice the visits.
    assert proposed(facts, Machine("cpu", 4, 8, minutes=40)).visits >= 1.7 * longer.visits


def test_many_pictures_of_few_captions_are_each_seen_too(tmp_path: Path) -> None:
    captions = [("cat", "dog")[number % 2] for number in range(100)]
    found = proposed(facts_of(tmp_path, [(64, 64)] * 100, captions), Machine("cpu", 2, 8, minutes=600))
    pairs = 100 - found.config.encode.validation_samples
    assert found.config.train.steps * found.config.engine.global_batch >= 18 * pairs
    assert found.visits <= 1010


def test_the_smallest_set_still_makes_batches(tmp_path: Path) -> None:
    config = proposed(facts_of(tmp_path, [(64, 64)] * 8)).config
    pairs = 8 - config.encode.validation_samples
    assert config.first_stage is not None
    assert config.first_stage.clip.batch <= pairs and config.engine.global_batch <= pairs
    with pytest.raises(DataError, match="7 usable pairs; at least 8"):
        proposed(facts_of(tmp_path / "b", [(64, 64)] * 7))


def test_captions_set_the_length_of_the_text(tmp_path: Path) -> None:
    words = [f"alpha beta {number}" for number in range(40)]
    long = [*words[:39], " ".join(f"word{n}" for n in range(200))]
    lengths = []
    for place, captions in enumerate((words, long)):
        config = proposed(facts_of(tmp_path / str(place), [(64, 64)] * 40, captions)).config
        assert config.first_stage is not None
        lengths.append(config.first_stage.clip.max_tokens)
    assert lengths[0] <= 16 and lengths[1] == 77


def test_gpus_get_published_encoders_and_a_network_for_the_number_of_pictures(tmp_path: Path) -> None:
    small = facts_of(tmp_path, [(300, 300)] * 20)
    found = proposed(small, GPUS)
    assert found.config.first_stage is None and found.config.data.dataset is None
    assert (found.config.encode.autoencoder, found.config.encode.text_encoder) == (
        "models/sd-vae",
        "models/clip-vit-large-patch14",
    )
    assert found.config.engine.processes == found.config.cluster.gpus_per_node == 4
    assert found.gpu is not None and found.gpu.train_hours > 0 and "fill in" in found.notes[0]
    assert found.config.encode.image_size == 256 and found.config.encode.min_side == 256


def test_millions_of_large_pictures_get_the_published_network(tmp_path: Path) -> None:
    few = facts_of(tmp_path, [(600, 600)] * 20)
    many = Facts(**{**few.__dict__, "samples": 20_000_000, "counted": 20_000_000, "exact": True})
    found = proposed(many, GPUS)
    assert found.base == "sd15-512.yaml" and found.config.model.block_out_channels == (320, 640, 1280, 1280)
    assert found.config.encode.text == "tokens" and found.config.engine.global_batch == 2048
    assert found.visits == pytest.approx(8.9, abs=0.2)  # 400 x sqrt(10,000 / 20,000,000)
    short = proposed(many, Machine("gpu", 16, 4, minutes=600))
    assert short.config.train.steps < found.config.train.steps and short.gpu is not None
    assert short.gpu.train_hours + short.gpu.encode_hours <= 1.02 * 4 * 600 / 60


def test_minutes_of_the_measured_demo_are_given_back() -> None:
    for stage, measured in MEASURED.items():
        a_step = step_seconds(stage, measured.gflops_a_sample, measured.batch, cores=2)
        assert a_step * measured.steps == pytest.approx(measured.seconds)


def test_costs_scale_with_the_cores(tmp_path: Path) -> None:
    config = proposed(facts_of(tmp_path, [(64, 64)] * 20)).config
    two, four = (sum(cost.seconds for cost in stage_costs(config, 0, cores)) for cores in (2, 4))
    assert two - 45 == pytest.approx(2 * (four - 45))
