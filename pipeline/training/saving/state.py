"""What a checkpoint holds: the numbers of a run, and the tensors of one rank."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragments
from pipeline.training.saving.fragment_file import Stretch


@dataclass
class RunState:
    """Where a run stands, in plain numbers: everything a resume needs beside the tensors."""

    step: int = 0
    """Finished steps, skipped ones included."""
    samples: int = 0
    """Samples consumed: the whole state of the data, but for the next two."""
    data_origin: int = 0
    """The position at which the first epoch of the data begins: above 0 once a change of the data was accepted."""
    substituted: dict[int, int] = field(default_factory=dict)
    """Position -> number of the sample that took the place of one that could not be read; on this rank, and all
    that the checkpoint knew."""
    skipped: int = 0
    """Steps whose gradients were not finite; the rest were applied."""
    skipped_in_a_row: int = 0
    skipped_ranges: list[list[int]] = field(default_factory=list)
    """Stretches [first, stop) of positions that the run leaves out, by a rollback: multiples of the global batch."""
    loss: float | None = None
    """Mean loss of the last record."""
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """This rank's [sum of losses, applied steps, losses and weights by timestep] since the last record: the next
    record is then the same one. Older checkpoints have the first two."""
    health: dict[str, Any] = field(default_factory=dict)
    """What the last steps were like (`Health.to_json`): the same run finds the same spikes."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> Self:
        """Return the state that a manifest tells one rank of; at another world size rank 0 has the open interval."""
        numbers = {entry.name: manifest[entry.name] for entry in fields(cls)}
        parts: list[list[float]] = manifest["interval"]
        if len(parts) == world_size:
            numbers["interval"] = list(parts[rank])
        else:
            losses, counts, *binned = zip(*parts, strict=True)
            shown = [sum(values) if rank == 0 else 0.0 for values in (losses, *binned)]
            numbers["interval"] = [shown[0], counts[0], *shown[1:]]
        return cls(**numbers | {"substituted": dict(manifest["substituted"])})

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data; substitutions as pairs, for JSON's names are no numbers."""
        pairs = merged_substitutes([self.substituted.items()])
        return asdict(self) | {"applied": self.applied, "substituted": pairs}

    @property
    def applied(self) -> int:
        """Steps that moved the weights: Adam's count."""
        return self.step - self.skipped

    def count(self, applied: bool, samples: int) -> None:
        """Count one finished step; a skipped one has consumed its samples too."""
        self.step += 1
        self.samples += samples
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def begin_data(self) -> None:
        """Begin other data where the run stands: what was noted of positions was of the former data."""
        self.data_origin, self.substituted, self.skipped_ranges = self.samples, {}, []


def merged_substitutes(of_ranks: Sequence[Any]) -> list[list[int]]:
    """Return the pairs [position, sample] of all ranks, each position once, in order."""
    return [list(pair) for pair in sorted({int(k): int(n) for pairs in of_ranks for k, n in pairs}.items())]


def stretches(fragments: Fragments, ema: Ema, *, resident: bool) -> list[Stretch]:
    """Return the tensors of this rank that are saved, or, with `resident`, those that loading has to fill."""
    adam = [
        Stretch(kind, fragment.name, fragment.start, getattr(fragment, kind))
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for fragment in (fragments.resident if resident else fragments.owned)
    ]
    held = ema.held(to_load=resident)
    return adam + [Stretch(kind, fragment.name, fragment.start, mean) for kind, fragment, mean in held]
