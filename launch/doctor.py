"""`ldm doctor`: what is installed, what is missing for what, and what will be used."""

import importlib.metadata
import os
import platform
import shutil
import sys

PACKAGES = {
    "torch": "everything that computes",
    "deepspeed": "ldm train",
    "accelerate": "ldm train-autoencoder, train-clip",
    "diffusers": "autoencoders, samplers, ldm export",
    "transformers": "text encoders",
    "tokenizers": "ldm train-clip",
    "webdataset": "writing latent data sets",
    "pyarrow": "tables of data sets",
    "mlflow": "tracking beyond metrics.jsonl",
    "safetensors": "weights and checkpoints",
    "pydantic": "configs",
    "ruamel.yaml": "configs",
    "pillow": "images",
}
TOOLS = {"sbatch": "ldm submit", "srun": "ldm submit", "strace": "fault tests", "slurmctld": "cluster tests"}


def examine() -> tuple[str, bool]:
    """Return (a page of text, whether everything that every verb needs is there)."""
    lines = [f"python       {platform.python_version()} at {sys.prefix}"]
    healthy = True
    for package, purpose in PACKAGES.items():
        try:
            lines.append(f"{package:<12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            healthy = False
            lines.append(f"{package:<12} MISSING, needed for {purpose}: pip install -c constraints.txt -e .")
    lines += [_tool_line(tool, purpose) for tool, purpose in TOOLS.items()]
    lines += _devices()
    lines += _caches()
    return "\n".join(lines), healthy


def _tool_line(tool: str, purpose: str) -> str:
    found = shutil.which(tool)
    return f"{tool:<12} {found}" if found else f"{tool:<12} not found: only {purpose} would use it"


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["device       unknown without torch"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return [f"device       {len(names)} GPU: {', '.join(names)}; collectives by nccl"]
    cores = len(os.sched_getaffinity(0))
    return [f"device       CPU, {cores} cores, {torch.get_num_threads()} threads; collectives by gloo"]


def _caches() -> list[str]:
    """Return lines about what a killed process may have left behind that would make a later one wait."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [os.path.join(place, "lock") for place, _, files in os.walk(folder) if "lock" in files]
    said = (
        f"stale build locks: {', '.join(locks)} (ldm uses a private folder and ignores them)"
        if locks
        else "no locks"
    )
    return [f"extensions   {folder}: {said}"]
