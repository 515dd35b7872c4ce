"""The recipes' scripts as modules, for the tests beside this file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from speechbrain_qmargin.export.inference import export_run

ROOT = Path(__file__).parents[1]


def load(path: str) -> ModuleType:
    """A file of the repository as a module of its own, made anew at each call."""
    file = ROOT / path
    name = f"script_{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(recipe: str, yaml: str, *options, export=False, module=None) -> None:
    """``python recipes/<recipe>/train.py hparams/<yaml> [options]``, exported only if asked for."""
    module = module or load(f"recipes/{recipe}/train.py")
    brain = {"voxceleb": "SpeakerBrain", "face": "FaceBrain"}[recipe]
    argv = [str(ROOT / "hparams" / yaml), "--noprogressbar", "--device=cpu", *map(str, options)]
    module.train_verifier(
        argv, getattr(module, brain), module.prepare, export_run if export else None
    )


def loaded_by(method: str) -> list[str]:
    """Options with which data are loaded by a process that is started in a way."""
    loading = f"{{multiprocessing_context: {method}}}"
    return ["--num_workers=1", *(f"--{kind}_dataloader={loading}" for kind in ("train", "test"))]
