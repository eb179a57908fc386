"""What a run paints, judged: is the picture of each caption taken for its own among the others?

    python -m benchmarks.picture runs/demo                          # 64 concepts that it was trained on
    python -m benchmarks.picture runs/demo --held-out part=held_out # and captions that its filters kept away

Two judges. `network`: the nearest real picture in a feature space that took no part in training (judge/features.py).
`clip`: the best caption by the run's own CLIP, which is the judge of its own text states and a lenient one.
Ceiling: the real pictures themselves; `decoded`: real pictures through the autoencoder; floor: captions shuffled.
`among decoded`: the nearest real picture after the autoencoder, whose blur both sides then share: what the U-Net has learnt.
Writes RUN/picture.json and RUN/picture.png (each caption's real picture beside the painted one).
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from benchmarks.judge.features import NAME, EfficientNetLite0
from benchmarks.judge.scores import Score, floor_score, kind_score, rank_score, score_within_kind
from pipeline.config import RunConfig, SampleConfig
from pipeline.config.encode import FilterRule
from pipeline.generate import Generator
from pipeline.models.pixels import images_from_pixels, pixels_from_images
from pipeline.paths import RunPaths
from pipeline.publish import whole_file, write_json
from pipeline.sample import draw_grid
from preprocessing.pairs import prepared_pairs

CONCEPTS = 64


@dataclass(frozen=True)
class Pairs:
    """Real pictures, uint8 [N, H, W, 3], and their captions."""

    pictures_NHWC: np.ndarray
    captions: list[str]


def trained_pairs(config: RunConfig) -> Pairs:
    """Return the pairs that the run was trained on, in input order."""
    pairs = [pair for pair in prepared_pairs(config.encode) if pair.split == "train"]
    return Pairs(np.stack([pair.image for pair in pairs]), [pair.caption for pair in pairs])


def held_out_pairs(config: RunConfig, column: str, value: str) -> Pairs:
    """Return the pairs that the filter on `column` kept away: those of `value` that pass all other filters."""
    rules = config.encode.filters
    if not any(rule.column == column for rule in rules):
        raise SystemExit(f"encode.filters has none on {column!r}: nothing was held out by it")
    swapped = tuple(
        FilterRule(column=column, reason=rule.reason, equals=value) if rule.column == column else rule
        for rule in rules
    )
    encode = config.encode.model_copy(update={"filters": swapped, "validation_samples": 0})
    pairs = list(prepared_pairs(encode))
    return Pairs(np.stack([pair.image for pair in pairs]), [pair.caption for pair in pairs])


def spread(pairs: Pairs, count: int) -> Tensor:
    """Return `count` places spread evenly over the pairs, int64."""
    count = min(count, len(pairs.captions))
    return torch.tensor([place * len(pairs.captions) // count for place in range(count)])


class OwnClip:
    """The run's CLIP as a judge: unit features of pictures and of captions."""

    def __init__(self, paths: RunPaths, generator: Generator) -> None:
        self._model = CLIPModel.from_pretrained(paths.clip, local_files_only=True).eval()
        self._tokenizer = generator.text_encoder

    @torch.no_grad()
    def pictures(self, pictures_NHWC: np.ndarray) -> Tensor:
        """Return float32 [N, D]."""
        found = self._model.get_image_features(pixel_values=images_from_pixels(pictures_NHWC))
        return functional.normalize(getattr(found, "pooler_output", found), dim=1)

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Return float32 [N, D]."""
        tokens_NL, _ = self._tokenizer.tokenize(captions)
        found = self._model.get_text_features(input_ids=tokens_NL)
        return functional.normalize(getattr(found, "pooler_output", found), dim=1)


def decoded(generator: Generator, pictures_NHWC: np.ndarray) -> np.ndarray:
    """Return the pictures after the frozen autoencoder's encoder (posterior mean) and decoder."""
    encoder = generator.autoencoder
    moments_N2CHW = encoder.encode(images_from_pixels(pictures_NHWC).to(generator.device))
    return pixels_from_images(encoder.decode(moments_N2CHW[:, : moments_N2CHW.shape[1] // 2]))


def kinds(captions: Sequence[str], unlike: str) -> Tensor:
    """Return a number for each caption, int64 [N]; captions that differ only in what the regex matches share theirs."""
    left = [re.sub(unlike, "", caption) for caption in captions]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(left))}
    return torch.tensor([numbers[caption] for caption in left])


def judge(
    run: Path, held_out: str | None, guidance_scale: float | None = None, unlike: str | None = None
) -> dict[str, object]:
    """Paint, score and publish; return the record that is written to picture.json."""
    paths = RunPaths(run)
    generator = Generator.load(paths, "ema")
    config = generator.trained.config
    sample = config.sample
    if guidance_scale is not None:
        sample = SampleConfig.model_validate({**sample.model_dump(), "guidance_scale": guidance_scale})
    real = trained_pairs(config)
    places = spread(real, CONCEPTS)
    shown = Pairs(real.pictures_NHWC[places], [real.captions[place] for place in places])
    own = torch.arange(len(places))
    painted = generator.paint(shown.captions, seed=sample.seed, sample=sample)
    again = decoded(generator, shown.pictures_NHWC)
    network, clip = EfficientNetLite0(), OwnClip(paths, generator)
    answers = network(shown.pictures_NHWC)
    captions = clip.captions(shown.captions)
    scores: dict[str, Score] = {
        "network": rank_score(network(painted), answers, own),
        "network decoded": rank_score(network(again), answers, own),
        "network among decoded": rank_score(network(painted), network(again), own),
        "network ceiling": rank_score(answers, answers, own),
        "network floor": floor_score(network(painted), answers, own),
        "clip": rank_score(clip.pictures(painted), captions, own),
        "clip decoded": rank_score(clip.pictures(again), captions, own),
        "clip ceiling": rank_score(clip.pictures(shown.pictures_NHWC), captions, own),
        "clip floor": floor_score(clip.pictures(painted), captions, own),
    }
    rows = [shown, Pairs(painted, shown.captions)]
    if held_out is not None:
        column, _, value = held_out.partition("=")
        new = held_out_pairs(config, column, value)
        wanted = generator.paint(new.captions, seed=sample.seed + 1, sample=sample)
        every = np.concatenate([new.pictures_NHWC, real.pictures_NHWC])
        answers, blurred = network(every), network(decoded(generator, every))
        own = torch.arange(len(new.captions))
        scores["held out"] = rank_score(network(wanted), answers, own)
        scores["held out decoded"] = rank_score(blurred[own], answers, own)
        features = network(wanted)
        scores["held out among decoded"] = rank_score(features, blurred, own)
        if unlike is not None:
            kinds_M = kinds(new.captions + real.captions, unlike)
            scores["held out: kind"] = kind_score(features, answers, kinds_M[own], kinds_M)
            for name, against in (("real", answers), ("decoded", blurred)):
                within = score_within_kind(features, against, own, kinds_M[own], kinds_M)
                scores[f"held out: within kind, {name}"] = within
        rows = [
            Pairs(np.concatenate([rows[0].pictures_NHWC, new.pictures_NHWC]), shown.captions + new.captions),
            Pairs(np.concatenate([painted, wanted]), shown.captions + new.captions),
        ]
    record = {
        "step": generator.trained.step,
        "samples": generator.trained.samples,
        "concepts": len(real.captions),
        "network": NAME,
        "sample": sample.model_dump(mode="json"),
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    write_json(run / "picture.json", record)
    with whole_file(run / "picture.png") as beside:
        side_by_side = np.concatenate([rows[0].pictures_NHWC, rows[1].pictures_NHWC], axis=2)
        draw_grid(side_by_side, rows[0].captions).save(beside, format="PNG")
    for name, score in scores.items():
        print(f"{name:32} {score}")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--held-out", metavar="COLUMN=VALUE", help="paint also what the filter on COLUMN kept away"
    )
    parser.add_argument(
        "--unlike",
        metavar="REGEX",
        help="captions that differ only in what this matches are of one kind: says how often a held-out picture's kind "
        "is right, and how often it is the right one within its kind",
    )
    parser.add_argument("--guidance", type=float, help="another guidance scale than the run's")
    found = parser.parse_args(arguments)
    judge(found.run, found.held_out, found.guidance, found.unlike)
    return 0


if __name__ == "__main__":
    sys.exit(main())
