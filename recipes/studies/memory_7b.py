"""Count the memory of a 7B run: the tables of recipes/guides/model_7b.md.

    python recipes/studies/memory_7b.py                               # prints them
    python recipes/studies/memory_7b.py recipes/guides/model_7b.md    # rewrites them there

Nothing here was measured on a GPU. Parameters and adapters are exact; activations are what autograd keeps of a Qwen2
layer (transformers 5.23, peft 0.21, bfloat16 autocast, attention that keeps no scores). GB are 10^9 bytes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

TRAINED, GRADIENT = 12, 4
"""Bytes per trained parameter: float32 weight and Adam's two moments, held all the time; its gradient, there in the
update alone."""
QUANTIZED = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes per weight of a linear layer in 4 bits (NF4, double quantization): a byte more per block of 64, and a float32
per 256 blocks. The rest stays in bfloat16."""
HEAD_LOGITS = 2**26
"""Logits that exist at once on a GPU (rlhf/models/forward.py); each is there in bfloat16 and twice in float32."""


@dataclass(frozen=True)
class Shape:
    """Describe a decoder with gated MLPs and biases on query, key and value, as Qwen2 has them; heads not tied."""

    hidden: int
    layers: int
    key_value: int
    intermediate: int
    vocabulary: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: query, key, value, output, gate, up, down."""
        h, kv, i = self.hidden, self.key_value, self.intermediate
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def trunk(self) -> int:
        """Return the parameters without the language head."""
        layer = sum(a * b for a, b in self.linear) + (self.hidden + 2 * self.key_value) + 2 * self.hidden
        return self.embeddings + self.layers * layer + self.hidden

    @property
    def whole(self) -> int:
        """Return all parameters."""
        return self.trunk + self.embeddings

    @property
    def embeddings(self) -> int:
        """Return the parameters of the embeddings, as many as the language head has."""
        return self.vocabulary * self.hidden

    @property
    def quantized_bytes(self) -> float:
        """Return the bytes of the whole model with its linear layers in 4 bits."""
        linear = self.layers * sum(a * b for a, b in self.linear)
        return QUANTIZED * linear + 2 * (self.whole - linear)

    def lora(self, rank: int) -> int:
        """Return the parameters of an adapter on every linear layer."""
        return self.layers * rank * sum(a + b for a, b in self.linear)

    def cache(self, tokens: int) -> int:
        """Return the bytes of keys and values in bfloat16."""
        return tokens * self.layers * 2 * self.key_value * 2

    def layer(self, tokens: int, rank: int) -> int:
        """Return the bytes that a layer's forward keeps for backward; without gradients, taken for its peak."""
        return tokens * (8 * self.intermediate + 24 * self.hidden + 4 * self.key_value + 14 * rank)

    def recomputed(self, tokens: int, rank: int, hidden_bytes: int = 2) -> int:
        """Return the bytes of activations with gradient checkpointing: every layer's input; one layer's own, and its
        gradients."""
        return tokens * self.layers * self.hidden * hidden_bytes + 2 * self.layer(tokens, rank)

    def kept(self, tokens: int, rank: int) -> int:
        """Return the bytes of activations without it: every layer's own."""
        return self.layers * self.layer(tokens, rank)


QWEN_7B = Shape(hidden=3584, layers=28, key_value=512, intermediate=18944, vocabulary=152064)


@dataclass(frozen=True)
class Plan:
    """Hold the settings that decide memory."""

    rank: int
    prompt_tokens: int
    new_tokens: int
    generation_batch: int
    microbatch_tokens: int


PLAN = Plan(rank=64, prompt_tokens=512, new_tokens=512, generation_batch=64, microbatch_tokens=8192)
Rows = list[tuple[str, str, float]]
"""What, by which formula, bytes."""


def head() -> float:
    return HEAD_LOGITS * (2 + 4 + 4)


def sampling(shape: Shape, plan: Plan) -> float:
    """Count the cache of a whole batch, its prompts' forward, and probabilities."""
    rows, tokens = plan.generation_batch, plan.prompt_tokens + plan.new_tokens
    return shape.cache(rows * tokens) + shape.layer(rows * plan.prompt_tokens, plan.rank) + rows * shape.vocabulary * 12


def lora_ppo(shape: Shape, plan: Plan) -> Rows:
    """Count PPO with adapters on one base, one process."""
    adapter, tokens = shape.lora(plan.rank), plan.microbatch_tokens
    return [
        ("the base, in bfloat16", "2 P", 2 * shape.whole),
        ("policy and value adapter, trained", "2 x 12 L", 2 * TRAINED * adapter),
        ("reference and reward model adapter, frozen, float32", "2 x 4 L", 2 * 4 * adapter),
        ("**held all the time**", "", 2 * shape.whole + (2 * TRAINED + 8) * adapter),
        ("while it samples: cache, prompts, probabilities", "B (m + n) c + B m a", sampling(shape, plan)),
        ("while it scores: one layer at a time", "T a", shape.layer(tokens, plan.rank)),
        (
            "in the update: gradients, recomputed activations, logits", "2 x 4 L + T (2 h l + 2 a) + head",
            2 * GRADIENT * adapter + shape.recomputed(tokens, plan.rank) + head(),
        ),
    ]  # fmt: skip


