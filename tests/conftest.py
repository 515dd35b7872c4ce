"""A cache of the tests' own; peace between hypothesis and SpeechBrain.

Hypothesis reads the __file__ of every imported module, and SpeechBrain leaves lazy redirects for
old module names in sys.modules, which raise ImportError when an attribute is read. Nothing here
uses them.
"""

import sys

import pytest
import speechbrain  # noqa: F401

from speechbrain_qmargin.files import CACHE_VARIABLE

for name, module in list(sys.modules.items()):
    if type(module).__name__ in ("LazyModule", "DeprecatedModuleRedirect"):
        del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where runs share durations; nothing of a test is left in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield
