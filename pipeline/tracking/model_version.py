"""The exported pipeline as a version of a registered MLflow model."""

import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pipeline.config import SampleConfig
from pipeline.publish import folder_digest

MODEL_CODE = Path(__file__).with_name("pipeline_model.py")
REQUIRED = ("mlflow", "torch", "diffusers", "transformers", "safetensors", "pillow", "pandas")
DIGEST = "pipeline_digest"


def register_pipeline(
    client: MlflowClient, run_id: str, pipeline: Path, name: str, sample: SampleConfig, step: int
) -> None:
    """Register the diffusers folder `pipeline` as a new version of model `name`, unless those very files are one."""
    digest = folder_digest(pipeline)
    versions = client.search_model_versions(f"name = '{name}'")
    if any(version.tags.get(DIGEST) == digest for version in versions):
        return
    place = f"models/step-{step:08d}-{digest[:12]}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(pipeline, folder, sample)
        client.log_artifacts(run_id, str(folder), place)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    client.create_model_version(name, source, run_id=run_id, tags={DIGEST: digest, "step": str(step)})


def save_model(pipeline: Path, folder: Path, sample: SampleConfig) -> None:
    """Write an MLflow model folder: the code that paints, the pipeline as it is, requirements with versions."""
    defaults = [
        ParamSpec("seed", DataType.long, sample.seed),
        ParamSpec("steps", DataType.long, sample.steps),
        ParamSpec("guidance_scale", DataType.double, sample.guidance_scale),
        ParamSpec("height", DataType.long, 0),
        ParamSpec("width", DataType.long, 0),
    ]
    signature = ModelSignature(
        Schema([ColSpec(DataType.string, "prompt")]),
        Schema([ColSpec(DataType.binary)]),
        ParamSchema(defaults),
    )
    with warnings.catch_warnings():
        # MLflow would rather guess the signature from type hints and an example than be told it.
        warnings.simplefilter("ignore", UserWarning)
        pyfunc.save_model(
            path=str(folder),
            python_model=str(MODEL_CODE),
            artifacts={"pipeline": str(pipeline)},
            pip_requirements=requirements(),
            signature=signature,
        )


def requirements() -> list[str]:
    """Return what a machine needs to load the model, at the versions that are installed here."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED]
