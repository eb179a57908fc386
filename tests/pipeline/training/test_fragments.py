"""The parts of the adapter that need no engine; the rest checks itself at every start (tests/distributed)."""

import pytest
import torch

from pipeline.errors import ToolError
from pipeline.training.fragments import Fragment, _even_share, refuse_untested


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8", "0.19.9+git"])
def test_tested_versions_pass(version: str) -> None:
    refuse_untested(version)


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0"])
def test_others_are_refused_with_both_versions(version: str) -> None:
    with pytest.raises(ToolError, match=rf"DeepSpeed {version}: .*tested with 0\.19\.x"):
        refuse_untested(version)


def whole(*counts: int) -> tuple[Fragment, ...]:
    return tuple(
        Fragment(f"p{number}", (count,), 0, *(torch.arange(float(count)) for _ in range(3)))
        for number, count in enumerate(counts)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_shares_of_replicated_state_are_even_disjoint_and_complete(world_size: int) -> None:
    fragments = whole(10, 1, 17, 3)
    seen = []
    for rank in range(world_size):
        share = list(_even_share(fragments, rank, world_size))
        count = sum(fragment.master.numel() for fragment in share)
        assert count in (31 // world_size, -(-31 // world_size))
        for fragment in share:
            assert fragment.master[0].item() == fragment.start and fragment.stop <= fragment.shape[0]
            seen += [(fragment.name, int(value)) for value in fragment.master]
    assert sorted(seen) == sorted((f.name, int(v)) for f in fragments for v in f.master)


def test_a_share_is_a_live_view() -> None:
    fragments = whole(4)
    part = fragments[0].narrow(1, 3)
    part.master.fill_(9.0)
    assert fragments[0].master.tolist() == [0.0, 9.0, 9.0, 3.0] and part.start == 1 and part.stop == 3
