"""The checks before PPO's first update: of texts and weights, then of sampled responses to a few prompts."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel

from rlhf.errors import InputError
from rlhf.models.heads import vocabulary_rows
from rlhf.ppo import preflight_checks as on_models
from rlhf.ppo.actor_critic import ActorCritic
from rlhf.ppo.preflight_rewards import check_functions, reward_model_checks
from rlhf.ppo.preflight_trial import sample_trial, score_trial
from rlhf.ppo.protocol import Trainer
from rlhf.preflight import text as on_text
from rlhf.preflight.base import check_base
from rlhf.preflight.measure import Finding
from rlhf.preflight.run import broken, conclude, run_checks, untouched


def check_ppo(trainer: Trainer) -> list[Finding]:
    """Check a PPOTrainer before its first update; return the findings, or raise InputError that names every failure.

    Does nothing if `args.preflight` is False, or in a resumed run, where the facts of step 0 no longer hold. With
    several processes, all raise if one of them finds a failure.
    """
    if not trainer.args.preflight or trainer.update_index:
        return []
    return conclude(trainer.accelerator, ppo_findings(trainer))


def ppo_findings(trainer: Trainer) -> Iterator[list[Finding]]:
    """Yield the findings on texts and weights, then those on sampled responses to a few prompts."""
    own: ActorCritic = trainer.accelerator.unwrap_model(trainer.module)
    with untouched(own):
        findings = _ppo_statics(trainer, own)
    yield findings
    with untouched(own):
        findings = _ppo_trial(trainer, own)
    yield findings


def _ppo_statics(trainer: Trainer, own: ActorCritic) -> list[Finding]:
    with own.sampling():  # a sharded head is whole there
        tokenizer, rows = trainer.processing_class, vocabulary_rows(own.policy)
    texts = [p.messages[-1]["content"] for p in trainer.prompts[:8]]
    talks = [[*p.messages, {"role": "assistant", "content": t}] for p, t in zip(trainer.prompts, texts, strict=False)]
    policy = own.policy
    in_memory = trainer.origin.model is None and isinstance(policy, PeftModel)
    return run_checks(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, rows)),
        ("template", lambda: on_text.check_template(tokenizer, talks)),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("stop token", lambda: on_models.check_stop(trainer, own)),
        ("frozen reference", lambda: on_models.check_reference(own)),
        ("optimizer", lambda: on_models.check_optimizer(own, trainer.optimizer.param_groups)),
        *([("base", lambda: check_base(trainer.accelerator, policy))] if in_memory else []),
    )


def _ppo_trial(trainer: Trainer, own: ActorCritic) -> list[Finding]:
    try:
        trial = sample_trial(trainer)
        outputs = score_trial(trainer, own, trial)
    except Exception as error:
        return [broken("sampling a few responses", error)]
    return run_checks(
        ("logits", lambda: on_models.check_own_logits(own, trial, outputs)),
        ("step-0 ratio", lambda: on_models.check_ratio(outputs)),
        ("step-0 KL", lambda: on_models.check_kl(trainer, outputs)),
        ("sampled log-probs", lambda: on_models.check_sampled(trainer, trial, outputs)),
        ("padding", lambda: on_models.check_padding(trainer, own, trial)),
        ("gradients", lambda: on_models.check_ppo_gradients(trainer, own, trial, outputs)),
        ("precision", lambda: on_models.check_ppo_precision(trainer, own, trial, outputs)),
        ("reward functions", lambda: check_functions(trainer, trial)),
        *reward_model_checks(trainer, trial),
    )


def check_logits(actor_critic: ActorCritic, prompt_ids: list[int], tolerance: float) -> None:
    """Compare our log-probabilities of a prompt's tokens with the model's own logits.

    Raises InputError if they differ by more than `tolerance` nats: the family then changes its logits after the head
    in a way that `logits_function` does not know.
    """
    device = next(actor_critic.parameters()).device
    worst = on_models.logits_gap(actor_critic, prompt_ids, device)
    if worst > tolerance:
        raise InputError(
            f"preflight: log-probabilities differ from the model's own by {worst:.3g} nats (> {tolerance}); "
            "its family changes logits after the head in a way rlhf.models.heads.logits_function doesn't know"
        )
