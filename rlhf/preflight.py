"""The checks that refuse a run that cannot be right, before it spends its time.

Every stage runs them before its first step, on its own model, tokenizer and data: `check_ppo`, `check_sft`,
`check_reward_model`. They leave weights, gradients and every random state as they were, so a run's result does not
depend on them; `preflight: off` skips them. (A reward function is called once more; one that counts its calls, or keeps
a state of its own, sees that.) What is checked of texts is in `rlhf.preflight_text`, of models in
`rlhf.preflight_models`, `rlhf.preflight_sft` and `rlhf.preflight_rewards`.

The same row must give the same numbers whatever it is computed beside, the policy must start as its reference, the
log-probabilities that responses were drawn with must be those that PPO computes: most bugs that PPO trainers shipped
break one of these on the first batch.
"""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from rlhf import InputError, chat, sharding
from rlhf import preflight_models as on_models
from rlhf import preflight_rewards as on_rewards
from rlhf import preflight_sft as on_sft
from rlhf import preflight_text as on_text
from rlhf.actor_critic import ActorCritic
from rlhf.preflight_text import Finding
from rlhf.records import Prompt

log = logging.getLogger("rlhf")

Check = Callable[[], Finding]


def check_ppo(trainer: Any) -> list[Finding]:
    """Before the first update of a PPOTrainer: raises InputError with every failure, or returns what was found.

    Does nothing where `args.preflight` is off, and in a run that goes on from a checkpoint, where the facts of
    step 0 no longer hold. With several processes, all raise when one of them finds a failure.
    """
    if not trainer.args.preflight or trainer.update_index:
        return []
    if sharding.is_sharded(trainer.module):
        log.info("preflight looks inside the models and is left out where FSDP2 shards them; run it once without")
        return []
    return _conclude(trainer.accelerator, ppo_findings(trainer))


def check_sft(trainer: Any) -> list[Finding]:
    """The same before supervised fine-tuning."""
    wanted = trainer.config.preflight and not trainer.state.global_step
    return _conclude(trainer.accelerator, sft_findings(trainer)) if wanted else []


def check_reward_model(trainer: Any) -> list[Finding]:
    """The same before a reward model's training."""
    wanted = trainer.config.preflight and not trainer.state.global_step
    return _conclude(trainer.accelerator, reward_model_findings(trainer)) if wanted else []


# Findings come in phases: what is wrong in a later one often follows from what is wrong in an earlier one.


def ppo_findings(trainer: Any) -> Iterator[list[Finding]]:
    """What is found of texts and weights, then of the responses that a few prompts get."""
    own: ActorCritic = trainer.accelerator.unwrap_model(trainer.module)
    with untouched(own):
        findings = _ppo_statics(trainer, own)
    yield findings
    with untouched(own):
        findings = _ppo_trial(trainer, own)
    yield findings


def _ppo_statics(trainer: Any, own: ActorCritic) -> list[Finding]:
    tokenizer, rows = trainer.processing_class, on_models.vocabulary_rows(own.policy)
    texts = [p.messages[-1]["content"] for p in trainer.prompts[:8]]
    talks = [[*p.messages, {"role": "assistant", "content": t}] for p, t in zip(trainer.prompts, texts, strict=False)]
    return _run(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, rows)),
        ("template", lambda: on_text.check_template(tokenizer, talks)),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("stop token", lambda: on_models.check_stop(trainer, own)),
        ("frozen reference", lambda: on_models.check_reference(own)),
        ("optimizer", lambda: on_models.check_optimizer(own, trainer.optimizer.param_groups)),
    )


def _ppo_trial(trainer: Any, own: ActorCritic) -> list[Finding]:
    try:
        trial = on_models.sample_trial(trainer)
        outputs = on_models.score_trial(trainer, own, trial)
    except Exception as error:
        return [_broken("sampling a few responses", error)]
    return _run(
        ("logits", lambda: on_models.check_own_logits(own, trial, outputs)),
        ("step-0 ratio", lambda: on_models.check_ratio(outputs)),
        ("step-0 KL", lambda: on_models.check_kl(trainer, outputs)),
        ("sampled log-probs", lambda: on_models.check_sampled(trainer, trial, outputs)),
        ("padding", lambda: on_models.check_padding(trainer, own, trial)),
        ("gradients", lambda: on_models.check_ppo_gradients(trainer, own, outputs)),
        ("precision", lambda: on_models.check_ppo_precision(trainer, own, trial, outputs)),
        ("reward functions", lambda: on_rewards.check_functions(trainer, trial)),
        *on_rewards.reward_model_checks(trainer, trial),
    )


def sft_findings(trainer: Any) -> Iterator[list[Finding]]:
    """What is found of texts, then of the model on a few demonstrations."""
    model, tokenizer, first = trainer.model, trainer.processing_class, trainer.first_demonstrations
    most = trainer.config.max_length
    yield _run(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, on_models.vocabulary_rows(model))),
        ("template", lambda: on_text.check_template(tokenizer, [d.messages for d in first])),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("trained tokens", lambda: on_text.check_trained(tokenizer, trainer.train_dataset, first, most)),
        ("stop token", lambda: on_text.check_generation_stop(tokenizer, model.generation_config)),
    )
    with untouched(model):
        model.eval()
        findings = _run(
            ("padding", lambda: on_sft.check_padding(trainer)),
            ("gradients", lambda: on_sft.check_gradients(trainer)),
            ("precision", lambda: on_sft.check_precision(trainer)),
        )
    yield findings


