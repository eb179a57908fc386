"""The stream of a run by real processes: a mixture in buckets, a bad sample, any world size, changed data.

The processes write the samples that they trained on; the tests compare what is written, as sequences and as
multisets, with one uninterrupted run.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.latents.reader import LatentDataset
from pipeline.latents.shard import shard_path
from pipeline.tracking import read_records
from tests.distributed.cases import paths_of
from tests.distributed.dataset import SPEC
from tests.distributed.starter import Orders, start
from tests.faults.damage import flip_bit
from tests.pipeline.data.datasets import Stretch, write_dataset

pytestmark = pytest.mark.distributed

STEPS, BATCH = 9, 6
TRAIN = {"steps": STEPS, "log_every": 1, "checkpoint_every": 100}
SMALL = {"engine": {"global_batch": BATCH, "micro_batch": 2, "precision": "fp32", "zero_stage": 1}}
SETS = [["photos", 3.0], ["drawings", 1.0]]
CHANGED = [["photos", 3.0], ["more-drawings", 1.0]]
SQUARE, WIDE = (16, 16), (16, 24)
BAD = 2
"""The number in `photos`, and so of the mixture, of the sample with a flipped bit."""
SUBSTITUTE = {"on_bad_sample": "substitute"}
FIRST, SECOND = 4, 7


def run_of(name: str, sets: Any = SETS, **arguments: Any) -> tuple[str, dict[str, Any]]:
    settings = {"train": TRAIN, "data": SUBSTITUTE, **SMALL}
    return "run_told", {"name": name, "sets": sets, **settings, **arguments}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets with two buckets each, a larger one, and a flipped bit in the payload of a sample of the first."""
    folder = tmp_path_factory.mktemp("data")
    photos = write_dataset(
        folder / "photos", [[Stretch(7, SQUARE), Stretch(4, WIDE)], [Stretch(5, SQUARE)]], SPEC, seed=1
    )
    write_dataset(folder / "drawings", [[Stretch(6, SQUARE), Stretch(6, WIDE)]], SPEC, seed=2)
    write_dataset(folder / "more-drawings", [[Stretch(9, SQUARE), Stretch(6, WIDE)]], SPEC, seed=3)
    place = LatentDataset(photos).table.place(BAD)
    flip_bit(shard_path(photos, "00000", ".tar"), place.offset + 512 + 128 + 40, 1)
    return folder


@pytest.fixture(scope="module")
def answers(root: Path) -> dict[str, list[Any]]:
    """Two processes, then three, then one; what each case returned, by rank."""
    pair: Orders = {
        "straight": run_of("straight"),
        "cut-1": run_of("cut", stop_after=FIRST),
        "changed-1": run_of("changed", stop_after=FIRST),
    }
    three: Orders = {
        "cut-2": run_of("cut", attempt="a2", stop_after=SECOND),
        "refused": run_of("changed", CHANGED, attempt="refused"),
        "changed-2": run_of("changed", CHANGED, attempt="a2", stop_after=SECOND, accept=True),
    }
    alone: Orders = {
        "cut-3": run_of("cut", attempt="a3"),
        "changed-3": run_of("changed", CHANGED, attempt="a3"),
        "stops": run_of("stops", data={"on_bad_sample": "stop"}),
    }
    found: dict[str, list[Any]] = {}
    for world_size, orders in ((2, pair), (3, three), (1, alone)):
        found |= start("tests.distributed.cases_data", root, world_size, orders)
    return found


def written(root: Path, name: str, *attempts: str) -> list[list[int]]:
    """Return what the processes wrote of these attempts, [position, sample, height, width], by position."""
    files = [path for attempt in attempts for path in (root / "ids").glob(f"{name}-{attempt}-*")]
    assert files
    return sorted(json.loads(line) for path in files for line in path.read_text().splitlines())


