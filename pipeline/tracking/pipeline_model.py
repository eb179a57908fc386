"""An exported diffusers pipeline as an MLflow model, by its code: this file is copied into the artifact as it is.

Nothing in it is pickled: MLflow runs this file, which loads the safetensors that lie beside it. It stands alone, for
where a model is served there is no `ldm`.
"""

import io
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


class PaintingModel(PythonModel):
    """Prompts in, PNG files out."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline from the artifact, onto a GPU if there is one."""
        folder = Path(context.artifacts["pipeline"])
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in CLASSES:
            raise ValueError(f"{folder}: holds a {name}; expected one of {', '.join(CLASSES)}")
        pipeline = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[bytes]:
        """Return a PNG for each row of the column `prompt`; `params` are seed, steps, guidance_scale, height, width.

        A height or width of 0 is the size that the network was trained for.
        """
        chosen = params or {}
        unet, factor = self._pipeline.unet, self._pipeline.vae_scale_factor
        side = unet.config.sample_size * factor
        painted = []
        for number, prompt in enumerate(model_input["prompt"]):
            generator = torch.Generator().manual_seed(int(chosen.get("seed", 0)) + number)
            picture = self._pipeline(
                str(prompt),
                height=int(chosen.get("height", 0)) or side,
                width=int(chosen.get("width", 0)) or side,
                num_inference_steps=int(chosen.get("steps", 25)),
                guidance_scale=float(chosen.get("guidance_scale", 5.0)),
                generator=generator,
            ).images[0]
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            painted.append(stream.getvalue())
        return painted


set_model(PaintingModel())
