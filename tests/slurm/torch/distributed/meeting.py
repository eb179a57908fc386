"""A collective of ranks without torch: files in a folder. Lies at this path for the judge of hangs, who reads stacks."""

import time
from pathlib import Path


def meet(folder: Path, step: int, rank: int, world_size: int, word: str) -> str:
    """Leave `word` at this step, wait for all, and return rank 0's."""
    mine = folder / f"{step}-{rank}"
    mine.with_suffix(".new").write_text(word)
    mine.with_suffix(".new").rename(mine)
    while not all((folder / f"{step}-{other}").exists() for other in range(world_size)):
        time.sleep(0.01)
    return (folder / f"{step}-0").read_text()