def stages(shape: Shape, plan: Plan) -> Rows:
    """Return the peak of each stage under LoRA on one card, 8,192 tokens per forward."""
    adapter, tokens = (TRAINED + GRADIENT) * shape.lora(plan.rank), 8192
    fine_tuning = 2 * shape.whole + adapter + shape.recomputed(tokens, plan.rank) + head()
    reward_model = 4 * shape.trunk + adapter + shape.recomputed(tokens, plan.rank, hidden_bytes=4)
    *_, (_, _, held), (_, _, sampled), _, (_, _, updated) = lora_ppo(shape, plan)
    both = held + updated + shape.recomputed(tokens, plan.rank)
    models = (
        4 * shape.whole + 2 * shape.trunk + 3 * 4 * shape.lora(plan.rank)
    )  # policy, baseline, judge, each on its own
    drawn = sampling(shape, replace(plan, generation_batch=256, prompt_tokens=256, new_tokens=256))
    return [
        ("fine-tuning", "2 P + 16 L + activations", fine_tuning),
        ("reward model: its frozen trunk is float32", "4 P' + 16 L + activations", reward_model),
        ("PPO at its start: the reward model's own trunk, until it is shared", "+ 2 P'", held + 2 * shape.trunk),
        ("PPO while it samples", "", held + sampled),
        ("PPO in the update", "", held + updated),
        ("PPO in the update, DDP: both models in one backward", "", both),
        (
            "evaluation: three models, 256 rows of 256 + 256 tokens at once",
            "4 P + 2 P' + 12 L + sampling",
            models + drawn,
        ),
    ]


def choices(shape: Shape, plan: Plan) -> str:
    """Return the peaks of PPO on one card for other settings."""
    held, gradients = lora_ppo(shape, plan)[3][2], 2 * GRADIENT * shape.lora(plan.rank)
    lines = ["| setting | peak, GB |", "|---|---|"]
    for rows in (64, 128, 192):
        size = held + sampling(shape, replace(plan, generation_batch=rows))
        lines.append(f"| `generation_batch_size: {rows}`, while it samples | {size / 1e9:.1f} |")
    for checkpointing, tokens in (("true", 8192), ("true", 16384), ("true", 32768), ("false", 4096), ("false", 8192)):
        activations = shape.recomputed if checkpointing == "true" else shape.kept
        size = held + gradients + activations(tokens, plan.rank) + head()
        settings = f"`tokens_per_microbatch: {tokens}`, `gradient_checkpointing: {checkpointing}`"
        lines.append(f"| {settings}, in the update | {size / 1e9:.1f} |")
    return "\n".join(lines)


def full_ppo(shape: Shape, plan: Plan, cards: int) -> Rows:
    """Count a card's share of PPO with full weights under FSDP2.

    Embeddings and heads of the three models (five matrices: the value model has no language head) are one unit, the
    root's own: cut, and gathered, together."""
    parts = [TRAINED * shape.whole / cards, TRAINED * shape.trunk / cards, 4 * shape.whole / cards, 2 * shape.trunk]
    held, vocabulary = sum(parts), shape.embeddings
    sampled = held + sharded_sampling(shape, plan)
    updated = held + sharded_update(shape, plan, cards)
    start = 4 * (2 * shape.whole + shape.trunk) / cards + 2 * shape.trunk + 4 * 5 * vocabulary
    return [
        ("policy, trained", "12 P / 8", parts[0]),
        ("value model, trained", "12 P' / 8", parts[1]),
        ("reference, float32", "4 P / 8", parts[2]),
        ("reward model, whole, bfloat16", "2 P'", parts[3]),
        ("**held all the time**", "", held),
        (
            "peak while it samples: the policy whole in bfloat16, and the others' embeddings and heads",
            "+ 2 P + 2 x 3 V h + as above", sampled,
        ),
        (
            "peak in the update: gradients, both models' activations; whole are two layers, embeddings and heads", "",
            updated,
        ),
        (
            "at its start: weights cut, embeddings and heads about to be", "(8 P + 4 P') / 8 + 2 P' + 4 x 5 V h",
            start,
        ),
    ]  # fmt: skip


def sharded_sampling(shape: Shape, plan: Plan) -> float:
    """Count what a card needs besides while it samples under FSDP2."""
    return 2 * (shape.whole + 3 * shape.embeddings) + sampling(shape, replace(plan, rank=0))


def sharded_update(shape: Shape, plan: Plan, cards: int) -> float:
    """Count what a card needs besides in an update under FSDP2: its part of the gradients, both models' activations,
    two layers whole in bfloat16; so all embeddings and heads, and the gradients of the trained three of these five."""
    whole = 2 * 2 * shape.whole / shape.layers + 2 * (5 + 3) * shape.embeddings
    gradients = GRADIENT * (shape.whole + shape.trunk) / cards
    return gradients + 2 * shape.recomputed(plan.microbatch_tokens, 0) + whole + head()


