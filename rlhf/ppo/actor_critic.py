"""Policy, reference and value model as one module, on one backbone (LoRA adapters) or on three.

accelerate prepares this one module, and the trainer calls only its `forward`, which returns log-probabilities,
entropy and values: so DDP's hooks and the gathering of sharded parameters are never bypassed.
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

from rlhf.errors import InputError
from rlhf.models import packing
from rlhf.models.adapters import active_adapter, adapter_of
from rlhf.models.forward import hidden_logprobs, response_hidden
from rlhf.padding import Batch
from rlhf.run import distributed
from rlhf.run.strategy import layer_classes
from rlhf.sampling.engine import Engine, Gatherer

Role = Literal["policy", "reference", "value"]
ADAPTERS = {"policy": "default", "reference": "reference", "value": "value"}


NOT_ASKED = torch.empty(0)


class Outputs(NamedTuple):
    """The outputs of `ActorCritic`: [B, T] each, 0 on padding, empty for a role that was not requested."""

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
        self.shared_trunk = shared_trunk  # the value head reads the policy's own hidden states
        self.policy: Any = policy
        self.reference = reference  # None: the adapter "reference" on the policy's backbone
        self.value = value  # None: the adapter "value" on the policy's backbone, or the policy itself
        self.value_head = head
        self.packable: bool | None = None  # whether all models compute packed rows alike; None: not asked yet
        self.packs = False  # True: rows of different lengths are computed as one long row (`packing.choose`)
        # accelerate's FSDP2 reads a module's layer classes from this attribute
        self._no_split_modules = layer_classes(self.parts())

    def parts(self) -> list[Any]:
        """Return the models that there are."""
        return [part for part in (self.policy, self.reference, self.value) if part is not None]

    def forward(self, batch: Batch, temperature: float, roles: Sequence[Role] = ("policy", "value")) -> Outputs:
        """Run the models in `roles` on a batch; every logit is divided by `temperature`."""
        outputs: dict[str, Tensor] = {}
        together = self.shared_trunk and {"policy", "value"} <= set(roles)
        for role in roles:
            if role == "value" and together:
                continue  # the policy's forward computes the values too
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
        with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16 a value would keep only three digits
            weight, bias = self.value_head.weight.float(), self.value_head.bias.float()  # FSDP2 holds them in bfloat16
            values = nn.functional.linear(hidden.float(), weight, bias).squeeze(-1)
        return torch.where(batch.mask, values, 0.0)

    @contextmanager
    def active(self, role: Role) -> Iterator[Any]:
        """Yield the model of a role, with its adapter switched on where the backbone is shared."""
        model = {"policy": self.policy, "reference": self.reference, "value": self.value}[role]
        if model is not None and not (role == "policy" and isinstance(model, PeftModel)):
            yield model  # a separate model; a reference that the user passed may itself be an adapter
            return
        model = self.policy if model is None else model
        if not isinstance(model, PeftModel):  # a policy trained in full, whose trunk may carry the value head
            yield model
            return
        adapter = ADAPTERS["policy" if self.shared_trunk and role == "value" else role]
        with active_adapter(model, adapter, self.trained_adapters(model)):
            yield model

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the policy."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not _is_value(name)]

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the value model; on a shared trunk, the head's."""
        return [p for name, p in self.named_parameters() if p.requires_grad and _is_value(name)]

    def most_tokens(self, wanted: int) -> int:
        """Return the token limit of a micro-batch: `wanted`, and for packed rows at most `packing.most_tokens`.

        A longer micro-batch would be padded, and the plan of packed rows does not count padding."""
        return min([wanted, *map(packing.most_tokens, self.parts())]) if self.packs else wanted

    def backward_roles(self, prepared: nn.Module) -> list[tuple[Role, ...]]:
        """Return the roles of each backward pass: one pass per model if they share no trained weights.

        prepared: what accelerate made of this module. DDP, which may wrap it for one process too, needs one backward
        of the whole module; FSDP2, which shards it in place, gathers each layer once for one."""
        separate = prepared is self and not distributed.is_sharded(self) and not self.shared_trunk
        return [("policy",), ("value",)] if separate else [("policy", "value")]

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters whose gradient norm is clipped together, by metric name.

        Policy and value model are clipped separately unless they share a trunk."""
        if self.shared_trunk:
            return {"policy_grad_norm": self.policy_parameters() + self.value_parameters()}
        return {"policy_grad_norm": self.policy_parameters(), "value_grad_norm": self.value_parameters()}

    def trained_state(self) -> dict[str, Tensor]:
        """Return every trained tensor by name, for a checkpoint; frozen tensors are left out.

        With sharded parameters all processes must call it, and only the first gets the tensors.
        """
        return distributed.trained(self)

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what `trained_state` returned; every process passes whole tensors and keeps its part if sharded.

        Raises InputError if the names of the trained tensors differ."""
        own = {name for name, p in self.named_parameters() if p.requires_grad}
        if own != state.keys():
            raise InputError(f"checkpoint: trained tensors differ, first {sorted(own ^ state.keys())[0]}")
        distributed.load_trained(self, state)

    def save_policy(self, folder: str | Path) -> None:
        """Save the policy alone, as transformers or peft would.

        With sharded parameters all processes must call it, and only the first writes.
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
        """Return the policy's tensors by name; for an adapter, without those of its base."""
        state: dict[str, Tensor] = self.policy.state_dict(keep_vars=True)
        if not isinstance(self.policy, PeftModel):
            return state
        trained = {name for name, p in self.policy.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let an engine run `self.policy` directly inside the context, a different number of steps on each process."""
        with self._ready(), distributed.whole(self, self.policy):
            yield

    @contextmanager
    def lent_to(self, engine: Engine) -> Iterator[None]:
        """Let an engine use `self.policy` inside the context: whole, or in parts where it gathers them itself."""
        if not (isinstance(engine, Gatherer) and engine.gathers):
            with self.sampling():
                yield
            return
        with self._ready(), distributed.in_parts(self):
            yield

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Let the three models run forwards of their own inside the context: the same ones on all processes, since
        sharded layers are gathered for each."""
        self._begin()
        with distributed.in_parts(self):
            yield

    def _begin(self) -> None:
        """Run a forward for no role: FSDP2 takes the first module that runs for the root, which must not be a layer."""
        if distributed.is_sharded(self):
            self(None, 1.0, ())

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Let the policy decode inside the context, without torch.compile."""
        self._begin()
        with torch.compiler.set_stance("force_eager"), packing.decoding(self.policy):
            yield

    def trained_adapters(self, model: PeftModel) -> list[str]:
        """Return the names of a backbone's trained adapters."""
        return [name for name in (ADAPTERS["policy"], ADAPTERS["value"]) if name in model.peft_config]


def _is_value(name: str) -> bool:
    """Return whether a parameter belongs to the value model: its own trunk, its head, or the adapter "value"."""
    return name.startswith(("value.", "value_head.")) or adapter_of(name) == ADAPTERS["value"]
