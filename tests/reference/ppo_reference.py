"""PPO once more, whole: from folders of weights and given responses to trained weights, in plain torch and float64.

Written from the papers (1707.06347, 1506.02438, 1909.08593, 2009.01325, 2203.02155, 2403.17031; Adam 1412.6980, LoRA
2106.09685, Llama 2302.13971) and the conventions that `rlhf/ppo/math.py` documents; nothing of rlhf, transformers or
peft runs here. Every response is computed alone: no padding, no mask, no micro-batch, no adapter that is switched.
What a run draws (prompts, responses, the rows of each minibatch) is given; all else is computed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """What one update draws. minibatches: of each inner epoch, the rows of each optimizer step."""

    prompts: list[list[int]]
    responses: list[list[int]]
    stopped: list[bool]
    minibatches: list[list[list[int]]]


def llama(weights: Mapping[str, Tensor], config: Mapping[str, Any], ids: list[int]) -> Tensor:
    """Compute the last hidden states [T, H] of one row."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    x, heads = weights["model.embed_tokens.weight"][ids], config["num_attention_heads"]
    half = x.shape[1] // heads // 2
    rates = torch.tensor([config["rope_parameters"]["rope_theta"] ** (-i / half) for i in range(half)]).double()
    cos, sin = (torch.arange(len(ids))[:, None] * rates).cos(), (torch.arange(len(ids))[:, None] * rates).sin()
    later = torch.ones(len(ids), len(ids)).triu(1).bool()

    def turned(y: Tensor) -> Tensor:
        one, two = y[..., :half], y[..., half:]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    for layer in (f"model.layers.{n}" for n in range(config["num_hidden_layers"])):
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(h, f"{layer}.self_attn.{part}_proj").view(len(ids), heads, -1).transpose(0, 1) for part in "qkv"
        )
        shares = (turned(q) @ turned(k).mT / math.sqrt(2 * half)).masked_fill(later, -math.inf).softmax(-1)
        x = x + linear((shares @ v).transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm")


class Model:
    """A folder's Llama: what is trained (every weight, or LoRA's factors over frozen ones) and a scalar head.

    The head is the folder's, in units of its score normaliser; zero where it has none."""

    def __init__(self, folder: str | Path):
        base, files = Path(folder), ["model.safetensors"]
        if (base / "adapter_config.json").is_file():
            lora = json.loads((base / "adapter_config.json").read_text())
            base, self.scale = Path(lora["base_model_name_or_path"]), lora["lora_alpha"] / lora["r"]
            files = ["adapter_model.safetensors"]
        self.frozen = _read(base / "model.safetensors") if files != ["model.safetensors"] else {}
        self.trained = _read(Path(folder, *files))
        self.config = json.loads((base / "config.json").read_text())
        self.head, self.bias = torch.zeros(1, self.config["hidden_size"]).double(), torch.zeros(1).double()
        if "score.weight" in self.trained:
            normalizer = json.loads(Path(folder, "score_normalizer.json").read_text())
            self.head = self.trained.pop("score.weight") / normalizer["std"]
            self.bias -= normalizer["mean"] / normalizer["std"]
        for tensor in (*self.trained.values(), self.head, self.bias):
            tensor.requires_grad_()

    def states(self, ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hidden states and the weights they were computed with, LoRA's products added."""
        weights = self.frozen | self.trained
        for name in [name for name in self.trained if name.endswith(".lora_A.weight")]:
            up = self.trained[name.replace("lora_A", "lora_B")]
            module = name.replace(".lora_A.weight", ".weight")
            weights[module] = weights[module] + self.scale * up @ self.trained[name]
        return llama(weights, self.config, ids), weights

    def logprobs(self, prompt: list[int], response: list[int], temperature: float) -> Tensor:
        """Return log p(token | all before it) of the response's tokens."""
        states, weights = self.states(prompt + response)
        output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        logits = states[len(prompt) - 1 : -1] @ output.T / temperature
        return logits.log_softmax(-1)[range(len(response)), response]

    def values(self, prompt: list[int], response: list[int]) -> Tensor:
        """Return the value of the state before each of the response's tokens."""
        return (self.states(prompt + response)[0][len(prompt) - 1 : -1] @ self.head.T + self.bias)[:, 0]

    def score(self, ids: list[int]) -> float:
        """Return the normalised score of a whole conversation."""
        return float(self.states(ids)[0][-1] @ self.head[0] + self.bias)


def _read(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): weight.double() for name, weight in load_file(file).items()}


class Adam:
    """Adam with decoupled weight decay (1711.05101)."""

    def __init__(self, tensors: list[Tensor], args: Any):
        self.tensors, self.args, self.steps = tensors, args, 0
        self.first, self.second = [torch.zeros_like(p) for p in tensors], [torch.zeros_like(p) for p in tensors]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        one, two = self.args.adam_beta1, self.args.adam_beta2
        for p, m, v in zip(self.tensors, self.first, self.second, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            m += (1 - one) * (gradient - m)
            v += (1 - two) * (gradient**2 - v)
            size = (v / (1 - two**self.steps)).sqrt() + self.args.adam_epsilon
            p -= rate * (m / (1 - one**self.steps) / size + self.args.weight_decay * p)


@torch.no_grad()
def clip(tensors: list[Tensor], limit: float) -> None:
    """Scale gradients down to a norm of `limit` together."""
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in tensors if p.grad is not None))
    for p in tensors:
        if p.grad is not None:
            p.grad *= min(1.0, limit / norm)


