"""Preflight checks of the models, on a few rows of the run's own data.

Two ways to compute the same number differ by rounding or by a mistake. `Limits` separates the two: in float32 the
limit is far above rounding and far below the effect of any mistake; in bfloat16, whose rounding moves single
log-probabilities by tenths of a nat, the drift is reported and only an absurd one is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rlhf import chat
from rlhf.models import packing
from rlhf.models.adapters import adapter_of
from rlhf.models.forward import response_logprobs
from rlhf.models.heads import vocabulary_rows
from rlhf.padding import make_batch
from rlhf.ppo.actor_critic import ADAPTERS, ActorCritic
from rlhf.ppo.preflight_trial import Trial, TrialOutputs
from rlhf.ppo.protocol import Trainer
from rlhf.preflight.measure import (
    ROUNDING,
    SHARDED,
    Finding,
    Limits,
    check_gradients,
    drift,
    float32,
    gap,
    is_exact,
    lengthened,
    limits,
    max_positions,
)
from rlhf.run import distributed

TRAINED = (ADAPTERS["policy"], ADAPTERS["value"])


# -- PPO: the weights --------------------------------------------------------------------------------------


def check_stop(trainer: Trainer, own: ActorCritic) -> Finding:
    """Check that the token that ends a turn can be sampled, and that engine and missing-stop rule use the same ids."""
    tokenizer = trainer.processing_class
    with own.sampling():  # a sharded head is whole there
        end, stops, rows = chat.end_of_turn_id(tokenizer), tuple(trainer.stop_ids), vocabulary_rows(own.policy)
    outside = [i for i in stops if not 0 <= i < rows]
    engine = getattr(trainer.engine, "stop_ids", stops)
    if outside or set(engine) != set(stops) or end not in stops:
        what = f"{outside} outside the {rows} logits" if outside else f"the engine's {list(engine)}, end of turn {end}"
        return Finding(
            "stop token",
            f"stop ids {list(stops)}: {what}",
            False,
            "responses would end at one token and be judged unfinished by another",
            "take stop ids from rlhf.sampling.engine.model_stop_ids(model, tokenizer) for engine and trainer alike",
        )
    ids = torch.tensor([min(trainer.prompt_ids[:64], key=len)], device=trainer.device)
    with torch.no_grad(), own.sampling(), own.active("policy") as policy, trainer.accelerator.autocast():
        logit = float(policy(input_ids=ids, use_cache=False).logits[0, -1, end])
    return Finding(
        "stop token",
        f"logit of end of turn {end} is {logit:.3g} after a prompt",
        -1e4 < logit < float("inf"),
        "the model masks the token that ends a turn, so no response can stop",
        "take the mask off, or use a chat template that ends turns with another token",
    )


def check_reference(own: ActorCritic) -> Finding:
    """Check that nothing of the reference is trained: no gradient, no shared storage, no unfrozen adapter."""
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    if own.reference is None:
        # The reference uses the policy's base, so only the policy's and the value model's adapters may be trained.
        free = [n for n, p in trained.items() if n.startswith("policy.") and adapter_of(n) not in TRAINED]
        held = [p for n, p in own.policy.named_parameters() if adapter_of(n) == ADAPTERS["reference"]]
    else:
        free = [name for name in trained if name.startswith("reference.")]
        held = list(own.reference.parameters())
    moving = list(trained.values())
    if own.reference is not None and not isinstance(own.policy, PeftModel):
        moving += list(own.policy.parameters())
    shared = {_storage(p) for p in held} & {_storage(p) for p in moving} - {None}
    if free or shared:
        return Finding(
            "frozen reference",
            f"{len(free)} of its tensors are trained{f', first {free[0]}' if free else ''}; "
            f"{len(shared)} lie in the policy's memory",
            False,
            "the reference would move with the policy, and the KL would measure nothing",
            "leave ref_model out (the trainer keeps a copy), load it on its own, or give LoRA bias='none'",
        )
    return Finding("frozen reference", f"{len(held)} tensors, none trained, none shared", True)


def _storage(tensor: Tensor) -> int | None:
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().data_ptr() or None


def check_optimizer(own: ActorCritic, groups: list[dict[str, Any]]) -> Finding:
    """Check that the optimizer holds exactly the trainable tensors, for policy and value model, with whole adapters."""
    named = dict(own.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    given = {id(p) for group in groups for p in group["params"]}
    own_adapters = [name for name in named if adapter_of(name) in TRAINED and not name.startswith("reference.")]
    frozen = [name for name in own_adapters if name not in trained]
    groups_of = {"policy": own.policy_parameters(), "value model": own.value_parameters()}
    wrong = [f"{role}: nothing is trainable" for role, parameters in groups_of.items() if not parameters]
    wrong += [f"adapter {name} is frozen" for name in frozen[:1]]
    if not any(hasattr(p, "to_local") for p in named.values()):  # sharded: the optimizer holds pieces
        wrong += [f"{name} is not in the optimizer" for name in sorted(trained) if id(named[name]) not in given][:1]
        wrong += [f"{name} is frozen but in the optimizer" for name in named if name not in trained
                  and id(named[name]) in given][:1]  # fmt: skip
    return Finding(
        "optimizer",
        ", ".join(wrong) or f"{len(trained)} trainable tensors, {len(named) - len(trained)} frozen",
        not wrong,
        "these weights would stay as they are, or move though frozen",
        "set requires_grad before the trainer is built, and load adapters with is_trainable=True",
    )


# -- PPO: a few responses ----------------------------------------------------------------------------------


def check_own_logits(own: ActorCritic, trial: Trial, outputs: TrialOutputs) -> Finding:
    """Compare our log-probabilities with the model's own logits."""
    worst = logits_gap(own, trial.prompt_ids[-1], trial.batch.input_ids.device)
    return Finding(
        "logits",
        f"log-probabilities are {worst:.3g} nats from the model's own",
        worst <= limits(outputs.exact).worst,
        "its family changes logits after the head in a way rlhf.models.heads.logits_function doesn't know",
        "add that change there",
    )