def reward_model_findings(trainer: Any) -> Iterator[list[Finding]]:
    """What is found of texts, then of the model on a few rankings."""
    model, tokenizer = trainer.model, trainer.processing_class
    yield _run(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, on_models.embedding_rows(model))),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("pairs", lambda: on_rewards.check_pairs(trainer.train_dataset)),
    )
    with untouched(model):
        model.eval()
        findings = _run(
            ("scores", lambda: on_rewards.check_scores(trainer)),
            ("padding", lambda: on_rewards.check_score_padding(trainer)),
            ("gradients", lambda: on_rewards.check_score_gradients(trainer)),
            ("reload", lambda: on_rewards.check_saved(trainer, tokenizer)),
        )
    yield findings


def _run(*checks: tuple[str, Check]) -> list[Finding]:
    """Every check's finding; a check that breaks is a failure, told by its exception."""
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(_broken(name, error))
    return findings


def _broken(name: str, error: Exception) -> Finding:
    if isinstance(error, InputError):
        return Finding(name, str(error).removeprefix("preflight: "), False)
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return Finding(
        name, f"{said} ({place.filename}:{place.lineno})", False, "the run would break there, too", "mend it"
    )


def _conclude(accelerator: Accelerator, phases: Iterator[list[Finding]]) -> list[Finding]:
    """Raise what failed on any process, on all of them together, so that none waits for another for ever."""
    started, findings = time.perf_counter(), []
    for phase in phases:
        findings += phase
        failed = list(dict.fromkeys(gather_object([str(f) for f in phase if not f.ok])))
        if failed:
            raise InputError(f"preflight: {' | '.join(failed)}")
    notes = [f"{f.check}: {f.measured}" for f in findings if f.note]
    level = logging.INFO if notes and accelerator.is_main_process else logging.DEBUG
    passed = f"preflight: {len(findings)} checks passed in {time.perf_counter() - started:.1f} s"
    log.log(level, "%s", "; ".join([passed, *notes]))
    return findings


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Puts back every random state and the train or eval mode of every module of `model`."""
    states, modes = (random.getstate(), np.random.get_state()), {m: m.training for m in model.modules()}
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode


def check_logits(actor_critic: ActorCritic, prompt_ids: list[int], tolerance: float) -> None:
    """Our log-probabilities of one prompt's own tokens against the model's own logits.

    They differ where a family does something after its head that `logits_function` does not know.
    """
    device = next(actor_critic.parameters()).device
    worst = on_models.logits_gap(actor_critic, prompt_ids, device)
    if worst > tolerance:
        raise InputError(
            f"preflight: log-probabilities differ from the model's own by {worst:.3g} nats (> {tolerance}); "
            "its family changes logits after the head in a way rlhf.heads.logits_function doesn't know"
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_prompt_tokens: int, name: str
) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts with their ids; over-long ones are left out, counted and named in the log, never cut."""
    kept: list[Prompt] = []
    ids: list[list[int]] = []
    long: list[tuple[int, Prompt]] = []
    for prompt in prompts:
        encoded = chat.encode_prompt(tokenizer, prompt.messages)
        if len(encoded) > max_prompt_tokens:
            long.append((len(encoded), prompt))
        else:
            kept.append(prompt)
            ids.append(encoded)
    if not kept:
        raise InputError(
            f"{name}: all {len(long)} prompts are longer than max_prompt_tokens={max_prompt_tokens} "
            f"(shortest: {min(n for n, _ in long)} tokens); raise it"
        )
    if long:
        shown = "; ".join(f"{p.messages[-1]['content'][:40]!r} ({n} tokens)" for n, p in long[:3])
        log.warning(
            "%s: %d of %d prompts longer than max_prompt_tokens=%d left out: %s%s",
            name, len(long), len(prompts), max_prompt_tokens, shown, " ..." if len(long) > 3 else "",
        )  # fmt: skip
    return kept, ids


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Do both turn every conversation into the same ids?"""
    return one.get_vocab() == other.get_vocab() and chat.template_hash(one) == chat.template_hash(other)


def value_start(value_model: Any, functions: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """What the value model starts from: `value_model`, else the first reward model among `functions` that
    reads the policy's tokens, else None (the policy's trunk under a zero head)."""
    from rlhf.models import load_tokenizer

    if isinstance(value_model, torch.nn.Module):
        return value_model
    candidates = [value_model] if value_model is not None else list(functions)
    for candidate in candidates:
        if isinstance(candidate, str) or hasattr(candidate, "__fspath__"):
            theirs = load_tokenizer(candidate)
        elif hasattr(candidate, "normalizer") and hasattr(candidate, "tokenizer"):
            theirs = candidate.tokenizer
        else:
            continue
        if same_tokenizer(tokenizer, theirs):
            return candidate
        log.warning("the reward model reads other tokens than the policy: the value model starts from the policy")
    return None