def groups(root: Path, sets: list[list[Any]]) -> dict[int, tuple[int, int, int]]:
    """Return the (data set, latent height, latent width) of every sample number."""
    found: dict[int, tuple[int, int, int]] = {}
    for number, (folder, _) in enumerate(sets):
        dataset = LatentDataset(root / folder)
        for index in range(len(dataset)):
            height, width = dataset.table.place(index).bucket
            found[len(found)] = (number, height // 2, width // 2)
    return found


def test_three_parts_at_two_three_and_one_processes_are_the_uninterrupted_run(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    parts = [answers[f"cut-{number}"] for number in (1, 2, 3)]
    assert [[answer["step"] for answer in part] for part in parts] == [[FIRST] * 2, [SECOND] * 3, [STEPS]]
    straight, cut = written(root, "straight", "a1"), written(root, "cut", "a1", "a2", "a3")
    assert [line[0] for line in straight] == list(range(STEPS * BATCH))  # Every position by one rank, once.
    assert cut == straight
    assert Counter(line[1] for line in cut) == Counter(line[1] for line in straight)
    # Readers are ahead of the training: what they replaced there is kept too.
    kept = [answers[name][0]["substituted"] for name in ("straight", "cut-3")]
    trained = [[pair for pair in pairs if pair[0] < STEPS * BATCH] for pairs in kept]
    assert trained[0] and trained[0] == trained[1]


def test_every_sample_of_each_set_and_bucket_once_an_epoch_and_no_batch_of_two_shapes(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    """The bad sample counts where it was replaced: its place is known, and only it was."""
    straight, of_sample = written(root, "straight", "a1"), groups(root, SETS)
    replaced = dict(answers["straight"][0]["substituted"])
    assert all(index != BAD for _, index, *_ in straight)
    meant = {k: BAD if k in replaced else index for k, index, *_ in straight}
    assert all(replaced.get(k, index) == index for k, index, *_ in straight)
    seen = Counter(meant.values())
    assert seen[BAD] >= 1
    for group in set(of_sample.values()):
        counts = [seen[index] for index, other in of_sample.items() if other == group]
        assert max(counts) - min(counts) <= 1
    for k, index, *shape in straight:
        assert of_sample[index][1:] == tuple(shape), k
    for first in range(0, STEPS * BATCH, BATCH):
        assert len({tuple(line[2:]) for line in straight[first : first + BATCH]}) == 1
    from_photos = sum(of_sample[index][0] == 0 for index in meant.values())
    assert abs(from_photos - 0.75 * STEPS * BATCH) <= 2


def test_without_the_policy_the_bad_sample_ends_the_run_and_is_named(answers: dict[str, list[Any]]) -> None:
    (answer,) = answers["stops"]
    assert (answer["error"], answer["code"]) == ("DataError", 3)
    assert "photos/00/00000.tar" in answer["said"] and f"k{BAD:06d}" in answer["said"]


def test_changed_data_is_refused_on_all_ranks_in_one_line(root: Path, answers: dict[str, list[Any]]) -> None:
    for answer in answers["refused"]:
        assert (answer["error"], answer["code"]) == ("DataError", 3)
        assert "\n" not in answer["said"] and "--accept-data-change" in answer["said"]
        assert "drawings (12 samples, " in answer["said"] and "more-drawings (15 samples, " in answer["said"]
    assert not list((root / "ids").glob("changed-refused-*"))


def test_accepted_it_begins_a_new_epoch_there_and_later_resumes_need_no_word(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    origin, of_sample = FIRST * BATCH, groups(root, CHANGED)
    for answer in (*answers["changed-2"], *answers["changed-3"]):
        assert answer["data_origin"] == origin
    assert answers["changed-2"][0]["data_digest"] != answers["changed-1"][0]["data_digest"]
    after = written(root, "changed", "a2", "a3")
    assert [line[0] for line in after] == list(range(origin, STEPS * BATCH))
    # What was recorded of the former data is gone; what was replaced since is of the new positions.
    replaced = dict(answers["changed-3"][0]["substituted"])
    assert all(k >= origin for k in replaced)
    seen = Counter(BAD if k in replaced else index for k, index, *_ in after)
    for group in set(of_sample.values()):
        counts = [seen[index] for index, other in of_sample.items() if other == group]
        assert max(counts) - min(counts) <= 1
    assert written(root, "changed", "a1") == written(root, "straight", "a1")[:origin]


def test_the_record_has_share_and_epochs_of_each_set(root: Path, answers: dict[str, list[Any]]) -> None:
    for name, sizes in (("straight", (16, 12)), ("changed", (16, 15))):
        last = read_records(paths_of(root, name).metrics, "train")[-1]
        origin = answers["changed-3"][0]["data_origin"] if name == "changed" else 0
        of_sample = groups(root, SETS if name == "straight" else CHANGED)
        lines = [line for line in written(root, name, "a1", "a2", "a3") if line[0] >= origin]
        for number, size in enumerate(sizes):
            drawn = sum(of_sample[index][0] == number for _, index, *_ in lines)
            assert last[f"data_epochs/{number}"] == drawn / size
        assert last["data_share/0"] == pytest.approx(0.75, abs=1e-3)
