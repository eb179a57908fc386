"""Work that is cut into the same pieces at every world size, and errors that end all ranks with one message.

What a user can act on (a damaged sample, a missing folder) is told to all ranks before any of them goes on to a
forward pass, which at ZeRO stage 3 would wait for the one that failed. Anything else ends its process at once, and the
others see its connections close.
"""

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from pipeline import errors
from pipeline.errors import PipelineError
from pipeline.training.averages.turns import Share
from pipeline.training.world import World

Result = TypeVar("Result")
Arrays = dict[str, np.ndarray]


def agreed(world: World, action: Callable[[], Result]) -> Result:
    """Return what `action` returns on this rank; when it raises on any rank, raise that one's error on all.

    Raises:
        PipelineError: of the class that the action raised on the first rank that failed; an OSError becomes one.
    """
    if world.world_size == 1:
        return action()
    said: list[str] | None = None
    result: list[Result] = []
    try:
        result.append(action())
    except PipelineError as error:
        said = [type(error).__name__, str(error)]
    except OSError as error:
        said = [PipelineError.__name__, str(error)]
    for rank, problem in enumerate(world.gather(said)):
        if problem is not None:
            kind: type[PipelineError] = getattr(errors, problem[0])
            raise kind(f"rank {rank}: {problem[1]}")
    return result[0]


def from_first(world: World, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 alone and return its plain JSON result on every rank. Raises as `agreed`."""
    return world.broadcast(agreed(world, lambda: action() if world.is_first else None))


def in_turns(
    world: World, pieces: int, prepare: Callable[[int], Result]
) -> Iterator[tuple[int, Result, bool]]:
    """Yield (piece, what `prepare` made of it, whether it is a filler), equally often on every rank.

    All ranks prepare before any of them goes on. Raises as `agreed`.
    """
    for piece, filler in Share(world.rank, world.world_size).of(pieces):
        prepared = agreed(world, lambda piece=piece: prepare(piece))  # type: ignore[misc]
        yield piece, prepared, filler


def exchanged(world: World, mine: Mapping[int, Arrays]) -> dict[int, Arrays]:
    """Return the arrays of all ranks' pieces, in the order of pieces, the same bits on every rank.

    They travel as text: call it once a round, while they are small.
    """
    if world.world_size == 1:
        return dict(mine)
    packed = {
        str(piece): {name: _pack(array) for name, array in arrays.items()} for piece, arrays in mine.items()
    }
    found: dict[int, Arrays] = {}
    for part in world.gather(packed):
        for piece, arrays in part.items():
            found[int(piece)] = {name: _unpack(packed) for name, packed in arrays.items()}
    return dict(sorted(found.items()))


def _pack(array: np.ndarray) -> list[Any]:
    return [str(array.dtype), list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _unpack(packed: list[Any]) -> np.ndarray:
    dtype, shape, text = packed
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
