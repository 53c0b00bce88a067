"""The package `rlhf_recipes` for a recipe that runs as a script, whose folder, this one, is then first on sys.path."""

import os
import sys
from importlib import import_module

__path__ = [os.path.dirname(os.path.abspath(__file__))]
__spec__.submodule_search_locations = __path__  # what `find_spec` tells of it

# `import stage` in a script beside the recipes is this module too, not a second copy of it.
sys.modules.setdefault("stage", import_module("rlhf_recipes.stage"))