@dataclass(frozen=True)
class Card:
    """Hold the bytes of each part of PPO on one card."""

    base: float  # frozen weights that policy, value model and reference share
    policy: float  # trained weights, Adam's moments
    value: float
    reference: float
    reward_model: float
    sampling: float  # beside what is held
    update: float

    @property
    def held(self) -> float:
        return self.base + self.policy + self.value + self.reference + self.reward_model

    @property
    def peak(self) -> float:
        return self.held + max(self.sampling, self.update)


def cards(shape: Shape, plan: Plan) -> dict[str, Card]:
    """Count one card of each way to train: LoRA and QLoRA on one card and on eight (DDP; under FSDP2 weights in 4 bits
    are refused), full weights on one and on eight (FSDP2)."""
    adapter, tokens, full = shape.lora(plan.rank), plan.microbatch_tokens, replace(plan, rank=0)
    gradients = 2 * GRADIENT * adapter
    lora = Card(
        base=2 * shape.whole, policy=TRAINED * adapter, value=TRAINED * adapter, reference=4 * adapter,
        reward_model=4 * adapter, sampling=sampling(shape, plan),
        update=gradients + shape.recomputed(tokens, plan.rank) + head(),
    )  # fmt: skip
    unpacked = 2 * max(a * b for a, b in shape.linear)  # one layer's weights at a time, in bfloat16
    qlora = replace(
        lora, base=shape.quantized_bytes, reward_model=2 * shape.trunk + 4 * adapter,
        sampling=lora.sampling + unpacked, update=lora.update + unpacked,
    )  # fmt: skip
    whole = Card(
        base=0, policy=TRAINED * shape.whole, value=TRAINED * shape.trunk, reference=4 * shape.whole,
        reward_model=2 * shape.trunk, sampling=2 * shape.whole + sampling(shape, full),
        update=GRADIENT * (shape.whole + shape.trunk) + shape.recomputed(tokens, 0) + 2 * shape.whole + head(),
    )  # fmt: skip
    eighth = replace(
        whole, policy=whole.policy / 8, value=whole.value / 8, reference=whole.reference / 8,
        sampling=sharded_sampling(shape, plan), update=sharded_update(shape, plan, 8),
    )  # fmt: skip
    second = shape.recomputed(tokens, plan.rank)  # DDP wants one backward: both models' activations at once
    return {
        "LoRA, 1 card": lora, "QLoRA, 1 card": qlora, "full, 1 card": whole,
        "LoRA, 8 cards (DDP)": replace(lora, update=lora.update + second),
        "QLoRA, 8 cards (DDP)": replace(qlora, update=qlora.update + second),
        "full, 8 cards (FSDP2)": eighth,
    }  # fmt: skip


def ways(shape: Shape, plan: Plan, memory: float = 80e9) -> str:
    """Return the table of `cards`: GB of each part on one card, and whether a card of `memory` bytes holds them with a
    tenth to spare."""
    counted = cards(shape, plan)
    lines = ["| GB on each card | " + " | ".join(counted) + " |", "|---" * (len(counted) + 1) + "|"]
    parts = {
        "frozen base": "base", "policy, trained": "policy", "value model, trained": "value", "reference": "reference",
        "reward model": "reward_model", "**held all the time**": "held", "while it samples, besides": "sampling",
        "in the update, besides": "update", "**peak**": "peak",
    }  # fmt: skip
    for what, name in parts.items():
        sizes = (getattr(card, name) for card in counted.values())
        lines.append(f"| {what} | " + " | ".join(f"{size / 1e9:.1f}" if size else "-" for size in sizes) + " |")
    fits = ("yes" if card.peak <= 0.9 * memory else "no" for card in counted.values())
    return "\n".join([*lines, f"| fits {memory / 1e9:.0f} GB | " + " | ".join(fits) + " |"])


def table(rows: Rows) -> str:
    lines = ["| what | bytes | GB |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {formula} | {size / 1e9:.1f} |" for what, formula, size in rows)])


def tables(shape: Shape = QWEN_7B, plan: Plan = PLAN) -> dict[str, str]:
    """Return every table by its mark in the guide."""
    return {
        "ways": ways(shape, plan),
        "ppo": table(lora_ppo(shape, plan)),
        "stages": table(stages(shape, plan)),
        "choices": choices(shape, plan),
        "eight": table(full_ppo(shape, plan, 8)),
    }


def written(text: str) -> str:
    """Return a guide's text with its tables made anew, each between `<!-- counted: NAME -->` and `<!-- end of NAME
    -->`."""
    for name, content in tables().items():
        begin, end = f"<!-- counted: {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str]) -> None:
    if argv:
        path = Path(argv[0])
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, content in tables().items():
        print(f"{name}\n\n{content}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
