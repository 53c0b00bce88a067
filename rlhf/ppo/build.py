"""Construction of PPO's three models: the weights that each starts from, and the backbone that it uses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from rlhf.errors import InputError, reason
from rlhf.models import packing
from rlhf.models.adapters import (
    active_adapter,
    backbone,
    base_model,
    drop_input_hooks,
    is_adapter,
    lora_config,
    train_in_float32,
)
from rlhf.models.heads import embedding_rows, head_weight, vocabulary_rows
from rlhf.models.loading import clone, disable_dropout, held_in_4_bits, in_float32, is_quantized, load_policy
from rlhf.models.pretrained import fit_embeddings
from rlhf.models.scalar import ScoreNormalizer, load_scalar_model, score_head
from rlhf.ppo import role_adapters
from rlhf.ppo.actor_critic import ADAPTERS, ActorCritic
from rlhf.ppo.config import PPOConfig
from rlhf.run.precision import compute_dtype

log = logging.getLogger("rlhf")


ValueKind = Literal["separate", "adapter", "shared_trunk"]


class RewardModelLike(Protocol):
    """A reward model that a value model can start from: `reward_models.RewardModel`, or any object with these."""

    model: PreTrainedModel
    normalizer: ScoreNormalizer


def models_for(
    args: PPOConfig, model: Any, ref_model: Any, value_start: Any, peft_config: LoraConfig | None, dtype: torch.dtype
) -> ActorCritic:
    """Build the three models from the settings; a frozen base is held in `dtype`, trained weights in float32."""
    given = copy.deepcopy(peft_config)  # peft writes into it, and a resumed run gets the same object
    lora = given or lora_config(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    frozen_base = lora is not None or (isinstance(model, str | Path) and is_adapter(model))
    how = held_in_4_bits(model, dtype, frozen_base) if args.load_in_4bit else {}
    actor_critic = build_actor_critic(
        model,
        ref_model=ref_model,
        value_model=value_start,
        value_kind=args.value_model,
        lora=lora,
        dtype=dtype if frozen_base else torch.float32,
        seed=args.seed,
        how=how,
    )
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(actor_critic)
    return actor_critic


def build_actor_critic(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    ref_model: str | Path | PreTrainedModel | None = None,
    value_model: str | Path | PreTrainedModel | RewardModelLike | None = None,
    value_kind: ValueKind | None = None,
    lora: LoraConfig | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    how: Mapping[str, Any] = MappingProxyType({}),
) -> ActorCritic:
    """Load or copy the three models.

    ref_model: None copies the policy. value_model: a reward model; None starts from the policy's trunk with a zero
    head. value_kind: "separate" (a model of its own), "adapter" (an adapter on the policy's backbone; needs LoRA, of
    the reward model too) or "shared_trunk" (a zero head on the policy's own hidden states: one forward for both); None:
    "adapter" where it can be, else "separate". how: further arguments for loading policy and reference
    (`held_in_4_bits`). Raises InputError for combinations that cannot work.
    """
    policy = load_policy(model, dtype=dtype, lora=lora, seed=seed, how=how)
    in_float32(policy)
    if is_quantized(policy) and (value_kind == "separate" or not isinstance(policy, PeftModel)):
        raise InputError(
            "a quantized model is trained through LoRA alone: set lora_rank, with value_model adapter or shared_trunk"
        )
    reference = _build_reference(policy, ref_model, dtype, how)
    if value_kind == "adapter" and not isinstance(policy, PeftModel):
        raise InputError("value_model=adapter needs a LoRA policy; set lora_rank, or take separate or shared_trunk")
    shared = value_kind == "shared_trunk"
    if shared and value_model is not None:
        raise InputError("value_model=shared_trunk starts from a zero head; leave out the value model to start from")
    if shared:
        value, head = None, _zero_head(policy)
    else:
        value, head = _build_value(policy, value_model, dtype, value_kind)
    actor_critic = ActorCritic(policy, reference, value, head, shared)
    disable_dropout(actor_critic)
    if reference is not None:
        reference.requires_grad_(False).eval()
    if isinstance(policy, PeftModel):
        policy.set_adapter(ADAPTERS["policy"])
        policy.set_requires_grad([name for name in ("reference",) if name in policy.peft_config], False)
        policy.set_requires_grad(actor_critic.trained_adapters(policy), True)
        train_in_float32(policy)
    return actor_critic.train()


def _build_reference(
    policy: Any, ref_model: Any, dtype: torch.dtype | None, how: Mapping[str, Any]
) -> nn.Module | None:
    if ref_model is not None:
        if ref_model is policy:
            raise InputError("ref_model is the policy itself; leave it out, and the trainer keeps a frozen copy")
        reference = load_policy(ref_model, dtype=dtype, how=how)
        if not isinstance(policy, PeftModel):
            in_float32(reference)  # what it shares with the policy is to be equal at step 0
        rows, written = vocabulary_rows(reference), vocabulary_rows(policy)
        if rows < written:
            seen = f"it has embeddings for {rows} tokens, and the policy writes {written}"
            raise InputError(f"ref_model: {seen}; leave it out, or grow its embeddings (resize_token_embeddings)")
        return reference
    if isinstance(policy, PeftModel):
        role_adapters.copy_adapter(policy, "reference")
        return None
    return clone(policy)


def _zero_head(policy: Any) -> nn.Linear:
    weight = head_weight(policy)  # has the right width; config.hidden_size has not where OPT projects its last states
    return _head(torch.zeros(1, weight.shape[1]), torch.zeros(1)).to(weight.device)


def _build_value(
    policy: Any, source: Any, dtype: torch.dtype | None, kind: ValueKind | None
) -> tuple[nn.Module | None, nn.Linear]:
    device, adapted = next(policy.parameters()).device, isinstance(policy, PeftModel) and kind != "separate"
    if source is None:
        if adapted:
            role_adapters.copy_adapter(policy, "value")
            return None, _zero_head(policy)
        value: Any = _merged_copy(policy, device) if isinstance(policy, PeftModel) else clone(policy)
        value.float().requires_grad_(True)
        _drop_head(value)
        return value, _zero_head(policy)
    scalar: Any
    own = isinstance(source, str | Path)
    adapter = str(source) if own and is_adapter(source) else None
    if own:
        scalar, normalizer = load_scalar_model(source, dtype if adapted and adapter else None)
    elif isinstance(source, nn.Module):
        scalar, normalizer = source, ScoreNormalizer()
    else:
        scalar, normalizer = source.model, source.normalizer
    joins = adapted and isinstance(scalar, PeftModel) and _same_base(policy, scalar)
    if kind == "adapter" and not joins:
        what = "over the policy's own base; set separate, or train both over one base with lora_rank"
        raise InputError(f"value_model=adapter needs a LoRA reward model {what}")
    folder = source if own else getattr(source, "folder", None)
    if not joins and scalar.dtype != torch.float32 and folder:
        scalar, own = load_scalar_model(folder)[0], True  # what is trained in full doesn't start from rounded weights
    head = _normalised_head(score_head(scalar), normalizer).to(device)
    if joins:
        role_adapters.take_adapter(policy, scalar, adapter)
        return None, head
    if adapted:
        log.info("value model: a model of its own, trained in full: the reward model is no adapter on this base")
    # a reward model that scores is on the GPU; the copy goes at once to where the policy is
    trunk = _merged_copy(scalar, device) if isinstance(scalar, PeftModel) else scalar if own else clone(scalar, device)
    fit_embeddings(trunk, embedding_rows(policy))  # of one tokenizer, bases may hold more rows than it has tokens
    trunk.float().requires_grad_(True)
    trunk.score.requires_grad_(False)  # replaced by `head`, which also carries the normaliser
    return trunk.to(device), head


def _merged_copy(model: PeftModel, device: torch.device) -> Any:
    try:
        # in bfloat16 much of a small update would be lost
        return copy.deepcopy(model).to(device).float().merge_and_unload()
    except ValueError as error:
        raise InputError(
            f"value_model=separate: the adapter cannot be merged ({reason(error)}); set adapter"
        ) from error


def _head(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight.float())
        head.bias.copy_(bias.float())
    return head


def _normalised_head(score: Any, normalizer: ScoreNormalizer) -> nn.Linear:
    """Return the reward model's head with the normaliser in its weight and bias: it predicts normalised scores."""
    raw_bias = torch.zeros(1) if score.bias is None else score.bias.detach().float().cpu()
    return _head(score.weight.detach().float().cpu() / normalizer.std, (raw_bias - normalizer.mean) / normalizer.std)


def _same_base(policy: PeftModel, scalar: PeftModel) -> bool:
    name, other = (m.peft_config["default"].base_model_name_or_path for m in (policy, scalar))
    return name == other or (backbone(policy).config.to_dict() == backbone(scalar).config.to_dict() and not other)


def _drop_head(model: PreTrainedModel) -> None:
    """Freeze the value model's language head, which it does not use, so that no optimizer state is kept for it."""
    output = cast(Any, model).get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        output.requires_grad_(False)


def enable_gradient_checkpointing(actor_critic: ActorCritic) -> None:
    """Recompute activations in backward, each with the adapter that was active in its forward."""
    for model in (actor_critic.policy, actor_critic.value):
        if model is None:
            continue
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if isinstance(model, PeftModel):
            kwargs["context_fn"] = partial(_adapter_contexts, model, actor_critic.trained_adapters(model))
        plain = base_model(model)
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable(kwargs)  # gradient_checkpointing_enable is the older name, deprecated in transformers 5.23
        drop_input_hooks(plain)


def prepare(actor_critic: ActorCritic, args: PPOConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Choose packed rows on GPUs (on CPUs `rlhf.cpu.prepare` has chosen them), and compile, as the settings ask.

    Call it once the models are where they compute: cut by FSDP2, too. dtype: the precision of the run's matrix
    products; device: where the models are."""
    parts = actor_critic.parts()
    if args.packing == "off":
        actor_critic.packable = actor_critic.packs = False
    elif device.type == "cuda":
        with actor_critic.in_parts():
            packs = all(packing.prepare(part, args.packing, dtype, device) for part in parts)
        actor_critic.packable = actor_critic.packs = packs
        for part in [] if packs else parts:
            packing.leave_varlen(part)
    if args.compile:
        compile_layers(actor_critic)


@contextmanager
def flash(actor_critic: ActorCritic, args: PPOConfig) -> Iterator[None]:
    """Let the models compute flash attention inside the context where `prepare` chose it, and SDPA after it: flash
    attention refuses a float32 model outside autocast."""
    for part in actor_critic.parts() if args.packing != "off" else []:
        packing.use_flash(part, compute_dtype(args.bf16))
        if not actor_critic.packs:
            packing.leave_varlen(part)
    try:
        yield
    finally:
        for part in actor_critic.parts():
            if packing.is_flash(part):
                packing.set_attention(part, "sdpa")


def compile_layers(actor_critic: ActorCritic) -> None:
    """Compile the models' layers in place (torch.compile by region, so that equal layers share their code).

    Sampling runs without it (`ActorCritic.sampling`): every decoding step has another shape.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # adapters x grad modes
    names = set(actor_critic._no_split_modules)
    for module in actor_critic.modules():
        if names & {kind.__name__ for kind in type(module).__mro__}:  # FSDP2 has given a layer a class of its own
            module.compile(dynamic=True)


def _adapter_contexts(model: PeftModel, trained: Sequence[str]) -> tuple[Any, Any]:
    """Return the contexts of a forward and of its recomputation (no closure: a model is pickled with it)."""
    return nullcontext(), active_adapter(model, str(model.active_adapter), trained)


def build_optimizer(actor_critic: ActorCritic, args: PPOConfig, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Build the optimizer with two parameter groups, policy and value model, each with its own learning rate.

    arguments: by which transformers makes any other optimizer than AdamW, by its name."""
    groups = [
        {"params": actor_critic.policy_parameters(), "lr": args.learning_rate},
        {"params": actor_critic.value_parameters(), "lr": args.value_lr},
    ]
    if args.optimizer == "adamw":
        betas = (args.adam_beta1, args.adam_beta2)
        fused = all(p.device.type in ("cpu", "cuda") for p in actor_critic.parameters())
        return torch.optim.AdamW(
            groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=fused or None
        )
    from transformers import Trainer  # with it come datasets and pandas: 80 MiB

    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    del kwargs["lr"]
    if kwargs.get("optim_bits") == 8:  # as transformers does: an embedding's rare gradients need more bits
        from bitsandbytes.optim import GlobalOptimManager

        manager: Any = GlobalOptimManager
        for module in actor_critic.modules():
            if isinstance(module, nn.Embedding):
                manager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = cls([group | {"weight_decay": args.weight_decay} for group in groups], **kwargs)
    return optimizer
