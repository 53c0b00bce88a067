"""Policy, reference and value model as one module, on one backbone (LoRA adapters) or on three.

accelerate prepares this one module and nobody reaches inside it: `forward` returns log-probabilities,
entropy and values, so that DDP's hooks and sharded parameters are never bypassed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf import InputError, gated, norms, packing, sharding
from rlhf import lora as lora_layers
from rlhf.attention import use_short_rows, uses_short_rows
from rlhf.heads import head_weight, logits_function
from rlhf.lora import active_adapter, adapter_in_use, by_thread
from rlhf.models import (
    ScoreNormalizer,
    backbone,
    clone,
    disable_dropout,
    is_adapter,
    is_quantized,
    load_policy,
    load_scalar_model,
    position_ids,
    score_head,
)
from rlhf.ppo_math import token_logprobs
from rlhf.rollout import Batch
from rlhf.side_by_side import cores

Role = Literal["policy", "reference", "value"]
ValueKind = Literal["separate", "adapter", "shared_trunk"]
ADAPTERS = {"policy": "default", "reference": "reference", "value": "value"}
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}  # at once; 16 and 256 MiB in float32


class Outputs(NamedTuple):
    """[B, T] each, 0 on padding; None for a role that was not asked for."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those of the roles that were asked for, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class RewardModelLike(Protocol):
    """What a value model can start from: `reward_models.RewardModel`, or anything with these."""

    model: PreTrainedModel
    normalizer: ScoreNormalizer


