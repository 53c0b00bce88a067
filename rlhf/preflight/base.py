"""Check that the base under a model object's adapter is the one that is loaded again with what is saved."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.models.adapters import adapter_of, base_name
from rlhf.models.loading import is_quantized
from rlhf.models.pretrained import from_pretrained
from rlhf.preflight.measure import COPIED, SHARDED, Finding
from rlhf.run import distributed

ROUNDED, LEAST = 2**-7, 1e-7  # a weight's share that bfloat16 may round off, and what float16 may lose of a tiny one
REMEDY = "save the model and pass its folder"


def check_base(accelerator: Accelerator, model: PeftModel) -> Finding:
    """Compare a base's weights with those of the folder or hub id that its saved adapter will name.

    A model object's may have been trained in memory since they were read, and only the adapter is saved. Rounding to
    another precision is no difference; rows that were added to the embeddings are not compared."""
    settings: Any = model.peft_config["default"]
    path = settings.base_model_name_or_path
    if not path:
        cause = "the saved adapter could not be loaded again"
        return Finding("base", "the model object was read from no folder", False, cause, REMEDY)
    if is_quantized(model):
        return Finding("base", "not measured: its weights are quantized", True)
    if accelerator.distributed_type in SHARDED or distributed.is_sharded(model):
        return Finding("base", "not measured: weights are sharded", True)
    if sum(p.numel() for p in model.parameters()) > COPIED:
        return Finding("base", "not measured: the base is too large to load twice", True)
    base: Any = model.get_base_model()
    weights = {base_name(name): p for name, p in base.named_parameters() if adapter_of(name) is None}
    revision = {"revision": settings.revision} if settings.revision else {}
    files = from_pretrained(AutoModelForCausalLM, path, base.dtype, **revision)
    pairs = [(name, weights[name], file) for name, file in files.named_parameters() if name in weights]
    other = [name for name, weight, file in pairs if _differs(weight, file)]
    return Finding(
        "base",
        f"{len(other)} of {len(pairs)} weights differ from those of {path}{f', first {other[0]}' if other else ''}",
        not other,
        "the model object was changed after loading, and the saved adapter would be loaded over that folder's weights",
        REMEDY,
    )


@torch.no_grad()
def _differs(weight: Tensor, file: Tensor) -> bool:
    if weight.shape[1:] != file.shape[1:]:
        return True
    common: Any = slice(min(len(weight), len(file))) if weight.dim() else ...
    one, other = weight[common].cpu().float(), file[common].cpu().float()
    return not torch.allclose(one, other, rtol=ROUNDED, atol=LEAST)
