"""Former names of modules, from before they moved into rooms: `rlhf.rollout` is now `rlhf.ppo.rollout`, and so on.

Kept for code that still imports the former names; this project itself does not use them.
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
    "rlhf.packing": ("rlhf.models.packing",),
    "rlhf.records": ("rlhf.rows.records",),
    "rlhf.shapes": ("rlhf.rows.fields",),
    "rlhf.sources": ("rlhf.rows.sources",),
    "rlhf.checkpoint": ("rlhf.run.checkpoint",),
    "rlhf.stages": ("rlhf.run.stages",),
    "rlhf.report": ("rlhf.run.report",),
    "rlhf.lora": ("rlhf.cpu.lora", "rlhf.models.adapters"),
    "rlhf.actor_critic": ("rlhf.ppo.actor_critic", "rlhf.ppo.build", "rlhf.models.forward"),
    "rlhf.rollout": (
        "rlhf.ppo.rollout",
        "rlhf.ppo.plan",
        "rlhf.sampling.engine",
        "rlhf.sampling.decode",
        "rlhf.padding",
    ),
}
"""Former module -> the modules that hold its contents now."""


def names_in(*modules: str, only: Collection[str] | None = None) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that looks names up in other modules, which it imports at the first use.

    only: the names that it knows; default: all but those that start with two underscores."""

    def look_up(name: str) -> Any:
        known = name in only if only is not None else not name.startswith("__")
        for path in modules if known else ():
            module = importlib.import_module(path)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"no {name!r} here; looked in {', '.join(modules)}")

    return look_up


class Finder(MetaPathFinder, Loader):
    """An import finder for former modules: a renamed one is the new module itself, a divided one looks names up."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in FORMER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        modules = FORMER[spec.name]
        if len(modules) > 1:
            return None
        module = importlib.import_module(modules[0])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        modules = FORMER.get(module.__name__, ())
        if len(modules) > 1:
            module.__getattr__ = names_in(*modules)  # type: ignore[method-assign]
        else:
            module.__spec__ = self.spec  # which the import machinery has overwritten


def install() -> None:
    """Make former modules importable."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
