"""Is the data of a resume what the run was trained on, and if not, in what?

Positions are of one data set in one order. Other data, or the same in another order, would repeat some samples of
the epoch and leave others out in silence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig, RunConfig
from pipeline.data.mixture import uses_lanes
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from pipeline.publish import json_digest


def data_facts(sets: Sequence[LatentDataset], config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint says of its data: `data_digest`, the data sets, and what decides their order."""
    weights = [entry.weight for entry in config.data.mix] or [1.0]
    lanes = any(uses_lanes(config.data, dataset) for dataset in sets)
    order = {"seed": config.seed, "data.order": "lanes" if lanes else "global"}
    if lanes:
        order |= {"data.lanes": config.data.lanes, "data.lane_window": config.data.lane_window}
    listed = [
        {"dataset": place, "digest": dataset.manifest.digest, "samples": len(dataset), "weight": weight}
        for place, dataset, weight in zip(_places(sets, config), sets, weights, strict=True)
    ]
    return {"data_digest": data_digest(sets, config.data), "data": {"sets": listed, "order": order}}


def data_digest(sets: Sequence[LatentDataset], data: DataConfig) -> str:
    """Return what says that two runs read the same: the manifest's digest, or one over all sets and weights."""
    if len(sets) == 1:
        return sets[0].manifest.digest
    weights = [entry.weight for entry in data.mix]
    return json_digest([[dataset.manifest.digest for dataset in sets], weights])


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between two `data_facts`; one written by an older version knows fewer."""
    lines = []
    then, present = before["data"], now["data"]
    if before["data_digest"] != now["data_digest"]:
        theirs, ours = (_named(facts) for facts in (before, now))
        lines += [f"the data was {' and '.join(theirs)}, the config's is {' and '.join(ours)}"]
    old, new = then.get("order", {}), present.get("order", {})
    lines += [
        f"{name} was {old[name]!r}, the config's is {new[name]!r}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    return lines


def refuse_changes(checkpoint: Path, changes: Sequence[str]) -> None:
    """Do nothing where nothing has changed.

    Raises:
        DataError: one line that says what has, and how to accept it.
    """
    if changes:
        raise DataError(
            f"{checkpoint}: {'; '.join(changes)}; give back what it was trained on, use another run name, or begin a new "
            "epoch here with --accept-data-change"
        )


def _named(facts: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each data set of `data_facts`."""
    sets = facts["data"].get("sets")
    if not sets:
        return [f"the data set {facts['data_digest'][:16]}"]
    phrases = [f"{one['dataset']} ({one['samples']} samples, {one['digest'][:16]}" for one in sets]
    weights = [f", weight {one['weight']:g})" if len(sets) > 1 else ")" for one in sets]
    return [phrase + weight for phrase, weight in zip(phrases, weights, strict=True)]


def _places(sets: Sequence[LatentDataset], config: RunConfig) -> list[str]:
    """Return what the config calls each data set; the folder of a store's tables would say little."""
    named: list[str | None] = [*(entry.dataset for entry in config.data.mix)] or [config.data.dataset]
    return [place or str(dataset.folder) for place, dataset in zip(named, sets, strict=True)]
