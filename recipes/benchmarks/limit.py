"""Count the least time that one PPO update can take on a machine.

Floating-point operations of matrix products and of attention over the machine's measured GEMM peak, plus bytes over
its measured bandwidth, phase by phase, for the algorithm that ours runs. Left out, so that the limit stays below what
any program can reach: norms, activations, softmax, sampling, padding, the traffic of activations and logits.

Counted: one multiply-add is 2 operations. A matrix product with P weights costs 2 P per token forward, 2 P more
backward for the gradient of its input and 2 P for that of its weights (which a frozen base under LoRA does not need).
Attention is causal: token i meets i keys. The head runs at response positions only. Bytes: the weights, read once per
decoding step and once per pass; the key-value cache, read at every decoding step; Adam's four numbers per trained
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from cases import Case

ValueModel = Literal["separate", "adapter", "shared_trunk"]
ADAM_BYTES = 8 * 4
"""Per trained float32 weight and step: gradient read for its norm; weight, gradient and both moments read; weight and
both moments written."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Describe a decoder with gated MLPs (Llama and similar), by the names of its configuration."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> Sizes:
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of one layer's products: query, key, value, output, gate, up, down."""
        h, i, q, k = self.hidden_size, self.intermediate_size, self.query_width, self.key_width
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]

    @property
    def trunk_weights(self) -> int:
        return self.num_hidden_layers * sum(a * b for a, b in self.matrices)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    def adapter_weights(self, rank: int) -> int:
        return self.num_hidden_layers * sum(rank * (a + b) for a, b in self.matrices)


@dataclass(frozen=True)
class Work:
    """Hold floating-point operations and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return self.flops / flops_per_second + self.bytes / bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Update:
    """Describe one PPO update: its lengths, and how its models are made."""

    sizes: Sizes
    prompts: Sequence[int]  # tokens of every prompt
    responses: Sequence[int]  # tokens of every response
    inner_epochs: int
    minibatches: int
    lora_rank: int = 0  # 0: all weights are trained
    value_model: ValueModel = "separate"
    trunk_bytes: float = 4  # of a stored weight of the layers: 2 in bfloat16, a half in four bits
    head_bytes: int = 4  # of one of the head, which is never in four bits
    cache_bytes: int = 4  # of a number in the key-value cache

    @property
    def lengths(self) -> list[int]:
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    def read(self, trunks: int, heads: int) -> float:
        """Return the bytes of so many trunks' and heads' weights."""
        return trunks * self.sizes.trunk_weights * self.trunk_bytes + heads * self.sizes.head_weights * self.head_bytes

    @property
    def trained_weights(self) -> int:
        """Return the trained weights of policy and value model together; a full model's embeddings are its head."""
        s, trunks = self.sizes, 1 if self.value_model == "shared_trunk" else 2
        if self.lora_rank:
            return trunks * s.adapter_weights(self.lora_rank)
        return trunks * (s.trunk_weights + s.head_weights)


def update_of(settings: dict[str, Any], case: Case, sizes: Sizes) -> Update:
    """Describe one of our runs' updates: a case, with these settings."""
    rank, half = settings.get("lora_rank", 0), bool(settings.get("bf16"))
    stored = 2 if half and rank else 4  # what is trained whole stays in float32
    return Update(
        sizes=sizes,
        prompts=case.prompt_lengths,
        responses=[case.new_tokens] * case.rollout_size,
        inner_epochs=case.inner_epochs,
        minibatches=case.minibatches,
        lora_rank=rank,
        value_model=settings.get("value_model", "adapter" if rank else "separate"),
        trunk_bytes=0.5 if settings.get("load_in_4bit") else stored,
        head_bytes=stored,
        cache_bytes=2 if half else 4,
    )


