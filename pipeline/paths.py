"""Where each thing lies in a run folder."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig


@dataclass(frozen=True)
class RunPaths:
    """The names inside one run folder `root` (RUNS/NAME)."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config this run was started with."""
        return self.root / "config.yaml"

    @property
    def versions(self) -> Path:
        """Versions of Python, the libraries and the code."""
        return self.root / "versions.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line: the truth that every tracker is fed from."""
        return self.root / "metrics.jsonl"

    @property
    def mlflow_run(self) -> Path:
        """The tracker's run id, so that a resumed run continues the same MLflow run."""
        return self.root / "mlflow_run.json"

    @property
    def starts(self) -> Path:
        """One JSON line for each start: its code, machine, and the checkpoint it went on from."""
        return self.root / "starts.jsonl"

    @property
    def system(self) -> Path:
        """One JSON record every ten seconds of what the machine of rank 0 and the tracker itself did."""
        return self.root / "system.jsonl"

    @property
    def artifacts(self) -> Path:
        """One JSON line for each picture, file and model that a tracker keeps too."""
        return self.root / "artifacts.jsonl"

    @property
    def log(self) -> Path:
        """Folder of the log files, one a node."""
        return self.root / "log"

    @property
    def heartbeats(self) -> Path:
        """Folder of the ranks' signs of life."""
        return self.root / "heartbeat"

    def heartbeat(self, rank: int) -> Path:
        """The last sign of life of one rank."""
        return self.heartbeats / f"rank-{rank:05d}.json"

    def stacks(self, rank: int) -> Path:
        """Where one rank writes the stacks of its threads, when asked (USR1) or when a step lasts too long."""
        return self.log / f"stacks-rank-{rank:05d}.txt"

    @property
    def supervisor(self) -> Path:
        """Folder of the supervisor: its attempts, bad nodes, the exit record of each rank."""
        return self.root / "supervisor"

    @property
    def attempts(self) -> Path:
        """One JSON line for each start of all ranks: where it began, how and why it ended."""
        return self.supervisor / "attempts.jsonl"

    @property
    def bad_nodes(self) -> Path:
        """Nodes that were lost, failed the preflight or hung, and when."""
        return self.supervisor / "bad_nodes.json"

    @property
    def health(self) -> Path:
        """One JSON line for each skipped step, spike and way back, with the keys of all its samples."""
        return self.root / "health.jsonl"

    @property
    def diagnosis(self) -> Path:
        """Folder of what a run that diverged leaves behind, `step-XXXXXXXX/`."""
        return self.root / "diagnosis"

    @property
    def checkpoints(self) -> Path:
        """Folder of the training checkpoints `step-XXXXXXXX/`."""
        return self.root / "checkpoints"

    @property
    def frozen(self) -> Path:
        """The weights that `train.freeze` keeps from changing, written once: checkpoints hold the others."""
        return self.root / "frozen.safetensors"

    @property
    def samples(self) -> Path:
        """Folder of the painted grids."""
        return self.root / "samples"

    @property
    def gallery(self) -> Path:
        """Folder of the galleries `step-XXXXXXXX/`."""
        return self.root / "gallery"

    @property
    def averages(self) -> Path:
        """Folder of the snapshots `step-XXXXXXXX/` that `ldm ema` makes averages of; never thinned out."""
        return self.root / "averages"

    @property
    def weights(self) -> Path:
        """Folder of the averages that `ldm ema` has made; the name of each is a choice for `--weights`."""
        return self.root / "weights"

    @property
    def evaluation(self) -> Path:
        """The last evaluation: validation loss by timestep, raw and EMA."""
        return self.root / "evaluation.json"

    @property
    def latents(self) -> Path:
        """The latent data set when the config names none."""
        return self.root / "latents"

    @property
    def autoencoder(self) -> Path:
        """The diffusers folder of the first stage trained in this run."""
        return self.root / "autoencoder"

    @property
    def clip(self) -> Path:
        """The transformers folder of the whole CLIP trained in this run."""
        return self.root / "clip"

    @property
    def text_encoder(self) -> Path:
        """The transformers folder of CLIP's text tower and tokenizer trained in this run."""
        return self.root / "text_encoder"

    @property
    def export(self) -> Path:
        """The diffusers pipeline made by `ldm export`."""
        return self.root / "pipeline"

    @property
    def deepspeed(self) -> Path:
        """The checkpoint in DeepSpeed's own format made by `ldm export --deepspeed`."""
        return self.root / "deepspeed"

    @property
    def jobs(self) -> Path:
        """Slurm job ids of this run."""
        return self.root / "jobs.json"

    @property
    def sbatch(self) -> Path:
        """The batch script as submitted."""
        return self.root / "submit.sbatch"

    @property
    def stop_file(self) -> Path:
        """A file whose presence asks the training to save and stop."""
        return self.root / "stop"

    @property
    def cancelled(self) -> Path:
        """A file whose presence keeps a job that has stopped from going on: neither requeue nor a new job."""
        return self.root / "cancelled"


def dataset_places(config: RunConfig, paths: RunPaths) -> list[str]:
    """Return folders and URLs of the latent data sets that the run trains on: those named, or its own."""
    return [entry.dataset for entry in config.data.mix] or [config.data.dataset or str(paths.latents)]


def dataset_folder(config: RunConfig, paths: RunPaths) -> Path:
    """Return the latent data set that the run makes and is measured with: the one named, or its own."""
    return Path(config.data.dataset) if config.data.dataset else paths.latents


def autoencoder_folder(config: RunConfig, paths: RunPaths) -> Path:
    """Return the diffusers folder of the frozen autoencoder: the one named, or the run's own."""
    return Path(config.encode.autoencoder) if config.encode.autoencoder else paths.autoencoder


def text_encoder_folder(config: RunConfig, paths: RunPaths) -> Path:
    """Return the transformers folder of the frozen text encoder: the one named, or the run's own."""
    return Path(config.encode.text_encoder) if config.encode.text_encoder else paths.text_encoder
