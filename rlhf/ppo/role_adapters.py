"""The adapters of reference and value model beside the policy's, on one backbone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from rlhf.errors import InputError
from rlhf.models.adapters import adapter_of, base_name, trained_tokens
from rlhf.models.pretrained import adapter_weights


def copy_adapter(policy: PeftModel, name: str) -> None:
    """Add a copy of the policy's adapter under another name; as "value" without what it has on the language head."""
    config: Any = copy.deepcopy(policy.peft_config["default"])
    config.init_lora_weights = True  # the copied weights replace whatever it starts from
    _add_adapter(policy, name, config)
    set_peft_model_state_dict(policy, get_peft_model_state_dict(policy, adapter_name="default"), adapter_name=name)
    if name == "value":
        _leave_out_head(policy, name)


def _leave_out_head(policy: PeftModel, name: str) -> None:
    """Delete an adapter's part of the language head: the value model never runs it, and DDP would wait for its
    gradients. What a tied head shares with the embeddings stays."""
    head, embeddings = policy.get_output_embeddings(), policy.get_input_embeddings()
    shared = {id(parameter) for parameter in embeddings.parameters()}
    if any(adapter_of(part) == name and id(parameter) not in shared for part, parameter in head.named_parameters()):
        head.delete_adapter(name, ["default"])


def _add_adapter(policy: PeftModel, name: str, config: Any) -> None:
    """Add an adapter; one of an earlier trainer on the same model object is replaced."""
    if name in policy.peft_config:
        policy.delete_adapter(name)
    policy.add_adapter(name, config)


def take_adapter(policy: PeftModel, scalar: PeftModel, folder: str | None) -> None:
    """Load the reward model's adapter, without its head, as the adapter "value" on the policy's backbone.

    Where the policy trains embeddings of chat tokens and the reward model does not, the value model's start as the
    reward model's. Raises InputError if the two bases or adapters do not fit."""
    config: Any = copy.deepcopy(scalar.peft_config["default"])
    config.task_type, config.inference_mode, config.init_lora_weights = "CAUSAL_LM", False, True
    saved = [name for name in config.modules_to_save or [] if name not in ("score", "classifier")]
    config.modules_to_save = saved or None
    tokens, scalar_tokens = trained_tokens(policy), trained_tokens(scalar)
    if scalar_tokens.keys() - tokens.keys():
        raise InputError(
            "value model: the reward model's adapter trains embeddings of chat tokens and the policy's does not; "
            "set value_model: separate, or train both from one SFT adapter"
        )
    config.trainable_token_indices = tokens | scalar_tokens or None
    _add_adapter(policy, "value", config)
    own = get_peft_model_state_dict(policy, adapter_name="value", save_embedding_layers=False)
    held = adapter_weights(folder) if folder else get_peft_model_state_dict(scalar)
    lacking = [name for name in own if name not in held and "trainable_tokens" not in name]
    if lacking:
        raise InputError(f"value model: its adapter doesn't fit the policy's base, which also has {lacking[0]}")
    for name, tensor in held.items():
        if name not in own and ".score." not in name:
            own |= _token_rows(policy, name, tensor, config.trainable_token_indices or {})
    own |= {name: tensor for name, tensor in held.items() if name in own}
    set_peft_model_state_dict(policy, own, adapter_name="value")
    _leave_out_head(policy, "value")


def _token_rows(policy: PeftModel, name: str, tensor: Tensor, tokens: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the value adapter's token embeddings in the whole embeddings that a reward model's adapter carries.

    It carries them where its vocabulary grew. Raises InputError if the other rows are not those of the policy's base,
    or the tensor is no such embedding."""
    base = {base_name(own): parameter.detach() for own, parameter in policy.named_parameters()}
    path = base_name(name).removesuffix(".weight")
    mine = base.get(f"{path}.weight")
    if mine is None or mine.shape != tensor.shape:
        raise InputError(f"value model: its adapter doesn't fit the policy's base, first {name}")
    ids = next((ids for module, ids in tokens.items() if path.endswith(module)), [])
    others = torch.ones(len(tensor), dtype=torch.bool).index_fill(0, torch.tensor(ids, dtype=torch.long), False)
    if not torch.equal(mine.cpu()[others], tensor.cpu().to(mine.dtype)[others]):
        raise InputError(
            f"value model: the reward model was trained over other embeddings than the policy's ({name}); "
            "set value_model: separate, or train both from one SFT adapter"
        )
    return {f"{path}.token_adapter.trainable_tokens_delta": tensor[ids]} if ids else {}
