"""Policy, reference and value model as one module, on one backbone (LoRA adapters) or on three.

accelerate prepares this one module and nobody reaches inside it: `forward` returns log-probabilities,
entropy and values, so that DDP's hooks and sharded parameters are never bypassed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from rlhf import packing
from rlhf.errors import InputError
from rlhf.models.adapters import active_adapter, adapter_of
from rlhf.models.forward import hidden_logprobs, response_hidden
from rlhf.padding import Batch
from rlhf.run import distributed

Role = Literal["policy", "reference", "value"]
ADAPTERS = {"policy": "default", "reference": "reference", "value": "value"}


NOT_ASKED = torch.empty(0)


class Outputs(NamedTuple):
    """[B, T] each, 0 on padding; empty for a role that was not asked for."""

    logprobs: Tensor = NOT_ASKED
    entropy: Tensor = NOT_ASKED
    reference_logprobs: Tensor = NOT_ASKED
    values: Tensor = NOT_ASKED


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
        self.packs = False  # are rows of different lengths computed as one long row? `rlhf.cpu.prepare` decides
        # by this name accelerate's FSDP2 asks a module for its layers
        self._no_split_modules = distributed.layer_classes([m for m in (policy, reference, value) if m is not None])

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
    def active(self, role: Role) -> Iterator[Any]:
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
        with active_adapter(model, adapter, self.trained_adapters(model)):
            yield model

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and not _is_value(name)]

    def value_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and _is_value(name)]

    def most_tokens(self, wanted: int) -> int:
        """Of a micro-batch, where `wanted` are asked for; beyond it would be padded, and padding was not counted."""
        return min(wanted, packing.MOST_TOKENS) if self.packs else wanted

    def backward_roles(self, processes: int) -> list[tuple[Role, ...]]:
        """The models of each backward: each its own where they share nothing; DDP wants one backward of the whole."""
        apart = processes == 1 and not self.shared_trunk
        return [("policy",), ("value",)] if apart else [("policy", "value")]

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """Whose gradient norms are clipped, each on its own: the models that share no weights."""
        if self.shared_trunk:
            return {"policy_grad_norm": self.policy_parameters() + self.value_parameters()}
        return {"policy_grad_norm": self.policy_parameters(), "value_grad_norm": self.value_parameters()}

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: every trained tensor, and nothing of the frozen ones.

        Where parameters are sharded, all processes must call it, and the first alone gets the tensors.
        """
        distributed.reshard(self)
        return distributed.full({name: p for name, p in self.named_parameters() if p.requires_grad})

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Every process gives the whole tensors, and keeps its part where parameters are sharded."""
        distributed.reshard(self)
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise InputError(f"checkpoint: trained tensors differ, first {sorted(own.keys() ^ state.keys())[0]}")
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(distributed.like(tensor, own[name]))

    def save_policy(self, folder: str | Path) -> None:
        """The policy alone, as transformers or peft would save it.

        Where parameters are sharded, all processes must call it, and the first alone writes.
        """
        given: dict[str, Any] = {}
        if distributed.is_sharded(self):
            distributed.reshard(self)
            given["state_dict"] = distributed.full(self._policy_state())
            if torch.distributed.get_rank() > 0:
                return
        if isinstance(self.policy, PeftModel):
            self.policy.save_pretrained(str(folder), selected_adapters=[ADAPTERS["policy"]], **given)
        else:
            self.policy.save_pretrained(str(folder), **given)

    def _policy_state(self) -> dict[str, Tensor]:
        """The policy's tensors, of an adapter without its base."""
        state: dict[str, Tensor] = self.policy.state_dict(keep_vars=True)
        if not isinstance(self.policy, PeftModel):
            return state
        trained = {name for name, p in self.policy.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, an engine may run `self.policy` itself, and for as many steps as its own responses need."""
        if distributed.is_sharded(self):
            # an empty forward, for no role: FSDP2 takes what runs first for the root, and that must not be a layer
            self(None, 1.0, ())
        with distributed.whole(self, self.policy), torch.compiler.set_stance("force_eager"):
            yield

    def trained_adapters(self, model: PeftModel) -> list[str]:
        """Those of a backbone's adapters that are trained."""
        return [name for name in (ADAPTERS["policy"], ADAPTERS["value"]) if name in model.peft_config]


def _is_value(name: str) -> bool:
    """Is this parameter the value model's: its own trunk, its head, or the adapter called "value"?"""
    return name.startswith(("value.", "value_head.")) or adapter_of(name) == ADAPTERS["value"]
