"""One thread a process and a process a core; a cache of the tests' own; peace with SpeechBrain.

Hypothesis reads the __file__ of every imported module, and SpeechBrain leaves lazy redirects for
old module names in sys.modules, which raise ImportError when an attribute is read. Nothing here
uses them.
"""

import gc
import importlib.util
import inspect
import logging
import multiprocessing
import os
import sys

# Tensors are small here: a second thread takes more time than it saves, in subprocesses too, and
# the other cores have tests of their own. Before torch is imported, which reads it
os.environ["OMP_NUM_THREADS"] = "1"

import examples
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import speechbrain  # noqa: F401

from speechbrain_qmargin.files import CACHE_VARIABLE
from speechbrain_qmargin.scoring import plots

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_loops(tensor, *scope):
        patch_tensor(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    # Older ones, as 3.6, count loops by int() of an array [1], which numpy refuses since 2.4
    if "squeeze" not in inspect.getsource(patch_tensor):
        interpreter._patch_lang_tensor = patch_tensor_and_loops

collect_ignore = ["compiled_kernels.py"]  # a script, which runs without the interpreter

# What the server of processes.py has imported already
multiprocessing.set_forkserver_preload(
    ["torch", "speechbrain", "speechbrain_qmargin.training.run", "speechbrain_qmargin.data.speech"]
)

torch.set_num_threads(1)
for name, module in list(sys.modules.items()):
    if type(module).__name__ in ("LazyModule", "DeprecatedModuleRedirect"):
        del sys.modules[name]


def pytest_configure(config):
    """While working (`-m "not slow"`) Hypothesis draws a fifth of its examples."""
    if config.option.markexpr == "not slow":
        examples.share = 0.2
        settings.register_profile("working", max_examples=examples.some(100))
        settings.load_profile("working")


def pytest_collection_finish():
    """What is imported stays: the collector need not look through it again and again."""
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where the tests that take `device` run: cpu or cuda"
    )


@pytest.fixture
def device(request):
    """Of the tests that say the same of a GPU; on a CPU Triton's kernels are interpreted."""
    return torch.device(request.config.getoption("--device"))


def pytest_xdist_auto_num_workers(config):
    """``pytest`` shares its tests out, a process a core; tests that are named run in its own."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    allowed = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    return min(len(allowed(0)) if allowed else os.cpu_count() or 1, 8)  # a process takes about 1 GB


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where runs share durations; nothing of a test is left in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def small_pictures(request, monkeypatch):
    """Pictures are written in few pixels, and not laid out, but where they are looked at."""
    if request.path.name == "test_plots.py":
        return

    def canvas(width, height):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height))
        write = figure.savefig
        figure.savefig = lambda path, dpi: write(path, dpi=dpi / 3)
        return figure, figure.subplots()

    monkeypatch.setattr(plots, "canvas", canvas)


@pytest.fixture(autouse=True)
def log_of_its_own():
    """A run sets up the log of its process: the next test's messages are not to go there."""
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [one for one in root.handlers if one not in before]:
        if not type(handler).__module__.startswith("_pytest"):  # pytest's are its own matter
            root.removeHandler(handler)
