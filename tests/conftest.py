"""Peace between hypothesis, which reads the __file__ of every imported module, and SpeechBrain.

SpeechBrain leaves lazy redirects for old module names in sys.modules, and these raise ImportError
when an attribute is read. Nothing here uses them.
"""

import sys

import speechbrain  # noqa: F401

for name, module in list(sys.modules.items()):
    if type(module).__name__ in ("LazyModule", "DeprecatedModuleRedirect"):
        del sys.modules[name]
