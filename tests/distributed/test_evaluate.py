"""Evaluation over gloo processes: the same numbers at any world size and ZeRO stage, and one message when one rank fails."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.builders import tiny_run
from tests.distributed.cases_ema import MODEL
from tests.distributed.starter import Orders, start

pytestmark = pytest.mark.distributed

PLACES = {1: (0,), 2: (3,), 3: (2,)}
"""World size -> the ZeRO stages at which one checkpoint is looked at."""
Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    root = tmp_path_factory.mktemp("evaluation")
    tiny_run(root, model=MODEL)
    found: Answers = {}
    for world_size in (2, 1, 3):
        for case, said in start(
            "tests.distributed.cases_evaluate", root, world_size, orders(world_size)
        ).items():
            found[f"{world_size} {case}"] = said
    yield found


def orders(world_size: int) -> Orders:
    """Train in two processes, then look and measure everywhere."""
    listed: Orders = {"train": ("train", {"name": "trained", "stage": 1})} if world_size == 2 else {}
    listed["measure"] = ("measure", {"name": "trained"})
    listed["plant"] = ("plant", {"name": "tiny"})
    for stage in PLACES[world_size]:
        name = {"name": f"look-{world_size}-{stage}", "origin": "trained", "stage": stage}
        listed[f"look {stage}"] = ("look", name)
    if world_size == 3:
        damage = {"name": "damaged", "origin": "trained", "stage": 3, "rank": 1}
        listed["damaged"] = ("look_at_damage", damage)
        listed["unread"] = ("measure_damage", {"name": "trained", "rank": 2})
    return listed


def numbers(value: Any, where: str = "") -> dict[str, float]:
    """Return every number in a result by its place."""
    if isinstance(value, dict):
        return {key: n for name, part in value.items() for key, n in numbers(part, f"{where}/{name}").items()}
    if isinstance(value, list):
        return {
            key: n for name, part in enumerate(value) for key, n in numbers(part, f"{where}/{name}").items()
        }
    return {where: value} if isinstance(value, int | float) else {}


def test_every_rank_of_every_world_has_the_same_numbers_to_the_bit(answers: Answers) -> None:
    (expected,) = answers["1 measure"]
    assert len(numbers(expected["pictures"])) > 60
    for world_size in (2, 3):
        for found in answers[f"{world_size} measure"]:
            assert found == expected


def test_looking_midway_gives_these_numbers_at_every_stage_and_world_size(answers: Answers) -> None:
    (expected,) = answers["1 measure"]
    measured = [answers["2 train"][0]] + [
        answers[f"{world_size} look {stage}"][0] for world_size, stages in PLACES.items() for stage in stages
    ]
    for found in measured:
        assert found["checkpoint"] is None and found["step"] == expected["step"] == 2
        for part in ("raw", "ema", "pictures"):
            assert numbers(found[part]) == pytest.approx(numbers(expected[part]), rel=1e-4, abs=1e-6)
        assert found["pictures"]["memorisation"]["nearest"][0]["key"]


def test_a_planted_latent_is_found_whichever_rank_reads_it(answers: Answers) -> None:
    (alone,) = answers["1 plant"]
    assert (
        alone["places"][0][0] == alone["count"] - 1 and alone["ratios"][0] == 0.0 and alone["ratios"][1] > 0.5
    )
    assert all(found == alone for world_size in (2, 3) for found in answers[f"{world_size} plant"])


def test_a_sample_that_one_rank_cannot_read_ends_all_with_one_message(answers: Answers) -> None:
    """At ZeRO stage 3 the others would otherwise wait in the next forward pass for ever."""
    message = {"error": "DataError", "code": 3, "said": "rank 1: shard 00000: row 8 is damaged"}
    assert answers["3 damaged"] == [message] * 3
    unread = answers["3 unread"]
    assert unread == [unread[0]] * 3
    assert unread[0]["error"] == "PipelineError" and unread[0]["said"].startswith(
        "rank 2: [Errno 5] Input/output"
    )