def causal_pairs(lengths: Sequence[int]) -> int:
    """Return the query-key pairs of causal attention: 1 + 2 + ... + n for every row."""
    return sum(n * (n + 1) // 2 for n in lengths)


def attention_flops(sizes: Sizes, pairs: int) -> int:
    """Return the operations of attention scores and their weighted sum in all layers: 2 + 2 per pair and channel."""
    return 4 * sizes.num_hidden_layers * sizes.query_width * pairs


def trunk_forward(sizes: Sizes, lengths: Sequence[int], lora_rank: int = 0) -> int:
    """Return the operations of a forward pass through all layers, without the head."""
    weights = sizes.trunk_weights + sizes.adapter_weights(lora_rank)
    return 2 * weights * sum(lengths) + attention_flops(sizes, causal_pairs(lengths))


def trunk_backward(sizes: Sizes, lengths: Sequence[int], lora_rank: int = 0) -> int:
    """Return the operations of its backward pass: gradients of inputs and weights; with LoRA, of inputs and adapter
    weights.

    Attention has two products forward and four backward. Under LoRA nothing is trained below the first layer's query,
    key and value: their inputs need no gradient."""
    s = sizes
    if lora_rank:
        per_token = 2 * s.trunk_weights + 4 * s.adapter_weights(lora_rank)
        per_token -= 2 * sum(a * b + lora_rank * a for a, b in s.matrices[:3])
    else:
        per_token = 4 * s.trunk_weights
    return per_token * sum(lengths) + 2 * attention_flops(s, causal_pairs(lengths))


def head_forward(sizes: Sizes, tokens: int) -> int:
    return 2 * sizes.head_weights * tokens


def generate(update: Update) -> Work:
    """Count the prompts in one pass, then one token per response and step; the merged adapter costs nothing."""
    s, rows = update.sizes, list(zip(update.prompts, update.responses, strict=True))
    flops = trunk_forward(s, update.prompts) + head_forward(s, sum(update.responses))
    flops += 2 * s.trunk_weights * sum(r - 1 for _, r in rows)
    pairs = sum(p * (r - 1) + r * (r - 1) // 2 for p, r in rows)  # token p + t meets p + t keys, t = 1 ... r - 1
    flops += attention_flops(s, pairs)
    weights = update.read(trunks=1, heads=1) * max(update.responses)
    cache = 2 * s.num_hidden_layers * s.key_width * update.cache_bytes * pairs
    return Work(flops, weights + cache)


def score(update: Update) -> Work:
    """Count one forward of the reward model over prompts and responses."""
    s = update.sizes
    return Work(trunk_forward(s, update.lengths, update.lora_rank), update.read(trunks=1, heads=0))


def logprobs(update: Update) -> Work:
    """Count policy, reference and value model over prompts and responses, and the first two's head at response
    tokens."""
    s, trunks = update.sizes, 2 if update.value_model == "shared_trunk" else 3
    forward = trunk_forward(s, update.lengths, update.lora_rank)
    flops = trunks * forward + 2 * head_forward(s, sum(update.responses))
    return Work(flops, update.read(trunks, heads=2))


def update_phase(update: Update) -> Work:
    """Count the inner epochs: forward and backward of policy and value model, and Adam's steps."""
    s, rank, tokens = update.sizes, update.lora_rank, sum(update.responses)
    trunks = 1 if update.value_model == "shared_trunk" else 2
    trunk = trunk_forward(s, update.lengths, rank) + trunk_backward(s, update.lengths, rank)
    head = head_forward(s, tokens) * (2 if rank else 3)  # forward, gradients of input (and weights)
    passes = 2 * update.read(trunks, heads=1)
    step = passes + update.trained_weights * ADAM_BYTES
    return Work(trunks * trunk + head, step * update.minibatches) * update.inner_epochs


PHASES = {"generate": generate, "score": score, "logprobs": logprobs, "update": update_phase}


def count(update: Update) -> dict[str, Work]:
    """Return the work by phase, and under `step` their sum."""
    phases = {name: function(update) for name, function in PHASES.items()}
    return phases | {"step": sum(phases.values(), Work())}
