"""A real training told to a real MLflow server: what is there, what it looks like in a browser, what is not there."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config_file import dump_config
from tests.builders import TinyRun, tiny_run
from tests.services.browser import Page, browser_page
from tests.services.mlflow_server import MlflowServer, mlflow_server

pytestmark = pytest.mark.services
IN_URI, IN_ENVIRONMENT = "c4n4ry-of-the-uri", "c4n4ry-of-the-environment"
STEPS, LOG_EVERY = 20, 2
PROMPTS = ["a red square", "a green disc", "a red cross", "a green cross"]
PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Told:
    """A finished run and the server that was told of it."""

    server: MlflowServer
    tiny: TinyRun
    said: str
    """All that the commands printed."""

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.server.uri)

    @property
    def run(self) -> Run:
        """The one MLflow run of the training."""
        experiment = self.client.get_experiment_by_name("shapes")
        assert experiment is not None
        (run,) = self.client.search_runs([experiment.experiment_id], "tags.kind = 'train'")
        return run


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Train, be stopped, resume, paint and export as a user does; secrets in the URI and the environment."""
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(folder / "server") as server:
        uri = server.uri.replace("http://", f"http://me:{IN_URI}@")
        tiny = tiny_run(
            folder / "runs",
            tracking={"mlflow": uri, "experiment": "shapes"},
            train={"steps": STEPS, "log_every": LOG_EVERY, "checkpoint_every": 6},
            sample={"prompts": PROMPTS, "steps": 2, "every": 10},
            evaluate={"every": 10, "timesteps": 4},
            optimizer={"warmup_steps": 2},
        )
        (folder / "tiny.yaml").write_text(dump_config(tiny.config))
        said = ldm(folder, "train", "tiny.yaml", "train.steps=12")
        said += ldm(folder, "train", "tiny.yaml")
        said += ldm(folder, "evaluate", str(tiny.paths.root), f"tracking.mlflow={uri}")
        said += ldm(folder, "export", str(tiny.paths.root), f"tracking.mlflow={uri}")
        yield Told(server, tiny, said)