def moments(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation of all numbers."""
    return torch.cat(list(rows)).mean(), (torch.cat(list(rows)).var(correction=0) + 1e-8).sqrt()


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Sum the discounted differences of one response; the value after its last token is 0."""
    deltas = rewards + gamma * torch.cat([values[1:], torch.zeros(1).double()]) - values
    powers = (gamma * lam) ** torch.arange(len(deltas)).double()
    return torch.stack([(powers[: len(deltas) - t] * deltas[t:]).sum() for t in range(len(deltas))])


def train(
    policy: Model, critic: Model, score: Callable[[list[int], list[int]], float], args: Any, drawn: Sequence[Drawn]
) -> list[dict[str, float]]:
    """Train both in place, one update per item of `drawn`; return each update's score, KL and coefficient.

    critic: the policy itself where the value head reads its trunk. args: settings by PPOConfig's names."""
    reference, shared = copy.deepcopy(policy), critic is policy
    groups = [list(policy.trained.values()), [critic.head, critic.bias, *({} if shared else critic.trained).values()]]
    together = [[*groups[0], *groups[1]]] if shared else groups
    optimizers = [Adam(group, args) for group in groups]
    kl_coef, seen, log = args.kl_coef, [], []
    for number, now in enumerate(drawn):
        rows = list(zip(now.prompts, now.responses, strict=True))
        with torch.no_grad():
            old = [policy.logprobs(*row, args.temperature) for row in rows]
            kl = [mine - reference.logprobs(*row, args.temperature) for mine, row in zip(old, rows, strict=True)]
            values = [critic.values(*row) for row in rows]
            seen.append(torch.tensor([score(*row) for row in rows]).double())
        kl_nats = float(sum(row.sum() for row in kl)) / len(kl)
        log.append({"score": float(seen[-1].mean()), "kl_nats": kl_nats, "kl_coef": kl_coef})
        mean, spread = moments(seen) if args.normalize_scores else (0.0, 1.0)  # of the scores of all updates so far
        scores = (seen[-1] - mean) / spread
        if args.clip_scores is not None:
            scores = scores.clamp(-args.clip_scores, args.clip_scores)
        penalty = args.missing_eos_penalty
        without = {"replace": torch.full_like(scores, -penalty), "subtract": scores - penalty, "off": scores}
        scores = torch.where(torch.tensor(now.stopped), scores, without[args.missing_eos])
        rewards = [-kl_coef * row for row in kl]
        for reward, last in zip(rewards, scores, strict=True):
            reward[-1] += last
        if args.rescale_rewards:
            mean, spread = moments(rewards)
            rewards = [(row - mean) / spread + mean for row in rewards]
        advantages = [gae(*row, args.gamma, args.lam) for row in zip(rewards, values, strict=True)]
        returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        mean, spread = moments(advantages)
        advantages = [(row - mean) / spread for row in advantages]
        after = number - args.warmup_updates
        factor = (number + 1) / args.warmup_updates if after < 0 else 1 - after / (args.updates - args.warmup_updates)
        for minibatch in (minibatch for epoch in now.minibatches for minibatch in epoch):
            tokens = sum(len(now.responses[i]) for i in minibatch)
            for i in minibatch:
                ratio = (policy.logprobs(*rows[i], args.temperature) - old[i]).exp()
                near = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
                objective = torch.minimum(ratio * advantages[i], near * advantages[i]).sum() / tokens
                value = critic.values(*rows[i])
                close = values[i] + (value - values[i]).clamp(-args.clip_value, args.clip_value)
                error = torch.maximum((value - returns[i]) ** 2, (close - returns[i]) ** 2).sum() / tokens
                ((args.value_loss_coef if shared else 1.0) * 0.5 * error - objective).backward()
            for group in together:
                clip(group, args.max_grad_norm)
            if number >= args.value_warmup_updates:
                optimizers[0].step(args.learning_rate * factor)
            optimizers[1].step((args.value_learning_rate or args.learning_rate) * factor)
            for p in (*groups[0], *groups[1]):
                p.grad = None
        if args.kl_target_nats is not None and number >= args.value_warmup_updates:
            step = min(max(kl_nats / args.kl_target_nats - 1, -0.2), 0.2)
            kl_coef *= 1 + step * len(rows) / args.kl_horizon
    return log
