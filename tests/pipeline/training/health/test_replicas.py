"""The checksum that tells ranks apart; the comparison itself is in tests/distributed."""

import pytest
import torch

from pipeline.training.health.replicas import bit_sum, minority


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_changes_the_sum(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(bit_sum(weight))
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for element in (0, 7, 14):
        for bit in range(8 * weight.element_size()):
            damaged = weight.clone()
            flat = damaged.view(-1).view(sizes[weight.element_size()])
            mask = 1 << bit
            flat[element] ^= (
                mask - (1 << 8 * weight.element_size()) if bit == 8 * weight.element_size() - 1 else mask
            )
            assert int(bit_sum(damaged)) != before, (element, bit)


def test_the_sum_is_of_bits_not_of_values() -> None:
    assert int(bit_sum(torch.tensor([0.0]))) != int(bit_sum(torch.tensor([-0.0])))
    strided = torch.arange(12.0).view(3, 4).t()
    assert int(bit_sum(strided)) == int(bit_sum(strided.contiguous()))


@pytest.mark.parametrize(
    ("values", "guilty"),
    [("aab", [2]), ("ab", []), ("aabb", []), ("aaaab", [4]), ("abaca", [1, 3]), ("abc", []), ("aaa", [])],
)
def test_the_minority_is_told_only_against_more_than_half(values: str, guilty: list[int]) -> None:
    assert minority(list(values)) == guilty
