"""The house rule: a room imports only from rooms above it, and each heavy library has one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "preprocessing", "launch")

# Floor of each room of `pipeline`; a folder's entry holds for the modules in it unless they have their own.
PIPELINE_FLOORS = {
    "pipeline": 0,
    "pipeline.errors": 0,
    "pipeline.publish": 0,
    "pipeline.page": 0,
    "pipeline.config": 1,
    "pipeline.config_file": 1,
    "pipeline.paths": 1,
    "pipeline.storage": 1,
    "pipeline.latents": 2,
    "pipeline.tracking": 2,
    "pipeline.progress": 2,
    "pipeline.data": 3,
    "pipeline.data.order": 3,
    "pipeline.data.shares": 3,
    "pipeline.diffusion": 4,
    "pipeline.models": 4,
    "pipeline.data.conditions": 5,
    "pipeline.data.substitutes": 5,
    "pipeline.data.loader": 5,
    "pipeline.data.iterable": 5,
    "pipeline.training.world": 5,
    "pipeline.training.deepspeed_config": 5,
    "pipeline.training.learning_rate": 5,
    "pipeline.plan": 6,
    "pipeline.training.engine": 6,
    "pipeline.training.fragments": 6,
    "pipeline.training.averages.ema": 6,
    "pipeline.training.stop": 6,
    "pipeline.training.health.judge": 6,
    "pipeline.training.health.heartbeat": 2,
    "pipeline.training.health.replicas": 7,
    "pipeline.training.health.diagnosis": 7,
    "pipeline.training.health.rollback": 7,
    "pipeline.training.health.care": 8,
    "pipeline.training.text": 6,
    "pipeline.training.step": 7,
    "pipeline.training.facts": 7,
    "pipeline.training": 7,
    "pipeline.training.averages.posthoc": 5,
    "pipeline.training.averages.turns": 2,
    "pipeline.training.midway": 9,
    "pipeline.average": 7,
    "pipeline.trained_network": 7,
    "pipeline.generate": 7,
    "pipeline.evaluation": 8,
    "pipeline.sample": 8,
    "pipeline.export": 8,
    "pipeline.import_pipeline": 8,
    "pipeline.first_stage": 8,
    "pipeline.training.train": 9,
    "pipeline.gallery": 9,
}
PREPROCESSING_SEES_UP_TO = 4
PREPROCESSING_FLOOR = 10
LAUNCH_FLOOR = 11

HOMES = {
    "pynvml": {"pipeline.tracking.graphics"},
    "deepspeed": {"pipeline.training.engine", "pipeline.training.fragments"},
    "torch.distributed": {"pipeline.training.world"},
    "mlflow": {
        "pipeline.tracking.mlflow_door",
        "pipeline.tracking.model_version",
        "pipeline.tracking.pipeline_model",
    },
    "transformers": {
        "pipeline.models.text_encoder",
        "pipeline.models.text_models",
        "pipeline.evaluation.clip",
    },
    "tokenizers": {"pipeline.models.text_encoder"},
    "diffusers": {
        "pipeline.models.autoencoder",
        "pipeline.diffusion.samplers",
        "pipeline.export",
        "pipeline.tracking.pipeline_model",
    },
    "webdataset": {"pipeline.data.foreign"},
    "fsspec": {"pipeline.storage"},
    "pyarrow": {
        "pipeline.latents.rows",
        "preprocessing.tables",
        "preprocessing.report",
        "launch.init.parquet_rows",
    },
    "accelerate": {
        "pipeline.first_stage.contrastive",
        "pipeline.first_stage.stage",
    },
}
STATE_DICT_READERS = {"pipeline.evaluation.inception"}
"""FID's weights are published as a state dict alone: read with weights_only, which makes tensors and runs no code."""
WITHOUT_TORCH = (
    "pipeline.config",
    "pipeline.config_file",
    "pipeline.latents.manifest",
    "pipeline.latents.reader",
    "pipeline.tracking",
    "pipeline.progress",
    "pipeline.data.order",
    "pipeline.training.deepspeed_config",
    "pipeline.plan.report",
    "pipeline.training.saving.commit",
    "pipeline.training.health.heartbeat",
    "launch.cli",
    "launch.check",
    "launch.init.folder",
    "launch.nodes",
    "launch.plan",
    "launch.local",
    "launch.slurm",
    "launch.submit.run",
    "launch.follow.cancel",
    "launch.follow.logs",
    "launch.status",
    "launch.supervisor.supervise",
    "preprocessing.sources",
    "preprocessing.filters",
    "preprocessing.images",
)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found[dotted.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Return (dotted module, line, at module level) of every import in the file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [(name, node.lineno, id(node) in top) for name in joined]
    return names


def floor(module: str) -> int:
    if module.startswith("launch"):
        return LAUNCH_FLOOR
    if module.startswith("preprocessing"):
        return PREPROCESSING_FLOOR
    while module not in PIPELINE_FLOORS:
        module = module.rpartition(".")[0]
    return PIPELINE_FLOORS[module]


def owner(name: str, known: dict[str, Path]) -> str | None:
    """Return the module of ours that an imported name lives in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def test_imports_go_down_the_floors_only() -> None:
    known, wrong = modules(), []
    for module, path in known.items():
        for name, line, _ in imports(path):
            target = owner(name, known)
            if target is None or target == module:
                continue
            where = f"{path.relative_to(ROOT)}:{line}: {module} imports {target}"
            if floor(target) > floor(module):
                wrong.append(f"{where}, which is on a higher floor")
            if module.startswith("preprocessing") and target.startswith("pipeline"):
                if floor(target) > PREPROCESSING_SEES_UP_TO:
                    wrong.append(
                        f"{where}: preprocessing sees pipeline floors 0-{PREPROCESSING_SEES_UP_TO} only"
                    )
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    known = modules()
    edges = {
        module: {
            target
            for name, _, top in imports(path)
            if top and (target := owner(name, known)) and target != module
        }
        for module, path in known.items()
    }
    state: dict[str, int] = {}

    def visit(module: str, trail: list[str]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, " -> ".join([*trail, module])
        state[module] = 1
        for target in sorted(edges[module]):
            visit(target, [*trail, module])
        state[module] = 2

    for module in edges:
        visit(module, [])


def test_imports_are_absolute_and_at_module_level() -> None:
    """Only a verb imports what it runs inside its function; optional or late-reached libraries are named here."""
    allowed = {
        "launch.verbs": PACKAGES,
        "launch.doctor": ("torch",),
        "pipeline.tracking.delivery": ("pipeline.tracking.mlflow_sender",),
        "pipeline.tracking.mlflow_door": ("pipeline.tracking.model_version",),
        "pipeline.progress": ("rich",),
        "pipeline.training.engine": ("deepspeed",),
        "pipeline.training.text": ("pipeline.models.text_pair",),
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for module, path in modules().items()
        for name, line, top in imports(path)
        if not top and not name.startswith(tuple(allowed.get(module) or allowed.get(room_of(module)) or "\0"))
    ]
    assert not wrong, "imports inside functions:\n" + "\n".join(wrong)


def test_every_heavy_library_has_one_home() -> None:
    wrong = []
    for module, path in modules().items():
        for name, line, _ in imports(path):
            for library, homes in HOMES.items():
                if (name == library or name.startswith(f"{library}.")) and module not in homes:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {library} belongs to {sorted(homes)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_free_rooms_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_dangerous_is_called() -> None:
    """No pickle, no eval, no shell, no weights loaded with code in them."""
    wrong = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {called}"
            if called in {
                "eval",
                "exec",
                "os.system",
                "pickle.load",
                "pickle.loads",
                "yaml.load",
            }:
                wrong.append(where)
            if called == "torch.load" and (
                given.get("weights_only") != "True" or module not in STATE_DICT_READERS
            ):
                wrong.append(where)
            if given.get("shell") == "True" or given.get("trust_remote_code") == "True":
                wrong.append(where)
            if given.get("allow_pickle", "False") != "False":
                wrong.append(where)
            if called.endswith(".from_pretrained") and given.get("local_files_only") != "True":
                wrong.append(f"{where} without local_files_only=True")
    assert not wrong, "\n".join(wrong)
