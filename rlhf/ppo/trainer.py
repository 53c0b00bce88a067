"""PPO from a learned or programmatic score: collect -> score -> advantages -> update.

The loop follows Ziegler et al. 2019, Stiennon et al. 2020 and InstructGPT (Ouyang et al. 2022). The formulas are in
`rlhf.ppo.math`, the three models in `rlhf.ppo.actor_critic`, checkpoints, resuming and SIGTERM in `rlhf.ppo.run`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from rlhf import chat, cpu, scores
from rlhf.models import adapters
from rlhf.padding import make_batch, pad
from rlhf.ppo import build, finite, inputs, plan, preflight
from rlhf.ppo import math as ppo_math
from rlhf.ppo.actor_critic import Outputs, Role
from rlhf.ppo.ahead import Ahead
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.logged import Clock, StepStatistics, engine_metrics, rollout_metrics, update_metrics
from rlhf.ppo.pretraining_mix import PretrainingMix
from rlhf.ppo.protocol import State
from rlhf.ppo.rollout import Plan, ReadyRollout, Rollout, ScoredRollout
from rlhf.ppo.run import Run
from rlhf.ppo.saved import Origin
from rlhf.ppo.scoring import evaluate, raw_scores
from rlhf.rows.records import Prompt
from rlhf.run import distributed, precision, strategy
from rlhf.run import plot as plots
from rlhf.run.fingerprint import of_run
from rlhf.run.loop import CallbackLoop, callback_arguments
from rlhf.run.owner import by_main
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import Engine, Follower, Responses, model_stop_ids

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer:
    """Proximal policy optimisation of a language model against a score.

    model: a folder, hub id or object (full weights or a LoRA adapter). reward_funcs: one or several callables
    with the signature of trl's GRPOTrainer; a `reward_models.RewardModel` is one. train_dataset: anything that
    `rlhf.rows.records.read_prompts` reads. value_model: a reward model's folder or object to start from; default: the
    first reward model in `reward_funcs` with the policy's tokenizer, else the policy with a zero head.
    ref_model: default: a frozen copy of the initial policy. Raises InputError for arguments that cannot work.

    `train()` runs `collect`, `score`, `advantages` and `update` in a loop; each can be called by hand or overridden.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: scores.RewardFunction | Sequence[scores.RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: Any = None,
        ref_model: str | Path | PreTrainedModel | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        engine: Engine | None = None,
    ):
        self.args = args = args or PPOConfig()
        self.reward_funcs = scores.check_functions(reward_funcs)
        self.reward_weights = args.weights_for(len(self.reward_funcs))
        self.processing_class = tokenizer = inputs.policy_tokenizer(model, processing_class, args)
        read = partial(inputs.prompts_of, tokenizer=tokenizer, args=args, on_bad_row=args.on_bad_row)
        self.prompts, self.prompt_ids = read("train_dataset", train_dataset)
        self.eval_prompts, self.eval_prompt_ids = read("eval_dataset", eval_dataset)
        inputs.check_prompts(self.reward_funcs, self.prompts, self.eval_prompts)
        dtype = precision.compute_dtype(args.bf16)
        precision.log_choice(args.bf16)
        callback_args = callback_arguments(args, evaluate=bool(self.eval_prompts))  # resets accelerate's state
        self.accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
        self.device = self.accelerator.device
        args.check_processes(self.accelerator.num_processes)
        strategy.configure(self.accelerator, args)
        start = inputs.value_start(value_model, self.reward_funcs, tokenizer, args)
        self.origin = Origin.of(args, self.accelerator, self.reward_funcs, model, ref_model, start)
        models_given = {"model": model, "ref_model": ref_model, "value_model": start}
        self.given = by_main(lambda: of_run(tokenizer, self.prompts, self.reward_funcs, peft_config, **models_given))
        self.peft_config, self.reference_given = peft_config, ref_model is not None  # else step 0's KL must be 0
        models = build.models_for(args, model, ref_model, start, peft_config, dtype)
        self.actor_critic = strategy.placed(self.accelerator, models)
        inputs.check_positions(self)
        adapters.share_bases(models.policy, self.reward_funcs)
        cpu.prepare(models, self.device)
        self.stop_ids, self.pad_id = model_stop_ids(models.policy, tokenizer), chat.pad_id(tokenizer)
        optimizer = build.build_optimizer(models, args, callback_args)
        self.module, self.optimizer = self.accelerator.prepare(models, optimizer)
        build.prepare(models, args, dtype, self.device)
        with self.accelerator.autocast():
            preflight.check_logits(models, self.prompt_ids[0], 1e-3 if dtype == torch.float32 else 0.5)
        builtin = (models.policy, self.stop_ids, self.pad_id, args.generation_batch_size)
        self.engine = engine or TransformersEngine(*builtin)
        if isinstance(self.engine, Follower):
            self.engine.follow(models.policy, self.stop_ids)
        self.pretraining = PretrainingMix(args, tokenizer, models, self.accelerator)
        self.kl_coef, self.moments, self.clock, self.update_index = args.kl_coef, scores.RunningMoments(), Clock(), 0
        self.draws = plan.Draws(args.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.ahead = Ahead(self)
        watched = (models.policy, tokenizer, self.optimizer, callbacks, self.accelerator)
        self.loop = CallbackLoop(args, callback_args, *watched)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, float]:
        """Train for `args.updates` updates and return the last logged metrics.

        resume_from_checkpoint: True continues from the newest checkpoint in output_dir, a path from that one. Raises
        RunStopped when the run cannot continue (NaN, a full disk) or an alarm stops it (`args.on_alarm`). On SIGTERM
        it finishes the current update, writes a checkpoint and raises SystemExit(143); on Ctrl-C KeyboardInterrupt.
        """
        cpu.prepare(self.actor_critic)  # again, after an earlier train()
        try:
            with Run(self, resume_from_checkpoint) as run:
                while run.goes_on():
                    rollout = self.collect(self.next_prompts())
                    with run.kept_on_failure():
                        scored = self.score(rollout)
                    ready = self.advantages(scored)
                    run.updated(ready, self.update(ready))
            return run.metrics
        finally:
            cpu.restore(self.actor_critic)  # the user's model object is a plain one again

    def next_prompts(self) -> list[Prompt]:
        """Return this process's share of the current update's prompts: a pure function of (seed, update), in which
        every prompt comes once before any comes twice."""
        rows = self.draws.prompt_rows(self.update_index, self.args.rollout_size, len(self.prompts))
        return [self.prompts[row] for row in rows]

    @torch.no_grad()
    def collect(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample one response per prompt; compute its log-probabilities, reference log-probabilities and values.

        The micro-batches are those of the first inner epoch, so that in fp32 the first ratio is 1 (and the KL of
        the first update is 0) to the last bit.
        """
        prompt_ids = [chat.encode_prompt(self.processing_class, p.messages, p.columns) for p in prompts]
        with self.clock("generate"):
            responses, staleness = self.ahead.responses(prompt_ids)
        with self.clock("logprobs"):
            _, mask = pad(responses.ids, 0)
            micro_batches = self.plan([len(p) + len(r) for p, r in zip(prompt_ids, responses.ids, strict=True)])
            columns = Outputs(*(torch.zeros(mask.shape) for _ in Outputs._fields))
            for rows in (rows for minibatch in micro_batches for rows in minibatch):
                ids = [prompt_ids[i] for i in rows], [responses.ids[i] for i in rows]
                batch = make_batch(*ids, self.pad_id, self.device)
                outputs = self.module(batch, self.args.temperature, ("policy", "value", "reference"))
                for column, values in zip(columns, outputs, strict=True):
                    column[torch.tensor(rows), : values.shape[1]] = values.float().cpu()
        rollout = Rollout(
            prompts=list(prompts),
            prompt_ids=prompt_ids,
            response_ids=responses.ids,
            texts=[chat.decode_response(self.processing_class, ids, self.stop_ids) for ids in responses.ids],
            stopped=torch.tensor(responses.stopped),
            mask=mask,
            plan=micro_batches,
            update=self.update_index,
            logprobs=columns.logprobs,
            reference_logprobs=columns.reference_logprobs,
            entropy=columns.entropy,
            values=columns.values,
            engine_logprobs=responses.padded_logprobs(),
            staleness=staleness,
        )
        finite.stop_on(finite.broken_number(rollout), self.update_index + 1)
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Score each response: sum the weighted reward functions, normalise, clip, apply the missing-stop rule."""
        args = self.args
        with self.clock("score"):
            raw, by_function, steps = raw_scores(self, rollout.prompts, rollout.texts, rollout.response_ids)
            processed = raw
            if args.normalize_scores:
                gathered = self.accelerator.gather(raw.to(self.device)).cpu()
                self.moments = self.moments.with_batch(gathered[~gathered.isnan()])
                processed = self.moments.normalize(processed)
            if args.clip_scores is not None:
                processed = processed.clamp(-args.clip_scores, args.clip_scores)
            processed = scores.apply_missing_eos(processed, rollout.stopped, args.missing_eos, args.missing_eos_penalty)
            used = ~raw.isnan()
            processed = torch.where(used, processed, 0.0)  # NaN would spread; rows that are not used are masked out
        columns = {"raw_scores": raw, "own_scores": by_function, "used": used, "step_scores": steps}
        return rollout.grown(ScoredRollout, scores=processed, **columns)

    @torch.no_grad()
    def advantages(self, rollout: ScoredRollout) -> ReadyRollout:
        """Compute rewards per token, advantages (standardized over the rollouts of all processes) and returns."""
        if not isinstance(rollout, ScoredRollout):
            raise TypeError("advantages: the rollout has no scores; call score(rollout) first")
        args, mask, trained = self.args, rollout.mask, rollout.trained_mask
        with self.clock("update"):
            kl = ppo_math.kl_estimate(rollout.logprobs, rollout.reference_logprobs, "k1")
            rewards = ppo_math.token_rewards(rollout.scores, kl, mask, self.kl_coef, rollout.step_scores)
            if args.rescale_rewards:
                moments = distributed.mean_and_variance(self.accelerator, rewards, trained)
                rewards = ppo_math.rescale(rewards, mask, moments)
            advantages, returns = ppo_math.gae(rewards, rollout.values, mask, args.gamma, args.lam)
            moments = distributed.mean_and_variance(self.accelerator, advantages, trained)
            standardized = ppo_math.standardize(advantages, trained, moments)
            old, engine, cap = rollout.logprobs, rollout.engine_logprobs, args.importance_cap
            importance = None if engine is None else ppo_math.importance_weights(old, engine, trained, cap)
        columns = {"rewards": rewards, "advantages": standardized, "returns": returns, "importance": importance}
        return rollout.grown(ReadyRollout, **columns)

    def update(self, rollout: ReadyRollout) -> dict[str, float]:
        """Train for `inner_epochs` on one rollout with the clipped policy and value losses; return the metrics.

        Each loss is a mean over the minibatch's real tokens on all processes: every micro-batch divides by that total
        `count`, and the factor `num_processes` undoes DDP's averaging, so no split of the rows changes a gradient.
        In the first `value_warmup_updates` updates only the value model is trained, and `kl_coef` stays.
        """
        if not isinstance(rollout, ReadyRollout):
            raise TypeError("update: the rollout has no advantages; call advantages(rollout) first")
        args, models, accelerator, module = self.args, self.actor_critic, self.accelerator, self.module
        for group, rate in zip(self.optimizer.param_groups, args.learning_rates(self.update_index), strict=True):
            group["lr"] = rate
        steps: list[dict[str, float]] = []
        with self.clock("update"):
            for inner_epoch in range(args.inner_epochs):
                first = len(steps)
                for minibatch in rollout.plan if inner_epoch == 0 else self.plan(rollout.lengths, inner_epoch):
                    every = [row for rows in minibatch for row in rows]
                    count = distributed.total(accelerator, rollout.trained_mask[every].sum())
                    if count == 0:  # scoring failed for all of its responses, on every process
                        continue
                    statistics = StepStatistics()
                    statistics.add(**self.pretraining.add_gradient(module, self.update_index, len(steps)))
                    for roles in models.backward_roles(module):
                        for rows in minibatch:
                            with nullcontext() if rows is minibatch[-1] else distributed.no_sync(accelerator, module):
                                self._add_gradient(rollout, rows, roles, count, statistics)
                    clip, limit = torch.nn.utils.clip_grad_norm_, args.max_grad_norm
                    norms = {name: float(clip(group, limit)) for name, group in models.clipped_together().items()}
                    if not all(map(math.isfinite, norms.values())):
                        found = finite.explain_step(rollout, minibatch, models, self.outputs)
                        finite.stop_on(found, self.update_index + 1)
                    if rollout.update < args.value_warmup_updates:  # Adam skips a parameter without a gradient
                        for parameter in models.policy_parameters():
                            parameter.grad = None
                    with self.loop.optimizer_step():
                        self.optimizer.step()
                    self.optimizer.zero_grad()
                    steps.append(statistics.over(accelerator) | norms)
                approx_kl = sum(step["approx_kl_nats"] for step in steps[first:]) / len(steps[first:])
                if args.stop_approx_kl_nats is not None and approx_kl > args.stop_approx_kl_nats:
                    break
            metrics = rollout_metrics(rollout, accelerator, args, self.kl_coef)
            metrics |= engine_metrics(rollout, accelerator, args.importance_cap)
            metrics |= {"kl_coef": self.kl_coef, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            metrics |= update_metrics(steps)
        if args.kl_target_nats is not None and rollout.update >= args.value_warmup_updates:
            kl, responses = metrics["kl_nats"], int(distributed.total(accelerator, rollout.used.sum()))
            self.kl_coef = ppo_math.adapt_kl_coef(self.kl_coef, kl, args.kl_target_nats, responses, args.kl_horizon)
        self.update_index += 1
        return metrics

    def _add_gradient(
        self, rollout: ReadyRollout, rows: list[int], roles: Sequence[Role], count: float, statistics: StepStatistics
    ) -> None:
        """Add a micro-batch's gradient. Its graph ends here: a graph's nodes would lie between the memory it frees."""
        args, old, new = self.args, rollout.columns(rows, self.device), self.outputs(rollout, rows, roles)
        loss = torch.zeros((), device=self.device)
        if "policy" in roles:
            given = (new.logprobs, old.logprobs, old.advantages, old.mask, args.clip_ratio, count, old.importance)
            policy_loss, policy_stats = ppo_math.policy_loss(*given)
            statistics.add(policy_loss=policy_loss, **policy_stats._asdict())
            loss = loss + policy_loss
        if "value" in roles:
            seen = (new.values, old.values, old.returns, old.mask, args.clip_value, count)
            value_loss, value_stats = ppo_math.value_loss(*seen)
            statistics.add(value_loss=value_loss, **value_stats._asdict())
            loss = loss + (args.value_loss_coef if self.actor_critic.shared_trunk else 1.0) * value_loss
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def generate(self, prompt_ids: list[list[int]], generator: torch.Generator) -> Responses:
        """Sample the policy's responses with the engine."""
        self.ahead.wait()
        models = self.actor_critic
        explained = finite.sampling_explained(models, prompt_ids, self.processing_class, self.update_index + 1)
        with self.accelerator.autocast(), models.lent_to(self.engine), explained:
            return self.engine.generate(prompt_ids, self.args.max_new_tokens, self.args.temperature, generator)

    def plan(self, lengths: Sequence[int], inner_epoch: int = 0) -> Plan:
        """Divide rows into an inner epoch's minibatches and micro-batches; lengths: their prompt + response tokens."""
        args, models = self.args, self.actor_critic
        generator, process = self.draws.plan(self.update_index, inner_epoch), (self.draws.process, self.draws.processes)
        tokens, launch = models.most_tokens(args.tokens_per_microbatch), plan.launch_tokens(self.device)
        cut = plan.plan_minibatches(lengths, args.minibatch_size, tokens, generator, *process, launch, not models.packs)
        return distributed.even_plan(cut, self.module)

    def outputs(self, rollout: Rollout, rows: list[int], roles: Sequence[Role] = ("policy", "value")) -> Outputs:
        """Run the models in `roles` on some rows of a rollout, with gradients."""
        outputs: Outputs = self.module(rollout.batch(rows, self.pad_id, self.device), self.args.temperature, roles)
        return outputs

    def evaluate(self) -> dict[str, float]:
        """Return mean score, KL, length and stop rate on eval_dataset, sampled with the same seed every time."""
        return evaluate(self)

    @property
    def state(self) -> TrainerState:
        """Return transformers' TrainerState; `state.log_history` has every logged metric."""
        return self.loop.state

    def plot(self, *names: str) -> plots.Figure:
        """Plot the named metrics over the updates; without names, all that were logged."""
        return plots.plot(self.state.log_history, names)

    def save_model(self, folder: str | Path | None = None) -> None:
        """Save the policy (full weights or adapter, safetensors) and its tokenizer in `folder` or output_dir."""
        target = Path(folder or self.args.output_dir)
        if self.accelerator.is_main_process or distributed.is_sharded(self.module):
            self.actor_critic.save_policy(target)
        if self.accelerator.is_main_process:
            self.processing_class.save_pretrained(str(target))

    def state_dict(self) -> State:
        """Return what a resumed run needs; a collective. Sharded weights are whole on the first process only."""
        return {
            "trained": self.actor_critic.trained_state(),
            "optimizer": distributed.full(self.optimizer.state_dict()),
            "kl_coef": self.kl_coef,
            "moments": asdict(self.moments),
            "update_index": self.update_index,
            **self.ahead.state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned. Raises InputError if the state belongs to another model."""
        self.actor_critic.load_trained_state(state["trained"])
        distributed.load_optimizer_state(self.optimizer, state["optimizer"])
        self.kl_coef = state["kl_coef"]
        self.moments, self.update_index = scores.RunningMoments(**state["moments"]), state["update_index"]
        self.ahead.load(state)
