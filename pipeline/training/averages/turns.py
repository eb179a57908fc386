"""Equal numbers of forward passes on all ranks: who does which piece of work, and who fills in."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of one rank in work that is cut into pieces without regard to the world size."""

    rank: int = 0
    world_size: int = 1

    def of(self, pieces: int) -> Iterator[tuple[int, bool]]:
        """Yield (piece, whether it is a filler), equally often on every rank: rank r does r, r + W, r + 2 W, ...

        A rank without a piece in the last round does the first piece once more and throws the result away: at ZeRO
        stage 3 a forward pass gathers weights from all, and one that is left out is a hang.
        """
        for first in range(0, pieces, self.world_size):
            piece = first + self.rank
            filler = piece >= pieces
            yield (0 if filler else piece), filler


ALONE = Share()
