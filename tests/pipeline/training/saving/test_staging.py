"""Staging: a copy that later steps do not change, in memory that is used again."""

import torch

from pipeline.training.saving import staging as staging_module
from pipeline.training.saving.fragment_file import Stretch
from pipeline.training.saving.staging import Staging


def stretches(*sizes: int) -> list[Stretch]:
    return [Stretch("master", f"w{number}", 0, torch.randn(size)) for number, size in enumerate(sizes)]


def test_the_copy_is_of_the_moment() -> None:
    live = stretches(5, 7)
    before = [stretch.tensor.clone() for stretch in live]
    staged = Staging(pinned=False).copy(live)
    for stretch in live:
        stretch.tensor.zero_()
    assert [stretch.key for stretch in staged] == [stretch.key for stretch in live]
    assert all(torch.equal(a, b.tensor) for a, b in zip(before, staged, strict=True))


def test_memory_is_used_again_and_given_back_when_the_layout_changes() -> None:
    staging, live = Staging(pinned=False), stretches(5, 7)
    first = [stretch.tensor.data_ptr() for stretch in staging.copy(live)]
    assert [stretch.tensor.data_ptr() for stretch in staging.copy(live)] == first
    other = stretches(3)
    assert torch.equal(staging.copy(other)[0].tensor, other[0].tensor)


def test_no_more_memory_than_the_state_and_no_stretch_across_two_buffers() -> None:
    staging, live = Staging(pinned=False), stretches(5, 9, 4, 1, 12, 3)
    old, staging_module.BUFFER_ELEMENTS = staging_module.BUFFER_ELEMENTS, 10
    try:
        staged = staging.copy(live)
    finally:
        staging_module.BUFFER_ELEMENTS = old
    storages = {stretch.tensor.untyped_storage().data_ptr(): stretch.tensor for stretch in staged}
    held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) // 4
    assert 34 <= held <= 34 + 10 * (len(storages) - 1) and len(storages) > 2
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(live, staged, strict=True))


def test_a_rank_that_owns_nothing_stages_nothing() -> None:
    assert Staging(pinned=False).copy([]) == []
