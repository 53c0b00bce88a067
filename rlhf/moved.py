"""Modules and names where they were before the library had rooms: `rlhf.rollout` is `rlhf.ppo.rollout`, and so on.

For code written against those names; nothing in this project uses them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FORMER = {
    "rlhf.ppo_config": ("rlhf.ppo.config",),
    "rlhf.ppo_math": ("rlhf.ppo.math",),
    "rlhf.sft_config": ("rlhf.sft.config",),
    "rlhf.checkpoint": ("rlhf.run.checkpoint",),
    "rlhf.stages": ("rlhf.run.stages",),
    "rlhf.report": ("rlhf.run.report",),
    "rlhf.lora": ("rlhf.cpu.lora", "rlhf.models.adapters"),
    "rlhf.actor_critic": ("rlhf.ppo.actor_critic", "rlhf.ppo.build", "rlhf.models.logprobs"),
    "rlhf.rollout": (
        "rlhf.ppo.rollout",
        "rlhf.ppo.plan",
        "rlhf.sampling.engine",
        "rlhf.sampling.decode",
        "rlhf.padding",
    ),
}
"""Former module -> the modules that hold its contents now."""


def names_in(*places: str, only: Collection[str] | None = None) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks a name (one of `only`) up in other modules, imported when first asked."""

    def look_up(name: str) -> Any:
        known = name in only if only is not None else not name.startswith("__")
        for place in places if known else ():
            module = importlib.import_module(place)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"no {name!r} here; looked in {', '.join(places)}")

    return look_up


class Finder(MetaPathFinder, Loader):
    """Finds former modules: one that was renamed is the same module, one that was divided looks names up."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in FORMER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        places = FORMER[spec.name]
        if len(places) > 1:
            return None
        module = importlib.import_module(places[0])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        places = FORMER.get(module.__name__, ())
        if len(places) > 1:
            module.__getattr__ = names_in(*places)  # type: ignore[method-assign]
        else:
            module.__spec__ = self.spec  # the import machinery has put its own there


def install() -> None:
    """Let former modules be imported."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
