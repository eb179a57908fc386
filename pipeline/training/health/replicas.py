"""Weights that every rank holds a copy of must be the same bits: compared by a checksum, now and then.

At stages 0 to 2 every rank has all low-precision weights. Layer norms of BLOOM-176B drifted apart between ranks for
weeks before anyone saw it. At stage 3 there is nothing to compare: each element lies on one rank alone. At stages
1 and 2 every step overwrites the weights with what the owners of the masters send, so the comparison finds damage
since the last step; at stage 0 a difference stays and grows.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragment, Fragments
from pipeline.training.health.judge import Trouble
from pipeline.training.world import World

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAMED_WEIGHTS = 3


class Replicas:
    """The copies of the weights on all ranks."""

    def __init__(self, engine: Engine, fragments: Fragments, world: World) -> None:
        """Bind to the network; at stage 3, and alone, there is nothing to compare."""
        network: nn.Module = engine.network.module
        self._weights = dict(network.named_parameters())
        self._stage, self._fragments, self._world = engine.stage, fragments, world
        self.exist = engine.stage < 3 and world.world_size > 1

    @torch.no_grad()
    def compare(self, step: int) -> Trouble | None:
        """Return None if all ranks hold the same weights after `step`, or which rank does not; all ranks together.

        One integer sum a tensor on the device, one copy, one gather of 32 bytes a rank. Any single flipped bit
        changes a sum; two that undo each other's in the same tensor are not seen.
        """
        if not self.exist:
            return None
        sums = torch.stack([bit_sum(weight) for weight in self._weights.values()]).cpu()
        digest = hashlib.sha256(sums.numpy().tobytes()).hexdigest()[:32]
        digests = self._world.gather(digest)
        if len(set(digests)) == 1:
            return None
        every = self._world.gather(sums.tolist())
        names = list(self._weights)
        differing = [names[i] for i in range(len(names)) if len({each[i] for each in every}) > 1]
        by_masters = self._against_masters() if self._stage else []
        guilty = by_masters or minority(digests)
        said = f"rank {', '.join(map(str, guilty))}" if guilty else "one of the ranks, which cannot be told,"
        how = "differs from the masters" if by_masters else "differs from the other ranks"
        shown = ", ".join(differing[:NAMED_WEIGHTS]) + (" ..." if len(differing) > NAMED_WEIGHTS else "")
        line = f"step {step}: the weights of {said} {how} in {len(differing)} tensors ({shown})"
        return Trouble(f"{line}; suspect the memory of that machine", None)

    def _against_masters(self) -> list[int]:
        """Return the ranks whose weights are not the masters rounded to the weights' type, wherever those lie."""
        owned = [
            [one.name, one.start, one.stop, int(bit_sum(self._rounded(one)))] for one in self._fragments.owned
        ]
        truths = [stretch for part in self._world.gather(owned) for stretch in part]
        mine = [self._sum_of(name, start, stop) == expected for name, start, stop, expected in truths]
        return [rank for rank, right in enumerate(self._world.gather(all(mine))) if not right]

    def _rounded(self, fragment: Fragment) -> Tensor:
        weight = self._weights[fragment.name]
        return fragment.master.to(weight.device, weight.dtype)

    def _sum_of(self, name: str, start: int, stop: int) -> int:
        return int(bit_sum(self._weights[name].detach().view(-1)[start:stop]))


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor's bit patterns taken as integers, int64 scalar on its device."""
    flat = tensor.detach().reshape(-1)
    return flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def minority(values: Sequence[str]) -> list[int]:
    """Return the places whose value is not that of more than half of all; nothing if no value has such a majority."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return []
    return [place for place, other in enumerate(values) if other != value]
