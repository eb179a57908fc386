"""What to do about gradients that are not finite: skip the step, name the samples, and end before the time is lost.

DeepSpeed skips such steps for ever and says nothing of the data. Here a few in a row end the run with exit code 5
and the samples that did it.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.data.loader import LatentBatch
from pipeline.errors import DivergedError
from pipeline.training.world import World

logger = logging.getLogger(__name__)

NAMED_SAMPLES = 16


def suspects(world: World, batches: Sequence[LatentBatch], losses: Sequence[Tensor]) -> list[int]:
    """Return the samples of the split whose loss was not finite, over all ranks; all samples of the step if none was.

    `losses` are float [b] for each micro-batch of this rank. Waits for the device and for the other ranks: only
    for a step that was skipped.
    """
    indices = torch.cat([batch.indices.cpu() for batch in batches])
    wrong = ~torch.isfinite(torch.cat([loss.detach().float().cpu() for loss in losses]))
    mine = [[int(index) for index in part] for part in (indices[wrong], indices)]
    parts = world.gather(mine)
    of_wrong = sorted({index for part in parts for index in part[0]})
    return of_wrong or sorted({index for part in parts for index in part[1]})


def refuse_divergence(step: int, skipped_in_a_row: int, limit: int, samples: Sequence[int]) -> None:
    """Say that `step` was skipped because of `samples`; call it after every skipped step, with equal arguments on all ranks.

    Raises:
        DivergedError: this was the last of `limit` skipped steps in a row.
    """
    shown = ", ".join(map(str, samples[:NAMED_SAMPLES]))
    rest = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
    line = (
        f"step {step}: gradients not finite, step skipped ({skipped_in_a_row} of at most {limit} in a row); "
        f"samples {shown}{rest} of the train split"
    )
    logger.warning("%s", line)
    if skipped_in_a_row >= limit:
        raise DivergedError(
            f"{line}; look at these samples with `ldm verify`, or lower optimizer.learning_rate and start again "
            "from an older checkpoint"
        )
