"""The result of an evaluation as a table of text."""

from collections.abc import Iterator, Mapping
from typing import Any

LOSSES = "validation loss"


def table(result: Mapping[str, Any]) -> str:
    """Return the lines of a table: what, value, 95 % interval, and what the number is made of."""
    rows = [("", "value", "95 % interval", ""), *_loss_rows(result), *_picture_rows(result.get("pictures"))]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([_head(result), *lines, *_foot(result.get("pictures"))])


def _head(result: Mapping[str, Any]) -> str:
    where = result["checkpoint"] or "in training"
    counts = f"{result['samples']} training samples, {result['validation_samples']} validation samples"
    return f"{where}: step {result['step']}, {counts}"


def _loss_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    timesteps = ", ".join(str(timestep) for timestep in result["timesteps"])
    for kind in result["kinds"]:
        found = result[kind]
        by_timestep = " ".join(f"{loss:.3f}" for loss in found["loss_by_timestep"])
        yield (
            f"{LOSSES}, {kind}",
            f"{found['loss']:.4f}",
            f"+- {found['standard_error']:.4f}",
            f"at t = {timesteps}: {by_timestep}",
        )


def _picture_rows(pictures: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str, str]]:
    if pictures is None:
        return
    if "kid" in pictures:
        subsets = pictures["kid"]["subsets"]
        spread = (
            ""
            if subsets["mean"] is None
            else f"{subsets['mean']:.4f} +- {subsets['deviation']:.4f} over {subsets['count']} subsets of {subsets['size']}"
        )
        yield "KID", f"{pictures['kid']['value']:.4f}", interval(pictures["kid"]), spread
    if "frechet" in pictures:
        found = pictures["frechet"]
        name = "FID" if found["name"] == "FID" else "Frechet distance"
        said = found["note"] or f"bias in 1/n removed; {found['plug_in']:.2f} uncorrected"
        yield name, f"{found['value']:.2f}", interval(found), said
    if "precision_recall" in pictures:
        for name in ("precision", "recall"):
            neighbours = pictures["precision_recall"]["neighbours"]
            yield name, f"{pictures['precision_recall'][name]:.3f}", "", f"{neighbours} nearest neighbours"
    for row in ("painted", "ceiling", "floor") if "clip" in pictures else ():
        found = pictures["clip"][row]
        firsts = f"own caption first {found['first']:.0%}, among five {found['first_few']:.0%}"
        ranks = f"{firsts}, median rank {found['median_rank']:g}"
        of = {"painted": "", "ceiling": ", real pictures", "floor": ", captions shuffled"}[row]
        yield (
            f"CLIP score{of}",
            f"{found['score']['value']:.2f}",
            interval(found["score"]),
            f"{ranks} of {pictures['clip']['captions']}",
        )
    whole = pictures.get("memorisation", {})
    for row, name in (("painted", "memorised"), ("validation", "memorised, real validation")):
        if found := whole.get(row):
            near = f"nearer than {whole['threshold']} to one of {whole['searched']} training latents"
            yield name, f"{found['share']:.1%}", "", f"{found['flagged']} of {found['pictures']} {near}"


def interval(found: Mapping[str, Any]) -> str:
    """Return the interval of an estimate, "none" where the sample is too small for one."""
    if found["low"] is None:
        return "none"
    return f"{found['low']:.4g} to {found['high']:.4g}"


def _foot(pictures: Mapping[str, Any] | None) -> Iterator[str]:
    if pictures is None:
        return
    sample = pictures["sample"]
    yield (
        f"painted: {pictures['painted']} pictures of {pictures['captions']} validation captions, {pictures['weights']} weights, "
        f"seed {sample['seed']}, {sample['sampler']}, {sample['steps']} steps, guidance {sample['guidance_scale']:g}"
    )
    if "reference" in pictures:
        reference = pictures["reference"]
        folder = f" ({reference['folder']})" if reference["folder"] else ""
        yield f"compared with: {reference['pictures']} {reference['kind']}{folder}"
        yield f"features: {pictures['features']['name']}, {pictures['features']['width']} wide"
    if "clip" in pictures:
        yield f"captions judged by: {pictures['clip']['name']}"
    if "frechet" in pictures and pictures["frechet"]["name"] != "FID":
        yield "the Frechet distance is not FID: that is Inception-v3 with the published weights alone"
