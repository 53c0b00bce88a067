"""The policy's weights as a vLLM server takes them: whole and merged, or as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.errors import InputError
from rlhf.models.adapters import adapter_of, base_model

SHARD_BYTES = 2 * 2**30  # of a written file, so that merged copies of a whole model are never in memory together


def policy_weights(policy: Any) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """Yield every weight under its name in the plain model: (name, a tensor of its shape and type, its value).

    The value is a function. For a LoRA layer it computes ``W + scaling * B @ A`` of the active adapters as a new
    tensor; with trained token embeddings, the embeddings with those rows replaced. The policy does not change. A tied
    weight comes once. Raises InputError for adapters that cannot be merged so (DoRA, biases in LoRA, copies of whole
    modules, quantized weights).
    """
    plain = base_model(policy)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, weight in plain.named_parameters():
        owner = name
        while owner and owner not in layers:
            owner = owner.rpartition(".")[0]
        rest = name.removeprefix(f"{owner}.")
        if owner and not rest.startswith("base_layer."):
            continue  # the adapter's own weight
        _check_sendable(name, weight, layers.get(owner))
        if not owner:
            yield name, weight, weight.detach
            continue
        tail = rest.removeprefix("base_layer.")
        layer = layers[owner] if tail == "weight" else None
        full_name = f"{owner.removesuffix('.token_adapter')}.{tail}"
        yield full_name, weight, partial(merged, weight, layer)


@torch.no_grad()
def merged(weight: Tensor, layer: Any) -> Tensor:
    """Merge a layer's weight with its active adapters (those that peft has not merged already), summed in float32."""
    if layer is None:
        return weight.detach()
    adapters = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    if isinstance(layer, TrainableTokensLayer):
        return layer.get_merged_weights(adapters).detach()
    parts = [layer.get_delta_weight(name).float() for name in adapters if name in layer.scaling]
    return sum(parts, start=weight.float()).to(weight.dtype)


def _check_sendable(name: str, weight: Tensor, layer: Any) -> None:
    if not weight.is_floating_point():
        raise InputError(f"vLLM: {name} is quantized ({weight.dtype}), which is not sent; leave the engine out")
    if "modules_to_save" in name or "original_module" in name or name.count(".base_layer.") > 1:
        raise InputError(f"vLLM: {name} is a module with two adaptations or a copy of its own; use plain LoRA")
    if layer is None or isinstance(layer, TrainableTokensLayer):
        return
    special = any(layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter) for adapter in layer.active_adapters)
    if not isinstance(layer, Linear | Embedding) or special:
        kind = "DoRA, or a LoRA with biases" if special else f"peft's {type(layer).__name__}"
        raise InputError(f"vLLM: {name} is adapted by {kind}, which is not sent; use plain LoRA of linear layers")


def save_weights(policy: Any, folder: Path | None) -> None:
    """Write the policy's merged weights as transformers would, but a tied head under its own name too.

    vLLM on CPUs computes with a copy of a tied head, which follows only if the head itself is sent. A collective where
    FSDP2 shards the weights: one after the other is whole, in the precision that its layer computes in, on all
    processes, of which one has a folder and keeps it on the CPU until its file is full. Raises InputError as
    `policy_weights`."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, value in _with_head(policy):
        if folder is None:
            continue
        if size and size + value.nbytes > SHARD_BYTES:
            save_file(shard, folder / f"model-{number}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name], size = value.contiguous().cpu(), size + value.nbytes
        places[name] = f"model-{number}.safetensors"
    if folder is None:
        return
    if number == 0:
        save_file(shard, folder / "model.safetensors")
        return
    save_file(shard, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _with_head(policy: Any) -> Iterator[tuple[str, Tensor]]:
    computes: dict[str, Callable[[], Tensor]] = {}
    computed_in = base_model(policy).dtype  # its embeddings', which are whole already where FSDP2 shards the layers
    for name, _, compute in policy_weights(policy):
        computes[name] = compute
        value = compute()
        yield name, whole(value.to(computed_in) if isinstance(value, DTensor) else value)
    embeddings, head = _ends(policy)
    if head and head not in computes:
        yield head, whole(computes[embeddings]()).clone()  # safetensors refuses tensors that share memory


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from all processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_tied(policy: Any) -> bool:
    """Return whether the policy's head is its embeddings."""
    head = _ends(policy)[1]
    return bool(head) and all(name != head for name, *_ in policy_weights(policy))


def _ends(policy: Any) -> tuple[str, str]:
    """Return the names of the embeddings' weight and of the head's ("" if there is none) in the plain model."""
    plain = base_model(policy)
    names = {module: f"{name}.weight" for name, module in plain.named_modules()}
    return names[plain.get_input_embeddings()], names.get(plain.get_output_embeddings(), "")


def save_adapter(policy: PeftModel, folder: Path | None) -> None:
    """Write the policy's adapter alone, as peft would; a collective where FSDP2 shards it, as `save_weights`.

    Not by `state_dict`, which peft would call: FSDP2 cuts all weights again before it, even those that are whole."""
    own = {name: weight for name, weight in policy.named_parameters() if adapter_of(name) == "default"}
    state = {name: whole(weight.detach()) for name, weight in own.items()}
    if folder is None:
        return
    policy.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False, state_dict=state)


def adapter_refusal(policy: Any) -> str | None:
    """Return why a vLLM server cannot load the policy's adapter over its base; None if it can."""
    if not isinstance(policy, PeftModel):
        return "the policy is trained in full"
    config: Any = policy.peft_config["default"]
    for setting in ("trainable_token_indices", "modules_to_save", "use_dora", "lora_bias", "target_parameters"):
        if getattr(config, setting, None):
            return f"vLLM loads no adapter with {setting}"
    return None
