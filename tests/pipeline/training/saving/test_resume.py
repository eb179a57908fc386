"""What a resume is told of its data: refused before anything is loaded, accepted once, and kept from then on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.publish import write_json
from pipeline.training.saving.manifest import committed, read_manifest, seal
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState, merged_substitutes
from tests.pipeline.training.stand_ins import StandInFragments, stand_in_checkpoints

SET = {"dataset": "/data/a", "digest": "1" * 64, "samples": 30, "weight": 1.0}
OTHER = SET | {"dataset": "/data/b", "digest": "2" * 64, "samples": 40}


def facts(one: dict[str, Any], **order: Any) -> dict[str, Any]:
    return {"data_digest": one["digest"], "data": {"sets": [one], "order": {"seed": 0} | order}}


def open_on(
    folder: Path, data: dict[str, Any], attempt: str, seed: int = 0
) -> tuple[Checkpoints, StandInFragments]:
    fragments = StandInFragments(seed=seed)
    checkpoints, _ = stand_in_checkpoints(folder, fragments, attempt=attempt)
    checkpoints._facts |= data
    return checkpoints, fragments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run on SET that stands at position 24, with two substitutes and a skipped range."""
    checkpoints, fragments = open_on(tmp_path, facts(SET), "a1")
    checkpoints.resume()
    fragments.step()
    state = RunState(step=1, samples=24, substituted={5: 7, 31: 2}, skipped_ranges=[[16, 24]])
    assert checkpoints.save(state)
    return tmp_path


def test_substitutes_are_pairs_in_the_manifest_and_numbers_again(folder: Path) -> None:
    manifest = read_manifest(folder / "step-00000001")
    assert manifest["substituted"] == [[5, 7], [31, 2]] and manifest["data_origin"] == 0
    resumed = open_on(folder, facts(SET), "a2")[0].resume()
    assert resumed is not None and resumed[0].substituted == {5: 7, 31: 2}


def test_those_of_all_ranks_are_one_list() -> None:
    of_ranks = [[[9, 1], [40, 3]], [], [[9, 1], [2, 8]]]
    assert merged_substitutes(of_ranks) == [[2, 8], [9, 1], [40, 3]]


@pytest.mark.parametrize("now", [facts(OTHER), facts(SET, seed=1)])
def test_other_data_or_another_order_is_refused_before_anything_is_loaded(
    folder: Path, now: dict[str, Any]
) -> None:
    checkpoints, fragments = open_on(folder, now, "a2", seed=9)
    with pytest.raises(DataError, match=r"(/data/b \(40 samples|seed was 0, .* is 1).*--accept-data-change"):
        checkpoints.resume()
    untouched = StandInFragments(seed=9)
    for mine, theirs in zip(untouched.owned, fragments.owned, strict=True):
        assert torch.equal(mine.master, theirs.master)


def test_accepted_it_begins_where_the_run_stands_and_the_next_resume_needs_no_word(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, fragments = open_on(folder, facts(OTHER), "a2")
    resumed = checkpoints.resume(accept_data_change=True)
    assert resumed is not None
    state = resumed[0]
    assert (state.samples, state.data_origin, state.substituted, state.skipped_ranges) == (24, 24, {}, [])
    assert "a new epoch begins at position 24" in caplog.text
    fragments.step()
    state.count(True, 8)
    state.substituted = {25: 3}
    assert checkpoints.save(state)
    again = open_on(folder, facts(OTHER), "a3")[0].resume()
    assert again is not None and again[0] == state and state.data_origin == 24
    # The flag given once more changes nothing: the data is what it was.
    once_more = open_on(folder, facts(OTHER), "a4")[0].resume(accept_data_change=True)
    assert once_more is not None and once_more[0] == state


def test_no_run_goes_back_behind_a_change_of_its_data_by_itself(folder: Path) -> None:
    checkpoints, fragments = open_on(folder, facts(OTHER), "a2")
    resumed = checkpoints.resume(accept_data_change=True)
    assert resumed is not None
    fragments.step()
    resumed[0].count(True, 8)
    assert checkpoints.save(resumed[0])
    with pytest.raises(DataError, match="--accept-data-change"):
        checkpoints.rewind(2)


def test_a_rewind_on_the_same_data_takes_its_substitutes_back(folder: Path) -> None:
    checkpoints, fragments = open_on(folder, facts(SET), "a2")
    resumed = checkpoints.resume()
    assert resumed is not None
    fragments.step()
    resumed[0].count(True, 8)
    resumed[0].substituted |= {30: 1}
    assert checkpoints.save(resumed[0])
    earlier = checkpoints.rewind(2)
    assert earlier is not None and earlier.substituted == {5: 7, 31: 2}
    assert [path.name for path in committed(folder)] == ["step-00000001"]


def test_the_data_of_an_older_format_is_compared_by_its_digest(folder: Path) -> None:
    path = folder / "step-00000001" / "checkpoint.json"
    manifest = read_manifest(path.parent)
    del manifest["digest"]
    write_json(path, seal(manifest | {"data": {}}))
    assert open_on(folder, facts(SET, seed=5), "a2")[0].resume() is not None
    with pytest.raises(DataError, match=r"was the data set 1111111111111111, the config's is /data/b"):
        open_on(folder, facts(OTHER), "a3")[0].resume()
