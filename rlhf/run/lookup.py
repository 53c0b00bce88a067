"""Where a config, or a file of functions that a config names, is found: the working directory first, then the recipes.

`toy.yaml`, `recipes/configs/toy.yaml` and `data/toy/toy_world.py` mean the same in a clone and where the wheel is
installed.
"""

from __future__ import annotations

import difflib
import importlib.util
from functools import cache
from pathlib import Path

from rlhf.errors import InputError


@cache
def recipes() -> Path:
    """Return the folder of the recipes: the package `rlhf_recipes`, or `recipes/` of a clone that is not installed."""
    found = importlib.util.find_spec("rlhf_recipes")
    folders = list(found.submodule_search_locations or ()) if found else []
    return Path(folders[0]) if folders else Path(__file__).resolve().parents[2] / "recipes"


def look_up(name: str | Path, missing: str, *folders: str) -> Path:
    """Return the file `name`: of the working directory, or else of the recipes, there or in one of their `folders`.

    Raises InputError where neither has it: the line `missing`, where was looked, and the file that was probably meant.
    """
    given = Path(name)
    if given.exists():
        return given
    if given.is_absolute():
        raise InputError(f"{missing}; check the path")
    inner = given.relative_to("recipes") if given.parts[0] == "recipes" else given
    roots = (
        [recipes(), recipes().parent] if recipes().name == "recipes" else [recipes()]
    )  # a clone's data/ is beside it
    within = [root / folder for root in roots for folder in ("", *folders)]
    for folder in within:
        if (folder / inner).is_file():
            return folder / inner
    there = {file.name for folder in (Path.cwd(), *within) for file in (folder / inner.parent).glob(f"*{inner.suffix}")}
    near = difflib.get_close_matches(inner.name, sorted(there), n=1)
    advice = f"did you mean {near[0]}?" if near else "`rlhf list` names what the recipes bring along"
    raise InputError(f"{missing} in {Path.cwd()} nor in {recipes()}; {advice}")
