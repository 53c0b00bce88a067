"""PPO from a learned or programmatic score: collect -> score -> advantages -> update.

The loop follows Ziegler et al. 2019, Stiennon et al. 2020 and InstructGPT; the mathematics is in
`rlhf.ppo.math`, the three models in `rlhf.ppo.actor_critic`, sampling in `rlhf.ppo.rollout`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf import chat, records, scores
from rlhf.config import resume_settings
from rlhf.cpu.memory import keep_large_blocks, release_freed_memory
from rlhf.cpu.side_by_side import SideBySide
from rlhf.errors import InputError, RunStopped
from rlhf.models.adapters import is_adapter, lora_config, share_base
from rlhf.padding import pad
from rlhf.ppo import finite
from rlhf.ppo import math as ppo_math
from rlhf.ppo import optimizer as ppo_optimizer
from rlhf.ppo import run as ppo_state
from rlhf.ppo.actor_critic import ActorCritic, Outputs, Role
from rlhf.ppo.build import (
    build_actor_critic,
    compile_layers,
    enable_gradient_checkpointing,
    encode_prompts,
    policy_tokenizer,
    value_start,
)
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.evaluation import evaluate
from rlhf.ppo.logged import Clock, engine_metrics, rollout_metrics, samples
from rlhf.ppo.losses import losses
from rlhf.ppo.plan import FEWEST, LAUNCH_TOKENS, Draws, plan_minibatches
from rlhf.ppo.preflight import check_logits, check_ppo
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.saved import Origin, Save, saving_update, update_folder
from rlhf.records import Prompt
from rlhf.run import distributed as sharding
from rlhf.run import precision
from rlhf.run.checkpoint import full_disk_explained, mark_complete, save_checkpoint
from rlhf.run.loop import CallbackLoop, callback_arguments
from rlhf.run.resume import TERMINATED, Termination, resume_point
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import Engine, Follower, Responses

log = logging.getLogger("rlhf")

__all__ = ["PPOConfig", "PPOTrainer"]

LARGEST = ("ratio_max", "ratio_error")  # of a minibatch's statistics, those of which the largest counts
Kept = dict[tuple[tuple[int, ...], tuple[Role, ...]], Outputs]  # a micro-batch's forward, its graph not yet used


class PPOTrainer:
    """Proximal policy optimisation of a language model against a score.

    model: a folder, hub id or object (full weights or a LoRA adapter). reward_funcs: one or several callables
    with the signature of trl's GRPOTrainer, `reward_models.RewardModel` among them. train_dataset: anything
    `rlhf.records.read_prompts` takes. value_model: a reward model's folder or object to start from; left
    out, the first reward model in `reward_funcs` that reads the policy's tokens, else the policy under a zero
    head. ref_model: left out, a frozen copy of the policy as it starts. Raises InputError for what cannot work.

    `train()` runs `collect`, `score`, `advantages` and `update` in a loop; each can be called by hand or
    overridden.
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
        self.processing_class = tokenizer = policy_tokenizer(model, processing_class)
        self.prompts, self.prompt_ids = self._read(train_dataset, "train_dataset")
        self.eval_prompts, self.eval_prompt_ids = (
            self._read(eval_dataset, "eval_dataset") if eval_dataset is not None else ([], [])
        )
        mixed = precision.ppo_dtype(args.bf16)
        if args.bf16 is None:
            log.info("precision: %s", precision.explained())
        callback_args = callback_arguments(args)  # before Accelerator: transformers resets its state
        self.accelerator = Accelerator(mixed_precision="bf16" if mixed == torch.bfloat16 else "no")
        args.check_processes(self.accelerator.num_processes)
        sharding.configure(self.accelerator)
        lora = peft_config or lora_config(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        shared = args.value_model == "shared_trunk"  # then the value head starts from zero
        start = value_model if shared else value_start(value_model, self.reward_funcs, tokenizer)
        self._origin = Origin.of(args, self.accelerator, len(self.reward_funcs), model, ref_model, start)
        self._peft_config = peft_config
        actor_critic = build_actor_critic(
            model,
            ref_model=ref_model,
            value_model=start,
            value_kind=args.value_model,
            lora=lora,
            dtype=mixed if lora is not None or _frozen_base(model) else torch.float32,
            seed=args.seed,
        )
        self.device = self.accelerator.device
        self._place(actor_critic)
        check_logits(actor_critic, self.prompt_ids[0], 1e-3 if mixed == torch.float32 else 0.5)
        self.actor_critic = actor_critic
        self.reference_given = ref_model is not None  # else the KL at step 0 must be 0: preflight checks it
        self.module, self.optimizer = self.accelerator.prepare(actor_critic, ppo_optimizer.build(actor_critic, args))
        self.stop_ids = chat.stop_ids(tokenizer)
        self.pad_id = chat.pad_id(tokenizer)
        own = TransformersEngine(actor_critic.policy, self.stop_ids, self.pad_id, args.generation_batch_size)
        self.engine = engine or own
        if isinstance(self.engine, Follower):
            self.engine.follow(actor_critic.policy, self.stop_ids)
        self.kl_coef = args.kl_coef
        self.moments = scores.RunningMoments()
        self.update_index = 0
        self._at_once = actor_critic.roles_at_once(self.accelerator.num_processes)
        self._side_by_side = SideBySide(2 if self._models_side_by_side() else 1)
        self.clock = Clock()
        self._kept: tuple[list[list[list[int]]], Kept] | None = None  # see `_fits_at_once`
        self.draws = Draws(args.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.loop = CallbackLoop(
            args, callback_args, actor_critic.policy, tokenizer, self.optimizer, callbacks, self.accelerator
        )

    def _place(self, actor_critic: ActorCritic) -> None:
        """On the device, with what of memory and time can be saved there."""
        if self.args.gradient_checkpointing:
            enable_gradient_checkpointing(actor_critic)
        actor_critic.to(self.device)
        for function in self.reward_funcs:  # a reward model's adapter over the same base
            share_base(actor_critic.policy, getattr(function, "model", None))
        release_freed_memory()
        if self.device.type == "cpu":
            keep_large_blocks()
        if self.args.compile:
            compile_layers(actor_critic)

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, float]:
        """Run `args.updates` updates, going on from a checkpoint where asked; the last logged metrics.

        Raises RunStopped where the run cannot go on (NaN, a full disk) or an alarm stops it (`args.on_alarm`). After
        SIGTERM the update in hand is finished, a checkpoint written, and SystemExit(143) raised.
        """
        args, settings = self.args, resume_settings(self.args, PPOConfig)
        checkpoint = resume_point(self.accelerator, args.output_dir, resume_from_checkpoint, settings)
        if checkpoint is not None:
            ppo_state.load(self, checkpoint)
        else:
            check_ppo(self)
        self.loop.begin(self.update_index, args.updates)
        metrics = self.loop.last_metrics()
        with Termination(self.accelerator) as termination, full_disk_explained(args.output_dir):
            while not self._finished(metrics) and not self.loop.should_stop:
                metrics = self._one_update()
                told = termination.agreed()
                if self._due(args.save_steps, metrics) or self.loop.should_save or told:
                    self._save_checkpoint()
                if told:
                    raise SystemExit(TERMINATED)
        self.loop.end()
        return metrics

    def _one_update(self) -> dict[str, float]:
        with self._saving_update() as save:
            clock = self.clock = Clock()
            rollout = self.collect(self.next_prompts())
            with clock("score"):
                rollout = self._scored(rollout)
            with clock("update"):
                rollout = self.advantages(rollout)
                metrics = self.update(rollout)
            metrics |= clock.metrics(self._sum(rollout.response_tokens.sum()))
            if self.eval_prompts and self._due(self.args.eval_steps, metrics):
                metrics |= self.evaluate()
            self.loop.step(self.update_index, metrics, samples(rollout, self.update_index, self.args.samples_logged))
            save(rollout, self.loop.state.log_history[-1])
        return metrics

    def next_prompts(self) -> list[Prompt]:
        """This process's share of the prompts of the current update: a pure function of (seed, update), every
        prompt once before any comes twice."""
        rows = self.draws.prompt_rows(self.update_index, self.args.rollout_size, len(self.prompts))
        return [self.prompts[row] for row in rows]

    # -- the four stages -----------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample one response per prompt, and everything the models say of it at this moment.

        Log-probabilities, reference log-probabilities and values are computed with the micro-batch plan of the
        first inner epoch, so that in fp32 the first ratio is 1 (and, at the start, the KL is 0) to the last bit.
        """
        prompt_ids = [chat.encode_prompt(self.processing_class, p.messages) for p in prompts]
        with self.clock("generate"):
            responses = self._generate(prompt_ids, self.draws.generator("sample", self.update_index, self.device))
        _, mask = pad(responses.ids, 0)
        lengths = [len(p) + len(r) for p, r in zip(prompt_ids, responses.ids, strict=True)]
        plan = self._plan(lengths, inner_epoch=0)
        blank = torch.zeros(mask.shape)
        rollout = Rollout(
            prompts=list(prompts),
            prompt_ids=prompt_ids,
            response_ids=responses.ids,
            texts=[chat.decode_response(self.processing_class, ids) for ids in responses.ids],
            stopped=torch.tensor(responses.stopped),
            mask=mask,
            plan=plan,
            update=self.update_index,
            logprobs=blank.clone(),
            reference_logprobs=blank.clone(),
            entropy=blank.clone(),
            values=blank.clone(),
            engine_logprobs=responses.padded_logprobs(),
        )
        with self.clock("logprobs"):
            self._kept = (plan, {}) if self._fits_at_once(plan, lengths) else None
            groups: list[tuple[Role, ...]] = [*self._at_once, ("reference",)]
            parts = [(rows, roles) for minibatch in plan for rows in minibatch for roles in groups]
            outputs = self._side_by_side.run([partial(self._collected, rollout, rows, roles) for rows, roles in parts])
            for (rows, _), output in zip(parts, outputs, strict=True):
                for name, values in output.given().items():
                    getattr(rollout, name)[torch.tensor(rows), : values.shape[1]] = values.detach().float().cpu()
        self._require_finite(finite.broken_place(rollout))
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rollout:
        """Weighted sum of the reward functions, running normalisation and clipping, the missing-stop rule."""
        args = self.args
        raw, own = self._raw_scores(
            rollout.prompts, rollout.texts, rollout.response_ids, self.loop.log_metric, self.loop.log_extra
        )
        used = None if args.on_score_failure == "error" else ~raw.isnan()
        processed = raw
        if args.normalize_scores:
            everyone = self.accelerator.gather(raw.to(self.device)).cpu()
            self.moments = self.moments.with_batch(everyone[~everyone.isnan()])
            processed = self.moments.normalize(processed)
        if args.clip_scores is not None:
            processed = processed.clamp(-args.clip_scores, args.clip_scores)
        processed = scores.apply_missing_eos(processed, rollout.stopped, args.missing_eos, args.missing_eos_penalty)
        if used is not None:
            processed = torch.where(used, processed, 0.0)  # stands for a score where no one looks
        return replace(rollout, raw_scores=raw, own_scores=own, scores=processed, used=used)

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> Rollout:
        """Rewards per token, their advantages (standardized over the whole rollout) and returns."""
        args = self.args
        if rollout.scores is None:
            raise ValueError("advantages: the rollout has no scores; call score(rollout) first")
        mask, trained = rollout.mask, rollout.trained_mask
        kl = ppo_math.kl_estimate(rollout.logprobs, rollout.reference_logprobs, "k1")
        rewards = ppo_math.token_rewards(rollout.scores, kl, mask, self.kl_coef)
        if args.rescale_rewards:
            rewards = ppo_math.rescale(rewards, mask, self._moments(rewards, trained))
        advantages, returns = ppo_math.gae(rewards, rollout.values, mask, args.gamma, args.lam)
        standardized = ppo_math.standardize(advantages, trained, self._moments(advantages, trained))
        return replace(rollout, rewards=rewards, advantages=standardized, returns=returns)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Inner epochs of clipped policy and value steps on one rollout; the update's metrics.

        The policy stands still for the first `value_warmup_updates` updates while the value model learns.
        """
        if rollout.advantages is None or rollout.returns is None:
            raise ValueError("update: the rollout has no advantages; call advantages(rollout) first")
        ppo_optimizer.set_learning_rates(self.optimizer, self.args, self.update_index)
        kept, self._kept = self._kept, None
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        steps: list[dict[str, float]] = []
        for inner_epoch in range(self.args.inner_epochs):
            plan = rollout.plan if inner_epoch == 0 else self._plan(lengths, inner_epoch)
            ready = kept[1] if kept is not None and kept[0] is plan else {}
            epoch = [step for minibatch in plan if (step := self._optimizer_step(rollout, minibatch, ready))]
            steps += epoch
            moved = sum(step["approx_kl_nats"] for step in epoch) / len(epoch)
            if self.args.stop_approx_kl_nats is not None and moved > self.args.stop_approx_kl_nats:
                break
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics["ratio_max"] = max(step["ratio_max"] for step in steps)
        metrics["step0_ratio_error"] = steps[0]["ratio_error"]
        metrics["optimizer_steps"] = len(steps)
        del metrics["ratio_error"]
        rates = {"kl_coef": self.kl_coef, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        sampled = engine_metrics(rollout, self.accelerator, self.args.importance_cap)
        metrics = rollout_metrics(rollout, self.accelerator, self.kl_coef) | sampled | rates | metrics
        if self.args.kl_target_nats is not None:
            self.kl_coef = ppo_math.adapt_kl_coef(
                self.kl_coef,
                metrics["kl_nats"],
                self.args.kl_target_nats,
                int(self._sum(rollout.trained_mask[:, 0].sum())),
                self.args.kl_horizon,
            )
        self.update_index += 1
        return metrics

    # -- behind the stages ---------------------------------------------------------------------------------

    def _models_side_by_side(self) -> bool:
        wanted = self.args.side_by_side and not self.args.compile  # compiled code has its number of threads written in
        return wanted and self.actor_critic.side_by_side(self.accelerator.num_processes)

    def _generate(self, prompt_ids: list[list[int]], generator: torch.Generator) -> Responses:
        try:
            with self.accelerator.autocast(), self.actor_critic.sampling():
                return self.engine.generate(prompt_ids, self.args.max_new_tokens, self.args.temperature, generator)
        except RuntimeError as error:
            if "probability" not in str(error):  # what torch.multinomial, too, says of a NaN
                raise
            with self.actor_critic.active("policy") as policy:
                where = finite.broken_prompt(policy, prompt_ids, self.processing_class)
            self._require_finite(where or "sampling: a probability is not a number")
            raise

    def _collected(self, rollout: Rollout, rows: list[int], roles: tuple[Role, ...]) -> Outputs:
        """What the models in `roles` say of a micro-batch before the update."""
        batch = rollout.batch(rows, self.pad_id, self.device)
        if self._kept is None or roles not in self._at_once:
            return self.module(batch, self.args.temperature, roles)
        with torch.enable_grad():
            outputs = self._kept[1][tuple(rows), roles] = self.module(batch, self.args.temperature, roles)
        return outputs

    def _fits_at_once(self, plan: list[list[list[int]]], lengths: list[int]) -> bool:
        """One inner epoch of one minibatch on one process, of no more tokens than a micro-batch may have: then the
        forward of `collect` is also the update's. Its graphs are kept, and no second forward is made."""
        alone = self.args.inner_epochs == 1 and len(plan) == 1 and self.accelerator.num_processes == 1
        padded = sum(len(rows) * max(lengths[row] for row in rows) for minibatch in plan for rows in minibatch)
        return alone and (sum(lengths) if self.actor_critic.packs else padded) <= self.args.tokens_per_microbatch

    def _optimizer_step(
        self, rollout: Rollout, minibatch: list[list[int]], kept: Kept | None = None
    ) -> dict[str, float]:
        """One minibatch: gradients summed over its micro-batches, both norms clipped, one Adam step.

        Losses are means over the minibatch's real tokens on all processes, so each micro-batch divides by that
        count; DDP averages gradients over processes, which the world size undoes.
        """
        count = self._sum(sum(int(rollout.trained_mask[rows].sum()) for rows in minibatch))
        if count == 0:  # all of its responses were dropped, on every process
            return {}
        tasks = [partial(self._gradients, rollout, minibatch, count, roles, kept or {}) for roles in self._at_once]
        totals: dict[str, Tensor] = {}
        for part in self._side_by_side.run(tasks):
            totals |= part
        frozen = rollout.update < self.args.value_warmup_updates
        models = self.actor_critic
        groups = models.clipped_together()
        norms = {name: float(torch.nn.utils.clip_grad_norm_(p, self.args.max_grad_norm)) for name, p in groups.items()}
        if not all(map(math.isfinite, norms.values())):
            rows = [row for rows in minibatch for row in rows]
            self._require_finite(
                finite.broken_step(rollout, rows, models, lambda rows: self._losses(rollout, rows, count)[0])
            )
        if frozen:
            for parameter in models.policy_parameters():
                parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._joined(totals) | norms

    def _gradients(
        self, rollout: Rollout, minibatch: list[list[int]], count: float, roles: tuple[Role, ...], kept: Kept
    ) -> dict[str, Tensor]:
        """Add a minibatch's gradients to those of the models in `roles`; the sums of its statistics."""
        world = self.accelerator.num_processes
        totals: dict[str, Tensor] = {}
        for place, rows in enumerate(minibatch):
            last = place == len(minibatch) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, stats = self._losses(rollout, rows, count, roles, kept.get((tuple(rows), roles)))
                self.accelerator.backward(loss * world)
            for name, value in stats.items():
                join = torch.maximum if name in LARGEST else torch.add
                totals[name] = join(totals[name], value) if name in totals else value
        return totals

    def _losses(
        self,
        rollout: Rollout,
        rows: list[int],
        count: float,
        roles: Sequence[Role] = ("policy", "value"),
        outputs: Outputs | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its statistics; `outputs`: its forward, where that is already made."""
        if outputs is None:
            outputs = self.module(rollout.batch(rows, self.pad_id, self.device), self.args.temperature, roles)
        return losses(rollout, rows, outputs, roles, count, self.args)

    def evaluate(self) -> dict[str, float]:
        """Score, KL, length and stops on the evaluation prompts, sampled with the same seed every time."""
        return evaluate(self)

    def save_model(self, folder: str | Path | None = None) -> None:
        """The policy (full weights or adapter, safetensors) and its tokenizer, in `folder` or output_dir."""
        target = Path(folder or self.args.output_dir)
        if self.accelerator.is_main_process or sharding.is_sharded(self.module):
            self.actor_critic.save_policy(target)
        if self.accelerator.is_main_process:
            self.processing_class.save_pretrained(str(target))

    def _save_checkpoint(self) -> None:
        state = ppo_state.gathered(self)
        if self.accelerator.is_main_process:
            save_checkpoint(
                Path(self.args.output_dir),
                self.update_index,
                partial(ppo_state.write, self, state),
                resume_settings(self.args, PPOConfig),
                self.args.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
        self.loop.saved()

    def _raw_scores(self, prompts: Any, texts: Any, ids: Any, log_metric: Any, log_extra: Any) -> Any:
        """`scores.score_responses`; NaN for a response on which it failed, where `on_score_failure` is "drop"."""
        failures: list[str] | None = None if self.args.on_score_failure == "error" else []
        raw, own = scores.score_responses(
            self.reward_funcs, self.reward_weights, prompts, texts, ids,
            timeout_seconds=self.args.score_timeout_seconds, failures=failures,
            trainer_state=self.loop.state, log_metric=log_metric, log_extra=log_extra,
        )  # fmt: skip
        if failures is not None:
            scores.require_some(self._sum((~raw.isnan()).sum()), failures)
        return raw, own

    def _scored(self, rollout: Rollout) -> Rollout:
        """`score`, after whose failure (a reward function's, a server's) nothing of the updates before it is lost."""
        try:
            return self.score(rollout)
        except Exception:
            if self.args.save_steps and self.update_index and self.accelerator.num_processes == 1:
                self._save_checkpoint()
            raise

    def _require_finite(self, broken: str | None) -> None:
        if broken is not None:
            raise RunStopped(
                f"update {self.update_index + 1}: {broken}; no step was taken on it. Lower learning_rate, or look at "
                "that row and the scores; the last checkpoint is good"
            )

    def _finished(self, metrics: dict[str, float]) -> bool:
        limit = self.args.stop_kl_nats
        early = limit is not None and metrics.get("kl_nats", 0.0) > limit
        return early or self.update_index >= self.args.updates

    def _saving_update(self) -> AbstractContextManager[Save]:
        """Where this update is to be saved (`save_rollouts`), what does it; else nothing."""
        number = self.update_index + 1
        if not self.args.save_rollouts or number % self.args.save_rollouts:
            return nullcontext(lambda rollout, logged: None)
        folder, state = update_folder(self.args.output_dir, number), ppo_state.gathered(self)

        def write(inner: Path) -> None:
            ppo_state.write(self, state, inner)
            mark_complete(inner, resume_settings(self.args, PPOConfig))

        return saving_update(folder, self.accelerator, write, self._origin, self.processing_class, self._peft_config)

    def _read(self, dataset: Any, name: str) -> tuple[list[Prompt], list[list[int]]]:
        if dataset is None:
            raise InputError(f"{name} is missing; pass prompts: a path, a datasets.Dataset or a list of rows")
        prompts = records.read_prompts(dataset)
        return encode_prompts(self.processing_class, prompts, self.args.max_prompt_tokens, name)

    def _plan(self, lengths: Sequence[int], inner_epoch: int) -> list[list[list[int]]]:
        args, models, here = self.args, self.actor_critic, (self.draws.process, self.draws.processes)
        generator = self.draws.generator("plan", self.update_index, extra=inner_epoch)
        tokens, launch = models.most_tokens(args.tokens_per_microbatch), LAUNCH_TOKENS.get(self.device.type, FEWEST)
        plan = plan_minibatches(lengths, args.minibatch_size, tokens, generator, *here, launch, not models.packs)
        return sharding.even_plan(plan, self.module)

    def _moments(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and population variance over the real tokens of all processes."""
        count = self._sum(mask.sum())
        mean = torch.tensor(self._sum(torch.where(mask, x, 0.0).double().sum()) / count)
        spread = torch.where(mask, (x.double() - mean).square(), 0.0).sum()
        return mean.float(), torch.tensor(self._sum(spread) / count).float()

    def _sum(self, value: float | Tensor) -> float:
        if self.accelerator.num_processes == 1:
            return float(value)
        tensor = torch.as_tensor(float(value), dtype=torch.float64, device=self.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _joined(self, shares: dict[str, Tensor]) -> dict[str, float]:
        """A minibatch's statistics over all processes, in one exchange."""
        gathered = self.accelerator.gather(torch.stack([share.float() for share in shares.values()])[None]).cpu()
        largest, total = gathered.amax(0).tolist(), gathered.sum(0).tolist()
        return {name: largest[i] if name in LARGEST else total[i] for i, name in enumerate(shares)}

    def _due(self, every: int, metrics: dict[str, float]) -> bool:
        return every > 0 and (self.update_index % every == 0 or self._finished(metrics))


def _frozen_base(model: Any) -> bool:
    """Only adapters are trained, so the base can be kept in the precision that it computes in."""
    return isinstance(model, str | Path) and is_adapter(model)
