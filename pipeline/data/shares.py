"""Which positions of a step a rank reads, and in how many micro-batches: plain arithmetic, no numpy."""


def share(consumed: int, global_batch: int, rank: int, world_size: int) -> range:
    """Return the positions of the step at `consumed` that `rank` reads; shares differ by at most one."""
    return range(
        consumed + rank * global_batch // world_size, consumed + (rank + 1) * global_batch // world_size
    )


def micro_batches_per_step(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Return how many micro-batches every rank runs in a step: equal on all ranks, or collectives would hang."""
    largest_share = -(-global_batch // world_size)
    return -(-largest_share // micro_batch)


def split_share(positions: range, parts: int) -> list[range]:
    """Return the share cut into `parts` micro-batches of nearly equal size, some empty if the share is small."""
    count = len(positions)
    return [positions[count * part // parts : count * (part + 1) // parts] for part in range(parts)]
