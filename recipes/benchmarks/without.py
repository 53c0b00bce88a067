"""Switch off our tricks for CPUs one at a time, so that the benchmark can tell what each is worth (--ablate).

Plain torch, transformers and peft do its work then. A worker switches one off before it builds a trainer: the library
has no settings for this.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced(module: str, name: str, new: Any) -> Iterator[None]:
    """Replace `module`'s `name` by `new` inside the block, also for our modules that have imported it from there.

    `name` may be a class's attribute: `Class.attribute`.
    """
    *path, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    old = getattr(owner, last)
    places = [(owner, last)]
    if callable(old) and not path:
        ours = [m for key, m in list(sys.modules.items()) if key.split(".")[0] in ("rlhf", "reward_models")]
        places += [(m, key) for m in ours for key, value in vars(m).items() if value is old]
    for place, key in places:
        setattr(place, key, new)
    try:
        yield
    finally:
        for place, key in places:
            setattr(place, key, old)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _plain_draw(probabilities: Any, numbers: Any) -> Any:
    import torch

    ends = probabilities.double().cumsum(-1)
    return torch.searchsorted(ends, numbers[:, None] * ends[:, -1:], right=True).squeeze(-1)


def _as_peft(layer: Any, x: Any, *args: Any, gated: Any = None, **kwargs: Any) -> Any:
    """Run peft's own forward of a LoRA layer."""
    from rlhf.cpu.gated import GatedProduct
    from rlhf.cpu.lora import LoraLinear

    if gated is not None:
        x = GatedProduct.apply(x, gated)
    return LoraLinear.forward(layer, x, *args, **kwargs)


Switch = Callable[[], AbstractContextManager[None]]

SWITCHES: dict[str, Switch] = {
    "gated": lambda: replaced("rlhf.cpu.gated", "fuse", _nothing),
    "norms": lambda: replaced("rlhf.cpu.norms", "fuse", _nothing),
    "fused_lora": lambda: replaced("rlhf.cpu.lora", "FusedLinear.forward", _as_peft),
    "attention": lambda: replaced("rlhf.cpu.attention", "MOST_TOKENS", 0),  # rows go to torch's kernel, one by one
    "freed_memory": lambda: replaced("rlhf.models.memory", "release_freed_memory", _nothing),
    "draw": lambda: replaced("rlhf.cpu.drawing", "draw", _plain_draw),
}
"""By a trick's name; see the list in ablation.py."""


@contextmanager
def off(name: str | None) -> Iterator[None]:
    """Switch the trick of that name off inside the block; None: all are on."""
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(SWITCHES[name]())
        yield