class ActorCritic(nn.Module):
    """The three models of PPO: adapters on the policy's backbone, or separate models."""

    def __init__(
        self, policy: Any, reference: Any | None, value: Any | None, head: nn.Linear, shared_trunk: bool = False
    ):
        super().__init__()
        self.shared_trunk = shared_trunk  # the value head stands on the policy's own hidden states
        self.policy: Any = policy
        self.reference = reference  # None: the adapter "reference" on the policy's backbone
        self.value = value  # None: the adapter "value" on the policy's backbone, or the policy itself
        self.value_head = head
        self.packable = False  # would `rlhf.packing` compute the same?
        self.by_thread = False  # the adapter switched on is the calling thread's own
        # by this name accelerate's FSDP2 asks a module for its layers
        self._no_split_modules = sharding.layer_classes([m for m in (policy, reference, value) if m is not None])

    @property
    def packs(self) -> bool:
        """Are rows of different lengths computed as one long row? On a CPU: there its attention takes them apart."""
        return self.packable and self.value_head.weight.device.type == "cpu"

    def forward(self, batch: Batch, temperature: float, roles: Sequence[Role] = ("policy", "value")) -> Outputs:
        outputs: dict[str, Tensor] = {}
        together = self.shared_trunk and {"policy", "value"} <= set(roles)
        for role in roles:
            if role == "value" and together:
                continue  # the policy's forward is the value model's
            with self.active(role) as model:
                hidden = response_hidden(model, batch, self.packs)
                if role == "value" or (role == "policy" and together):
                    outputs["values"] = self._values(hidden, batch)
                if role == "value":
                    continue
                logprobs, entropy = hidden_logprobs(model, hidden, batch, temperature)
                if role == "policy":
                    outputs |= {"logprobs": logprobs, "entropy": entropy}
                else:
                    outputs["reference_logprobs"] = logprobs
        return Outputs(**outputs)

    def _values(self, hidden: Float[Tensor, "B T H"], batch: Batch) -> Float[Tensor, "B T"]:
        with torch.autocast(hidden.device.type, enabled=False):  # a value in bfloat16 has three digits
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        return torch.where(batch.mask, values, 0.0)

    @contextmanager
    def active(self, role: Role) -> Any:
        """The model that plays `role`, with its adapter switched on where the backbone is shared."""
        model = {"policy": self.policy, "reference": self.reference, "value": self.value}[role]
        if model is not None and not (role == "policy" and isinstance(model, PeftModel)):
            yield model  # a model of its own; a given reference may itself be an adapter
            return
        model = self.policy if model is None else model
        if not isinstance(model, PeftModel):  # trained whole, and the value model's trunk too
            yield model
            return
        adapter = ADAPTERS["policy" if self.shared_trunk and role == "value" else role]
        with active_adapter(model, adapter, self._trained(model), self.by_thread):
            yield model

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and not _is_value(name)]

    def value_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and _is_value(name)]

    def most_tokens(self, wanted: int) -> int:
        """Of a micro-batch, where `wanted` are asked for; beyond it would be padded, and padding was not counted."""
        return min(wanted, packing.MOST_TOKENS) if self.packs else wanted

    def roles_at_once(self, processes: int) -> list[tuple[Role, ...]]:
        """The models of each backward: each its own where they share nothing; DDP wants one backward of the whole."""
        apart = processes == 1 and not self.shared_trunk
        return [("policy",), ("value",)] if apart else [("policy", "value")]

    def side_by_side(self, processes: int) -> bool:
        """Let policy and value model compute at the same time from now on, where that works; does it?

        On a CPU with two cores or more, with models that keep no notes while they compute (those that can be packed,
        without positions that grow with the longest row seen), and where the value model, which has no language head,
        has about half of the policy's work or more: else its cores would wait for the policy's."""
        adapted = [model for model in (self.policy, self.value) if isinstance(model, PeftModel)]
        alone = len(self.roles_at_once(processes)) > 1 and self.packs and cores() > 1
        self.by_thread = alone and not _takes_notes(self) and _alike(self.policy) and all(map(by_thread, adapted))
        return self.by_thread

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """Whose gradient norms are clipped, each on its own: the models that share no weights."""
        if self.shared_trunk:
            return {"policy_grad_norm": self.policy_parameters() + self.value_parameters()}
        return {"policy_grad_norm": self.policy_parameters(), "value_grad_norm": self.value_parameters()}

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: every trained tensor, and nothing of the frozen ones.

        Where parameters are sharded, all processes must call it, and the first alone gets the tensors.
        """
        sharding.reshard(self)
        return sharding.full({name: p for name, p in self.named_parameters() if p.requires_grad})

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Every process gives the whole tensors, and keeps its part where parameters are sharded."""
        sharding.reshard(self)
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise InputError(f"checkpoint: trained tensors differ, first {sorted(own.keys() ^ state.keys())[0]}")
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(sharding.like(tensor, own[name]))

    def save_policy(self, folder: str | Path) -> None:
        """The policy alone, as transformers or peft would save it.

        Where parameters are sharded, all processes must call it, and the first alone writes.
        """
        given: dict[str, Any] = {}
        if sharding.is_sharded(self):
            sharding.reshard(self)
            given["state_dict"] = sharding.full(self._policy_state())
            if torch.distributed.get_rank() > 0:
                return
        if isinstance(self.policy, PeftModel):
            self.policy.save_pretrained(str(folder), selected_adapters=[ADAPTERS["policy"]], **given)
        else:
            self.policy.save_pretrained(str(folder), **given)

    def _policy_state(self) -> dict[str, Tensor]:
        """The policy's tensors, of an adapter without its base."""
        state = self.policy.state_dict(keep_vars=True)
        if not isinstance(self.policy, PeftModel):
            return state
        trained = {name for name, p in self.policy.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    @contextmanager
    def sampling(self) -> Any:
        """Inside, an engine may run `self.policy` itself, and for as many steps as its own responses need."""
        if sharding.is_sharded(self):
            # an empty forward, for no role: FSDP2 takes what runs first for the root, and that must not be a layer
            self(None, 1.0, ())
        with sharding.whole(self, self.policy), torch.compiler.set_stance("force_eager"):
            yield

    def _trained(self, model: Any) -> list[str]:
        return [name for name in (ADAPTERS["policy"], ADAPTERS["value"]) if name in model.peft_config]


def response_hidden(model: Any, batch: Batch, packed: bool = False) -> Float[Tensor, "B T H"]:
    """Hidden states of the positions before each response token; packed: computed without the padding."""
    if packed and not batch.attention_mask.all() and batch.attention_mask.sum() <= packing.MOST_TOKENS:
        places = batch.attention_mask.flatten().cumsum(0).view_as(batch.attention_mask) - 1
        states = packing.packed_hidden(model, batch.input_ids, batch.attention_mask)
        return states[places.clamp(min=0).gather(1, batch.positions())]
    mask = batch.attention_mask.long()
    hidden = backbone(model)(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    places = batch.positions()
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def response_logprobs(
    model: Any, batch: Batch, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-probabilities of the response tokens under a causal model, and entropies, in nats; 0 on padding."""
    return hidden_logprobs(model, response_hidden(model, batch), batch, temperature)


def hidden_logprobs(
    model: Any, hidden: Float[Tensor, "B T H"], batch: Batch, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """`response_logprobs` from `response_hidden`."""
    weight = head_weight(model)
    chunk = max(1, LOGITS_PER_CHUNK.get(weight.device.type, 2**26) // weight.shape[0])
    logprobs, entropy = token_logprobs(hidden, weight, batch.targets, temperature, chunk, logits_function(model))
    return torch.where(batch.mask, logprobs, 0.0), torch.where(batch.mask, entropy, 0.0)


def build_actor_critic(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    ref_model: str | Path | PreTrainedModel | None = None,
    value_model: str | Path | PreTrainedModel | RewardModelLike | None = None,
    value_kind: ValueKind | None = None,
    lora: LoraConfig | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> ActorCritic:
    """Load or copy the three models. Where the reward model cannot serve, the value model is the policy's
    trunk under a zero head (value_model=None).

    value_kind: "separate" (a model of its own), "adapter" (on the policy's backbone; needs LoRA) or "shared_trunk" (a
    zero head on the policy's own hidden states: one forward for both); None: adapter under LoRA, else separate.
    """
    policy = load_policy(model, dtype=dtype, lora=lora, seed=seed)
    if is_quantized(policy) and (value_kind == "separate" or not isinstance(policy, PeftModel)):
        raise InputError(
            "a quantized model is trained through LoRA alone: set lora_rank, with value_model adapter or shared_trunk"
        )
    reference = _build_reference(policy, ref_model, dtype)
    if value_kind == "adapter" and not isinstance(policy, PeftModel):
        raise InputError("value_model=adapter needs a LoRA policy; set lora_rank, or take separate or shared_trunk")
    shared = value_kind == "shared_trunk"
    if shared and value_model is not None:
        raise InputError("value_model=shared_trunk starts from a zero head: leave the value model to start from out")
    if shared:
        value, head = None, _zero_head(policy)
    else:
        value, head = _build_value(policy, value_model, dtype, own_trunk=value_kind == "separate")
    actor_critic = ActorCritic(policy, reference, value, head, shared)
    for part in (policy, reference, value):
        use_short_rows(part)
    lora_layers.fuse(actor_critic)
    norms.fuse(actor_critic)
    gated.fuse(actor_critic)
    disable_dropout(actor_critic)
    if reference is not None:
        reference.requires_grad_(False).eval()
    models = [part for part in (policy, reference, value) if part is not None]
    actor_critic.packable = all(uses_short_rows(part) and packing.can_pack(part) for part in models)
    if isinstance(policy, PeftModel):
        policy.set_adapter(ADAPTERS["policy"])
        policy.set_requires_grad([name for name in ("reference",) if name in policy.peft_config], False)
        policy.set_requires_grad(actor_critic._trained(policy), True)
    return actor_critic.train()


def _build_reference(policy: Any, ref_model: Any, dtype: torch.dtype | None) -> nn.Module | None:
    if ref_model is not None:
        if ref_model is policy:
            raise InputError("ref_model is the policy itself; leave it out: the trainer keeps a frozen copy")
        return load_policy(ref_model, dtype=dtype)
    if isinstance(policy, PeftModel):
        _copy_adapter(policy, "reference")
        return None
    return clone(policy)


def _zero_head(policy: Any) -> nn.Linear:
    weight = head_weight(policy)  # its width, not config.hidden_size: OPT may project its last hidden states
    return _head(torch.zeros(1, weight.shape[1]), torch.zeros(1)).to(weight.device)


def _build_value(
    policy: Any, source: Any, dtype: torch.dtype | None, own_trunk: bool
) -> tuple[nn.Module | None, nn.Linear]:
    device, adapted = next(policy.parameters()).device, isinstance(policy, PeftModel) and not own_trunk
    if source is None:
        if adapted:
            _copy_adapter(policy, "value")
            return None, _zero_head(policy)
        value: Any = _merged_copy(policy) if isinstance(policy, PeftModel) else clone(policy)
        value.float().requires_grad_(True)
        _drop_head(value)
        return value, _zero_head(policy)
    scalar: Any
    if isinstance(source, str | Path):
        scalar, normalizer = load_scalar_model(source, dtype)
        adapter = str(source) if is_adapter(source) else None
    elif isinstance(source, nn.Module):
        scalar, normalizer, adapter = source, ScoreNormalizer(), None
    else:
        scalar, normalizer, adapter = source.model, source.normalizer, None
    head = _normalised_head(score_head(scalar), normalizer).to(device)
    if adapted and isinstance(scalar, PeftModel) and _same_base(policy, scalar):
        _take_adapter(policy, scalar, adapter)
        return None, head
    if isinstance(scalar, PeftModel):
        if adapted:
            raise InputError(
                "value model: a LoRA reward model over another base than the policy's; train both over one base"
            )
        trunk = _merged_copy(scalar)  # beside a policy trained whole, so is the value model
    else:
        trunk = scalar if isinstance(source, str | Path) else clone(scalar)
    trunk.float().requires_grad_(True)
    trunk.score.requires_grad_(False)  # replaced by `head`, which also carries the normaliser
    return trunk.to(device), head


def _merged_copy(model: PeftModel) -> Any:
    return copy.deepcopy(model).merge_and_unload()


def _head(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight.float())
        head.bias.copy_(bias.float())
    return head


def _normalised_head(score: Any, normalizer: ScoreNormalizer) -> nn.Linear:
    """The reward model's head, divided by the spread and shifted, so that it predicts normalised scores."""
    raw_bias = torch.zeros(1) if score.bias is None else score.bias.detach().float().cpu()
    return _head(score.weight.detach().float().cpu() / normalizer.std, (raw_bias - normalizer.mean) / normalizer.std)


def _same_base(policy: PeftModel, scalar: PeftModel) -> bool:
    mine, theirs = (m.peft_config["default"].base_model_name_or_path for m in (policy, scalar))
    return mine == theirs or (backbone(policy).config.to_dict() == backbone(scalar).config.to_dict() and not theirs)


def _copy_adapter(policy: PeftModel, name: str) -> None:
    config = copy.deepcopy(policy.peft_config["default"])
    policy.add_adapter(name, config)
    set_peft_model_state_dict(policy, get_peft_model_state_dict(policy, adapter_name="default"), adapter_name=name)


def _take_adapter(policy: PeftModel, scalar: PeftModel, folder: str | None) -> None:
    """The reward model's LoRA weights as the adapter "value" on the policy's backbone (its head stays outside)."""
    config: Any = copy.deepcopy(scalar.peft_config["default"])
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    ours: Any = policy.peft_config["default"]
    mine, theirs = ours.trainable_token_indices, config.trainable_token_indices
    if isinstance(mine, dict) and isinstance(theirs, dict):
        config.trainable_token_indices = mine | theirs  # a reward model has no lm_head whose tokens could be trained
    policy.add_adapter("value", config)
    weights = load_peft_weights(folder, device="cpu") if folder else get_peft_model_state_dict(scalar)
    weights = {name: tensor for name, tensor in weights.items() if ".score." not in name}
    weights = get_peft_model_state_dict(policy, adapter_name="value") | weights
    result: Any = set_peft_model_state_dict(policy, weights, adapter_name="value")
    if result.unexpected_keys:
        raise InputError(f"value model: its adapter doesn't fit the policy's base, first {result.unexpected_keys[0]}")


def _drop_head(model: PreTrainedModel) -> None:
    """The value model has no use for a language head; frozen, so that no optimizer state is kept for it."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        output.requires_grad_(False)


def _alike(policy: Any) -> bool:
    """Does a value model, of the same layers and without the language head, have about the policy's work?"""
    trunk = backbone(policy)
    layers = sum(p.numel() for p in trunk.parameters()) - trunk.get_input_embeddings().weight.numel()
    return layers >= head_weight(policy).numel()


def _takes_notes(module: nn.Module) -> bool:
    """Does a forward change what a later one computes with? transformers' rotary positions of these kinds do."""
    kinds = [getattr(part, "rope_type", None) for part in module.modules()]
    flat = [kind for some in kinds for kind in (some.values() if isinstance(some, dict) else [some])]
    return any(kind in ("dynamic", "longrope") for kind in flat)


def enable_gradient_checkpointing(actor_critic: ActorCritic) -> None:
    """Recompute activations in backward, each under the adapter that was active in its forward."""
    for model in (actor_critic.policy, actor_critic.value):
        if model is None:
            continue
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if isinstance(model, PeftModel):
            kwargs["context_fn"] = _adapter_contexts(model, actor_critic)
        plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable(kwargs)  # the second name is transformers' older one, deprecated in 5.23


def compile_layers(actor_critic: ActorCritic) -> None:
    """Compile the models' layers where they stand (torch.compile by region: layers that are alike share their code).

    Sampling stays as it is (`sampling`): every step of a cache would be another shape.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # adapters x grad modes
    for module in actor_critic.modules():
        if type(module).__name__ in actor_critic._no_split_modules:
            module.compile(dynamic=True)


def _adapter_contexts(model: PeftModel, actor_critic: ActorCritic) -> Callable[[], tuple[Any, Any]]:
    trained = actor_critic._trained(model)
    return lambda: (
        nullcontext(),
        active_adapter(model, adapter_in_use(model), trained, actor_critic.by_thread),
    )


def _is_value(name: str) -> bool:
    """Is this parameter the value model's: its own trunk, its head, or the adapter called "value"?"""
    adapted = any(kind in name for kind in ("lora_", "trainable_tokens", "modules_to_save"))
    return name.startswith(("value.", "value_head.")) or (adapted and "value" in name.split(".")[-2:])