def ldm(folder: Path, *words: str) -> str:
    """Run the command as a user does, with a secret in its environment; return all that it printed."""
    hidden = {"HF_TOKEN": IN_ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": IN_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
    } | hidden
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_one_run_says_all_there_is_to_say(told: Told) -> None:
    run, root = told.run, told.tiny.paths.root
    metrics, tags = run.data.metrics, run.data.tags
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    points = told.client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in points] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    wanted = {
        "loss",
        "grad_norm",
        "learning_rate",
        "ema_decay",
        "samples",
        "data_epochs",
        "samples_per_second",
    }
    wanted |= {"data_wait_fraction", "goodput", "tracker/blocked_percent", "val_loss_ema", "val_loss_raw"}
    wanted |= {f"system/{name}" for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes")}
    assert wanted <= metrics.keys() and "mfu" not in metrics, "no peak is known of a CPU"
    assert any(name.startswith("loss_by_timestep/t0") for name in metrics)
    assert any(name.startswith("evaluate/val_loss_ema") for name in metrics), "the verb's own figures"
    assert metrics["samples"] == 4 * STEPS and "evaluate/samples" not in metrics
    assert run.data.params["train.steps"] == "12" and tags["changed.train.steps"] == str(STEPS)
    assert tags["lineage.resumed_from"] == "checkpoints/step-00000012" and tags["starts"] == "2"
    assert (len(tags["code.commit"]) == 40 and int(tags["code.diff_lines"]) >= 0) or tags[
        "code.commit"
    ] == "null"
    assert tags["version.torch"] and tags["host"] and tags["run_folder"] == str(root)
    kept = {entry.path for entry in told.client.list_artifacts(run.info.run_id, "run")}
    assert kept == {"run/config.yaml", "run/starts.jsonl", "run/versions.json"}


def test_its_data_and_encoders_are_inputs_with_their_digests(told: Told) -> None:
    manifest = told.tiny.manifest
    inputs = {
        {tag.key: tag.value for tag in entry.tags}["mlflow.data.context"]: entry
        for entry in told.run.inputs.dataset_inputs
    }
    assert inputs.keys() == {"training", "autoencoder", "text_encoder"}
    assert inputs["training"].dataset.digest == manifest.digest[:36]
    assert {tag.key: tag.value for tag in inputs["training"].tags}["digest"] == manifest.digest
    assert json.loads(inputs["training"].dataset.profile)["counts"]["written"] == manifest.counts.written
    for role in ("autoencoder", "text_encoder"):
        assert {tag.key: tag.value for tag in inputs[role].tags}["digest"] == manifest.encoder[role]


def test_the_exported_pipeline_is_a_version_without_pickle_that_paints_elsewhere(
    told: Told, tmp_path: Path
) -> None:
    (version,) = told.client.search_model_versions("name = 'tiny'")
    assert version.run_id == told.run.info.run_id and version.tags["step"] == str(STEPS)
    code = (
        "import mlflow, sys\n"
        f"folder = mlflow.artifacts.download_artifacts('models:/tiny/{version.version}', dst_path=sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(folder)\n"
        "painted = [model.predict([{'prompt': 'a red square'}], params={'steps': 2, 'seed': seed}) for seed in (0, 0, 1)]\n"
        "for number, (png,) in enumerate(painted):\n"
        "    open(f'{sys.argv[1]}/{number}.png', 'wb').write(png)\n"
        "assert not any(name.split('.')[0] in ('pipeline', 'launch') for name in sys.modules), 'needs ldm'\n"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": told.server.uri, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=environment, check=True, timeout=240
    )
    first, again, other = ((tmp_path / f"{number}.png").read_bytes() for number in range(3))
    assert first == again != other and first.startswith(b"\x89PNG")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    names = {path.name for path in files}
    assert {"MLmodel", "requirements.txt", "pipeline_model.py", "model_index.json"} <= names
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt")]
    assert not [path for path in files if path.read_bytes()[:2] in PICKLED]
    (needed,) = (path.read_text() for path in files if path.name == "requirements.txt")
    assert all(f"{name}==" in needed for name in ("torch", "diffusers", "transformers", "mlflow"))


def test_no_secret_is_in_any_byte(told: Told) -> None:
    """In the run folder, on the server (database, artifacts, log) and in all that was printed."""
    for folder in (told.tiny.paths.root, told.server.folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 10
        for path in files:
            content = path.read_bytes()
            for secret in (IN_URI, IN_ENVIRONMENT):
                assert secret.encode() not in content, f"{secret} in {path}"
    assert IN_URI not in told.said and IN_ENVIRONMENT not in told.said


def test_a_browser_shows_the_run_its_charts_and_its_grids(told: Told, tmp_path: Path) -> None:
    """Set LDM_SCREENSHOTS to a folder to keep what the browser shows."""
    run, kept = told.run, os.environ.get("LDM_SCREENSHOTS")
    runs = f"{told.server.uri}/#/experiments/{run.info.experiment_id}/runs"
    with browser_page(tmp_path / "profile") as page:
        page.size(*WINDOW)
        page.open(runs)
        shown(page, "tiny", "tiny/latents")
        close_assistant(page)
        page.open(f"{runs}/{run.info.run_id}")
        shown(page, "Finished", "tiny/latents", "lineage.resumed", "Registered models", "v1", "grad_norm")
        hide(page, run.data.tags["host"], run.data.tags["run_folder"])
        if kept:
            keep_small(page.picture(*WINDOW), Path(kept) / "mlflow-run.png")
        page.open(f"{runs}/{run.info.run_id}/model-metrics")
        shown(page, "loss_by_timestep")
        page.evaluate(SEARCH.replace("WORDS", "^(loss|grad_norm|learning_rate|samples|grid)$"))
        shown(page, "loss", "grad_norm", "learning_rate", "samples", "grid")
        until(page, f"{CHARTS}.length >= 4 && {CHARTS}.every(c => c.querySelectorAll('.point').length >= 5)")
        hide(page, str(told.tiny.paths.root.parent))
        if kept:
            keep_small(page.picture(*WINDOW), Path(kept) / "mlflow-charts.png")
        # The chart of pictures begins at step 0, where there is none; its slider takes one picture a press.
        page.evaluate("document.querySelector('[role=slider]').focus()")
        for step in range(10, STEPS + 1, 10):
            page.press("ArrowRight", 39)
            until(page, GRID.replace("STEP", str(step)))


WINDOW = (1280, 1000)
CHARTS = "[...document.querySelectorAll('.js-plotly-plot')]"
GRID = (
    "[...document.images].some(i => decodeURIComponent(i.src).includes('images/grid+step+STEP+')"
    " && i.complete && i.naturalWidth > 100)"
)
STATE = "document.body.innerText.slice(0, 3000)"
SEARCH = (
    "(() => { const box = document.querySelector('input[placeholder=\"Search metric charts\"]');"
    " Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, 'WORDS');"
    " box.dispatchEvent(new Event('input', {bubbles: true})); })()"
)


def hide(page: Page, *texts: str) -> None:
    """Replace what belongs to this machine in what the page shows, for a picture that is kept."""
    page.evaluate(
        "(() => { const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);"
        f" for (let node; node = walk.nextNode();) for (const text of {json.dumps(texts)})"
        " node.data = node.data.replaceAll(text, '...'); })()"
    )


def keep_small(png: bytes, path: Path) -> None:
    """Write the picture with 64 colours, which is enough for a page."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def close_assistant(page: Page) -> None:
    """Close what MLflow opens beside a page on a first visit, if it does."""
    page.evaluate("document.querySelectorAll('button[aria-label=Close]').forEach(b => b.click())")


def until(page: Page, expression: str) -> None:
    """Wait until the expression is true in the page."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} is not so: {page.evaluate(STATE)}"
        time.sleep(0.2)


def shown(page: Page, *words: str) -> None:
    """Wait until the page shows all the words."""
    deadline = time.monotonic() + 60
    while missing := [word for word in words if word not in page.evaluate("document.body.innerText")]:
        assert time.monotonic() < deadline, f"{missing} not on: {page.evaluate('document.body.innerText')}"
        time.sleep(0.2)