@torch.no_grad()
def logits_gap(own: ActorCritic, prompt_ids: list[int], device: Any) -> float:
    """Return the largest difference in nats between our log-probabilities and those of the model's own logits.

    Measured on the second half of a prompt; 0 for a prompt of one token."""
    half = max(1, len(prompt_ids) // 2)
    if half == len(prompt_ids):
        return 0.0
    batch = make_batch([prompt_ids[:half]], [prompt_ids[half:]], 0, device)
    ours = own(batch, 1.0, ("policy",)).logprobs
    with own.sampling(), own.active("policy") as policy:  # sharded, its parts alone can't run
        logits = policy(input_ids=batch.input_ids, use_cache=False).logits[0, half - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, batch.targets[0][:, None]).squeeze(-1)
    return float((ours[0] - expected).abs().max())


def check_ratio(outputs: TrialOutputs) -> Finding:
    """Check that every token's first ratio is 1 and its value the collected one: to the last bit in float32."""
    old, new = outputs.collected, outputs.trained
    moved = gap(new.logprobs.detach(), old.logprobs, outputs.mask)
    value = gap(new.values.detach(), old.values, outputs.mask)[0]
    exact = outputs.exact
    absurd = moved[0] != 0 or value != 0 if exact else limits(False).refuse(moved)
    return Finding(
        "step-0 ratio",
        f"log-probabilities move by {moved[0]:.3g} nats, values by {value:.3g}, between two forwards of one batch",
        not absurd,
        "something is random (dropout, a router's noise), or training and sampling take different paths",
        "switch it off in the model's configuration: PPO compares a policy with itself",
        note=not exact and moved[0] > 0,
    )


def check_kl(trainer: Trainer, outputs: TrialOutputs) -> Finding:
    """Check that a reference copied from the policy gives KL 0 in float32; for one the user passed, report the KL.

    The KL is 0 to the last bit except in families whose kernels round differently by memory address (Mamba)."""
    apart = gap(outputs.collected.logprobs, outputs.collected.reference_logprobs, outputs.mask)
    given = trainer.reference_given
    wrong = apart[0] != apart[0] or (
        not given and (apart[0] > ROUNDING if outputs.exact else limits(False).refuse(apart))
    )
    return Finding(
        "step-0 KL",
        f"policy and {'given ' if given else ''}reference differ by {apart[0]:.3g} nats per token at most",
        not wrong,
        "the reference is not a copy of the policy as it starts, or something in one of them is random",
        "leave ref_model out and policy weights alone between building the trainer and train()",
        note=apart[0] > 0 and not (given and outputs.exact),
    )


def check_sampled(trainer: Trainer, trial: Trial, outputs: TrialOutputs) -> Finding:
    """Check that tokens were drawn with the log-probabilities that PPO computes, and that stops are recognised."""
    stops, ids = set(trainer.stop_ids), trial.responses.ids
    for row, tokens in enumerate(ids):
        if bool(trial.responses.stopped[row]) != (tokens[-1] in stops) or stops & set(tokens[:-1]):
            return Finding(
                "sampled log-probs",
                f"response {row} ends with token {tokens[-1]} and is marked "
                f"{'stopped' if trial.responses.stopped[row] else 'unfinished'}; stop ids {sorted(stops)}",
                False,
                "the engine stops at other tokens than those of the missing-stop rule",
                "give the engine rlhf.sampling.engine.model_stop_ids(model, tokenizer)",
            )
    if trial.drawn is None:
        engine = type(trainer.engine).__name__
        return Finding("sampled log-probs", f"not measured: {engine} draws tokens elsewhere", True)
    limit, rescored = limits(outputs.exact), outputs.collected.logprobs.cpu()
    apart = [(torch.tensor(row) - rescored[i, : len(row)]).abs() for i, row in enumerate(trial.drawn)]
    every = torch.cat(apart)
    seen = float(every.max()), float(every.mean())
    return Finding(
        "sampled log-probs",
        f"{len(every)} tokens were drawn with log-probabilities {seen[0]:.3g} nats ({seen[1]:.3g} on average) from "
        "those computed afterwards",
        not limit.refuse(seen),
        _why_sampled(apart, limit),
        "sample from the full softmax at args.temperature, with position ids from the attention mask",
    )


def _why_sampled(apart: list[Tensor], limit: Limits) -> str:
    """Name the likely cause of a difference in `check_sampled`.

    Rows are sorted by length, so the last prompt has no padding; a first token is computed without a cache."""
    if float(apart[-1][0]) > limit.worst:
        return "the decode loop draws at another temperature or filters (top-k, top-p, penalties)"
    if float(apart[-1].max()) > limit.worst:
        return "the decode loop's key-value cache gives other states than a whole forward"
    return "padding on the left changes the model's states: it ignores position_ids or the attention mask"


def check_padding(trainer: Trainer, own: ActorCritic, trial: Trial) -> Finding:
    """Check that a row has the same log-probabilities and values alone and beside a much longer row."""
    short, response = trial.prompt_ids[0], trial.responses.ids[0]
    longer = lengthened(trial.prompt_ids[-1], len(short) + len(response), max_positions(own.policy) - len(response))
    with torch.no_grad():
        alone, beside = (
            own(make_batch(prompts, [response] * len(prompts), trainer.pad_id, trainer.device), 1.0)
            for prompts in ([short], [short, longer])
        )
    words, values = gap(beside.logprobs[0], alone.logprobs[0]), gap(beside.values[0], alone.values[0])
    scale = max(1.0, float(alone.values.abs().max()))
    limit = limits(is_exact(trainer.accelerator, own))
    return Finding(
        "padding",
        f"beside a row of {len(longer) + len(response)} tokens, log-probabilities of one of "
        f"{len(short) + len(response)} move by {words[0]:.3g} nats, values by {values[0]:.3g}",
        not (limit.refuse(words) or limit.refuse((values[0] / scale, values[1] / scale))),
        "rows of a batch are not independent: the model reads padding or its neighbours",
        "use an attention implementation that honours the attention mask (attn_implementation='sdpa')",
    )


def check_ppo_gradients(trainer: Trainer, own: ActorCritic, trial: Trial, outputs: TrialOutputs) -> Finding:
    """Check that every trainable tensor of policy and value model gets a gradient."""
    if trainer.accelerator.distributed_type in SHARDED:
        return Finding("gradients", "not measured: weights are sharded", True)
    trained = outputs.trained
    if distributed.is_sharded(own):  # whose layers have run again since; its head's parameters are others now
        trained = own(trial.batch, trainer.args.temperature, ("policy", "value"))
    return check_gradients(own, trained.logprobs.sum() + trained.values.sum())


def check_ppo_precision(trainer: Trainer, own: ActorCritic, trial: Trial, outputs: TrialOutputs) -> Finding:
    """Measure how far the policy's log-probabilities in this run's precision are from those in float32."""
    if outputs.exact:
        return Finding("precision", "the run computes in float32", True)
    with torch.no_grad(), own.active("policy") as policy:
        whole = float32(policy)
        if whole is None:
            return Finding("precision", "not measured: the model is sharded, or too large for a float32 copy", True)
        with torch.autocast(trainer.device.type, enabled=False), packing.decoding(whole):
            truth = response_logprobs(whole, trial.batch, trainer.args.temperature)[0]
    return drift(gap(outputs.collected.logprobs, truth, outputs.mask))
