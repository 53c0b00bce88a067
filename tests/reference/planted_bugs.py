"""The bugs that real PPO trainers shipped, each as a small edit of our sources, with the test that fails under it.

    python tests/reference/planted_bugs.py tests/README.md      writes the table there

tests/test_planted_bugs.py plants each of them in a copy of the repository and runs its test.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

TABLE = ("<!-- bugs: python tests/reference/planted_bugs.py tests/README.md -->", "<!-- end of bugs -->")


@dataclass(frozen=True, kw_only=True)
class Plant:
    """`old` stands exactly once in `file`; with `new` in its place, the test fails."""

    name: str
    bug: str
    shipped: str
    """Where it was reported: repository and issue."""
    file: str
    old: str
    new: str
    test: str
    here: str = ""
    """What keeps it out here, where that is more than getting the formula right."""

    def planted(self, text: str) -> str:
        return text.replace(self.old, self.new)


PLANTS = (
    # -- Gradient changes with the micro-batch split, for actor or critic
    Plant(
        name="policy_loss_per_micro_batch",
        bug="the policy's gradient changes with the split into micro-batches",
        shipped="verl#6957, trl#321, NeMo-RL#212",
        file="rlhf/ppo/trainer.py",
        old="old.mask, args.clip_ratio, count, old.importance)",
        new="old.mask, args.clip_ratio, None, old.importance)",
        test="tests/test_invariance.py::test_micro_batches[1-ppo-full]",
        here="losses are divided by the real tokens of the whole minibatch",
    ),
    Plant(
        name="value_loss_per_micro_batch",
        bug="the value model's gradient changes with the split into micro-batches",
        shipped="verl#6957, trl#321, NeMo-RL#212",
        file="rlhf/ppo/trainer.py",
        old="old.mask, args.clip_value, count)",
        new="old.mask, args.clip_value, None)",
        test="tests/test_invariance.py::test_micro_batches[1-ppo-full]",
        here="losses are divided by the real tokens of the whole minibatch",
    ),
    Plant(
        name="loss_averaged_over_processes",
        bug="the gradient changes with the number of processes: their mean instead of their sum",
        shipped="verl#6957, trl#321, NeMo-RL#212",
        file="rlhf/ppo/trainer.py",
        old="self.accelerator.backward(loss * self.accelerator.num_processes)",
        new="self.accelerator.backward(loss)",
        test="tests/test_invariance.py::test_two_processes[forked-ppo-full]",
    ),
    # -- optimizer steps != epochs x minibatches
    Plant(
        name="step_per_micro_batch",
        bug="optimizer steps are not inner epochs times minibatches: one per micro-batch",
        shipped="trl#5645",
        file="rlhf/ppo/trainer.py",
        old="in rollout.plan if inner_epoch == 0 else",
        new="in [[rows] for whole in rollout.plan for rows in whole] if inner_epoch == 0 else",
        test="tests/ppo/test_trainer.py::test_optimizer_steps_are_inner_epochs_times_minibatches",
    ),
    # -- gradient clip that clips a copy, or nothing
    Plant(
        name="clips_a_copy",
        bug="gradient clipping clips a copy",
        shipped="NeMo-RL#1158",
        file="rlhf/ppo/trainer.py",
        old="clip(group, limit)",
        new='clip([type("Copy", (), {"grad": p.grad.clone()}) for p in group], limit)',
        test="tests/ppo/test_trainer.py::test_gradients_are_clipped_apart_and_really",
    ),
    Plant(
        name="clips_nothing",
        bug="gradient clipping is set, and clips nothing",
        shipped="trl's PPO",
        file="rlhf/ppo/trainer.py",
        old="clip(group, limit)",
        new="torch.nn.utils.get_total_norm([p.grad for p in group])",
        test="tests/ppo/test_trainer.py::test_gradients_are_clipped_apart_and_really",
    ),
    # -- ratio != 1 at step 0
    Plant(
        name="ratio_at_step_0",
        bug="the ratio is not 1 at the first step: old log-probs come from other micro-batches than the update's",
        shipped="trlx#107, trl#454",
        file="rlhf/ppo/trainer.py",
        old="for rows in (rows for minibatch in micro_batches for rows in minibatch):",
        new="for rows in [[row] for row in range(len(prompt_ids))]:",
        test="tests/ppo/test_trainer.py::test_old_logprobs_come_from_the_micro_batches_of_the_first_inner_epoch",
        here="the first inner epoch uses the plan with which the old log-probs were computed",
    ),
    Plant(
        name="ratio_at_later_steps",
        bug="the ratio is not 1 at an update's first step: old log-probs come from the reference",
        shipped="trlx#107, trl#454",
        file="rlhf/ppo/rollout.py",
        old="logprobs=part(self.logprobs),",
        new="logprobs=part(self.reference_logprobs),",
        test="tests/ppo/test_trainer.py::test_step_0_is_exact",
    ),
    # -- left-padding changes results
    Plant(
        name="left_padding_in_sampling",
        bug="left padding changes what is sampled: positions count the padding",
        shipped="OpenRLHF#217, trlx#508",
        file="rlhf/sampling/decode.py",
        old="positions = (mask.long().cumsum(-1) - 1).clamp(min=0)",
        new="positions = torch.arange(mask.shape[1], device=device).expand(mask.shape)",
        test="tests/ppo/test_rollout.py::test_left_padding_with_learned_positions",
    ),
    Plant(
        name="left_padding_in_scoring",
        bug="left padding changes log-probs and values: positions count the padding",
        shipped="OpenRLHF#217, trlx#508",
        file="rlhf/padding.py",
        old="return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
        new="return torch.arange(attention_mask.shape[1]).expand(attention_mask.shape)",
        test="tests/ppo/test_actor_critic.py::test_neither_does_it_with_learned_positions[False]",
    ),
    # -- dropout on while scoring
    Plant(
        name="dropout_while_scoring",
        bug="dropout is on while log-probs are computed",
        shipped="verl#4708",
        file="rlhf/ppo/build.py",
        old="    disable_dropout(actor_critic)\n",
        new="",
        test="tests/ppo/test_trainer.py::test_dropout_in_the_models_configuration_is_off",
        here="probabilities are set to 0, so that train mode doesn't matter",
    ),
    # -- different temperature for old / new / reference / entropy
    Plant(
        name="temperature_of_sampling",
        bug="another temperature in sampling than in scoring",
        shipped="OpenRLHF#853, trl#3169",
        file="rlhf/ppo/trainer.py",
        old="self.args.max_new_tokens, self.args.temperature, generator)",
        new="self.args.max_new_tokens, 1.0, generator)",
        test="tests/ppo/test_trainer.py::test_logprobs_are_those_at_the_temperature_that_was_sampled",
    ),
    Plant(
        name="temperature_of_old_logprobs",
        bug="another temperature for the old log-probs",
        shipped="OpenRLHF#853, trl#3169",
        file="rlhf/ppo/trainer.py",
        old='self.module(batch, self.args.temperature, ("policy", "value", "reference"))',
        new='self.module(batch, 1.0, ("policy", "value", "reference"))',
        test="tests/ppo/test_trainer.py::test_logprobs_are_those_at_the_temperature_that_was_sampled",
    ),
    Plant(
        name="temperature_of_new_logprobs",
        bug="another temperature for the new log-probs",
        shipped="OpenRLHF#853, trl#3169",
        file="rlhf/ppo/trainer.py",
        old="self.device), self.args.temperature, roles)",
        new="self.device), 1.0, roles)",
        test="tests/ppo/test_trainer.py::test_step_0_is_exact",
    ),
    Plant(
        name="temperature_of_the_reference",
        bug="another temperature for the reference's log-probs",
        shipped="OpenRLHF#853, trl#3169",
        file="rlhf/ppo/actor_critic.py",
        old="hidden_logprobs(model, hidden, batch, temperature)\n",
        new='hidden_logprobs(model, hidden, batch, temperature if role == "policy" else 1.0)\n',
        test="tests/ppo/test_trainer.py::test_logprobs_are_those_at_the_temperature_that_was_sampled",
    ),
    Plant(
        name="temperature_of_the_entropy",
        bug="another temperature for the entropy",
        shipped="OpenRLHF#853, trl#3169",
        file="rlhf/models/logprobs.py",
        old="total.log() - mean,",
        new="total.log() - mean * temperature,",
        test="tests/ppo/test_math.py::test_logprobs_and_entropy_by_the_definition",
    ),
    # -- log-prob of the argmax instead of the sampled token
    Plant(
        name="logprob_of_the_argmax",
        bug="the log-prob of the most likely token instead of the sampled one",
        shipped="NeMo-RL#3297",
        file="rlhf/models/logprobs.py",
        old="logits.gather(-1, y) - top",
        new="logits.amax(-1, keepdim=True) - top",
        test="tests/ppo/test_math.py::test_the_sampled_token_counts_and_not_the_most_likely_one",
    ),
    # -- bf16 log-softmax
    Plant(
        name="bf16_log_softmax",
        bug="the log-softmax is computed in bfloat16",
        shipped="OpenRLHF#634",
        file="rlhf/models/logprobs.py",
        old="return logits.float() if temperature == 1.0 else logits.float().div_(temperature)",
        new="return logits if temperature == 1.0 else logits.div_(temperature)",
        test="tests/ppo/test_math.py::test_log_softmax_of_bf16_states_is_float32",
    ),
    # -- KL sign and clamps that kill its gradient
    Plant(
        name="kl_is_a_reward",
        bug="the KL's sign in the reward: leaving the reference pays",
        shipped="verl#179",
        file="rlhf/ppo/math.py",
        old="torch.where(mask, -kl_coef * kl.float(), 0.0)",
        new="torch.where(mask, kl_coef * kl.float(), 0.0)",
        test="tests/ppo/test_math.py::test_rewards_by_hand",
    ),
    Plant(
        name="kl_sign_of_the_estimate",
        bug="the KL's sign in the estimate: reference minus policy",
        shipped="verl#179",
        file="rlhf/ppo/math.py",
        old="difference = logprobs.float() - reference_logprobs.float()",
        new="difference = reference_logprobs.float() - logprobs.float()",
        test="tests/ppo/test_math.py::test_kl_estimates_by_hand",
    ),
    Plant(
        name="kl_clamped",
        bug="a clamp of the KL kills its gradient",
        shipped="NeMo-RL#2958",
        file="rlhf/ppo/math.py",
        old="        return difference\n",
        new="        return difference.clamp(-20.0, 20.0)\n",
        test="tests/ppo/test_math.py::test_kl_keeps_its_gradient_however_large",
        here="the KL is part of the reward, where nothing hangs on its gradient; it has one all the same",
    ),
    # -- KL controller fed per-token for per-sequence KL
    Plant(
        name="kl_controller_per_token",
        bug="the KL controller is fed the KL per token, its target is per response",
        shipped="trlx#361, verl#1984",
        file="rlhf/ppo/trainer.py",
        old='kl, responses = metrics["kl_nats"],',
        new='kl, responses = metrics["kl_nats"] / metrics["response_tokens"],',
        test="tests/ppo/test_trainer.py::test_the_kl_coefficient_follows_ziegler",
    ),
    # -- logged KL != trained KL
    Plant(
        name="logged_kl",
        bug="the KL that is logged is not the KL that is trained on",
        shipped="trl#1161",
        file="rlhf/ppo/logged.py",
        old="mask, kl = rollout.mask, rollout.kl",
        new='mask, kl = rollout.mask, ppo_math.kl_estimate(rollout.logprobs, rollout.reference_logprobs, "k3")',
        test="tests/ppo/test_trainer.py::test_rewards_advantages_and_returns_against_the_slow_loops",
    ),
    # -- terminal score on the wrong index
    Plant(
        name="score_on_padding",
        bug="the score lands on the last column, which is padding in shorter responses",
        shipped="trl#3750, trl#5338",
        file="rlhf/ppo/math.py",
        old="last = mask.sum(-1, keepdim=True) - 1",
        new="last = torch.full_like(mask[:, :1], mask.shape[1] - 1, dtype=torch.long)",
        test="tests/ppo/test_math.py::test_score_lands_on_the_last_real_token_and_kl_costs",
    ),
    Plant(
        name="score_one_too_late",
        bug="the score lands one token behind the response",
        shipped="trl#3750, trl#5338",
        file="rlhf/ppo/math.py",
        old="last = mask.sum(-1, keepdim=True) - 1",
        new="last = mask.sum(-1, keepdim=True).clamp(max=mask.shape[1] - 1)",
        test="tests/ppo/test_math.py::test_score_lands_on_the_last_real_token_and_kl_costs",
    ),
    # -- EOS penalty looking at the wrong stop token
    Plant(
        name="penalty_knows_one_stop_token",
        bug="the penalty for a missing stop looks at one stop token only",
        shipped="trl#5338",
        file="rlhf/sampling/decode.py",
        old="[response[-1] in self.stop_ids for response in ids]",
        new="[response[-1] == self.stop_ids[-1] for response in ids]",
        test="tests/ppo/test_rollout.py::test_every_stop_id_stops_and_is_kept",
        here="`stopped` comes from the engine that stopped, and is stored",
    ),
    Plant(
        name="end_of_turn_is_no_stop",
        bug="the tokenizer's eos is looked for, while the chat template ends a turn with another token",
        shipped="trl#5338",
        file="rlhf/chat/encoding.py",
        old="ids = [end_of_turn_id(tokenizer), *ends, tokenizer.eos_token_id]",
        new="ids = [tokenizer.eos_token_id]",
        test="tests/chat/test_encoding.py::test_stop_ids_and_template_hash",
    ),
    Plant(
        name="penalty_of_those_that_stopped",
        bug="the penalty for a missing stop hits the responses that stopped",
        shipped="trl#5338",
        file="rlhf/scores.py",
        old="return torch.where(stopped, scores, -penalty)",
        new="return torch.where(stopped, -penalty, scores)",
        test="tests/test_scores.py::test_the_missing_stop",
    ),
    # -- masks inferred from pad ids when pad == eos
    Plant(
        name="response_mask_from_pad_ids",
        bug="the mask of prompts and responses is inferred from the pad id",
        shipped="trl#4974",
        file="rlhf/padding.py",
        old="mask[i, real] = True",
        new="mask[i, real] = torch.tensor(row) != fill",
        test="tests/ppo/test_rollout.py::test_pad_takes_its_mask_from_lengths",
        here="masks come from lengths",
    ),
    Plant(
        name="reward_model_mask_from_pad_ids",
        bug="the reward model's mask is inferred from the pad id",
        shipped="trl#4974",
        file="reward_models/scoring.py",
        old="last_token_scores(model, input_ids, mask, packs)",
        new="last_token_scores(model, input_ids, input_ids != pad_id, packs)",
        test="tests/reward_models/test_scoring.py::test_pad_may_be_the_end_of_turn",
        here="masks come from lengths",
    ),
    # -- values after EOS leaking through GAE
    Plant(
        name="values_behind_the_stop",
        bug="values behind the stop token leak through GAE",
        shipped="verl#50",
        file="rlhf/ppo/math.py",
        old="    values = torch.where(mask, values.float(), 0.0)\n",
        new="    values = values.float()\n",
        test="tests/ppo/test_math.py::test_gae_against_the_double_sum",
        here="the model's values are 0 on padding, and GAE doesn't rely on it",
    ),
    # -- whitening over padding, or along the wrong axis; torchtune's `whiten` has its shift inverted
    Plant(
        name="whitening_over_padding",
        bug="advantages are standardized over padding, too",
        shipped="OpenRLHF#1250, verl#2377",
        file="rlhf/ppo/trainer.py",
        old="mean_and_variance(self.accelerator, advantages, trained)",
        new="mean_and_variance(self.accelerator, advantages, torch.ones_like(trained))",
        test="tests/ppo/test_trainer.py::test_rewards_advantages_and_returns_against_the_slow_loops",
    ),
    Plant(
        name="whitening_per_response",
        bug="advantages are standardized along the wrong axis: each response by itself",
        shipped="OpenRLHF#1250, verl#2377",
        file="rlhf/ppo/trainer.py",
        old="ppo_math.standardize(advantages, trained, moments)",
        new="torch.cat([ppo_math.standardize(a[None], m[None]) for a, m in zip(advantages, mask, strict=True)])",
        test="tests/ppo/test_trainer.py::test_rewards_advantages_and_returns_against_the_slow_loops",
    ),
    Plant(
        name="whitening_keeps_the_mean",
        bug="standardizing keeps the mean where it should take it away",
        shipped="torchtune's `whiten`",
        file="rlhf/ppo/math.py",
        old="(x.float() - mean) * torch.rsqrt(var + 1e-8), 0.0)",
        new="(x.float() - mean) * torch.rsqrt(var + 1e-8) + mean, 0.0)",
        test="tests/ppo/test_math.py::test_standardize_by_hand",
        here="two formulas are two functions, `standardize` and `rescale`; no flag says which",
    ),
    Plant(
        name="rescaling_loses_the_mean",
        bug="rescaling takes the mean away where it should keep it",
        shipped="torchtune's `whiten`",
        file="rlhf/ppo/math.py",
        old="(x.float() - mean) * torch.rsqrt(var + 1e-8) + mean, 0.0)",
        new="(x.float() - mean) * torch.rsqrt(var + 1e-8), 0.0)",
        test="tests/ppo/test_math.py::test_standardize_by_hand",
        here="two formulas are two functions, `standardize` and `rescale`; no flag says which",
    ),
    # -- metrics over padding
    Plant(
        name="entropy_over_padding",
        bug="a metric of the rollout is a mean over padding, too: the entropy",
        shipped="trl#2022",
        file="rlhf/ppo/logged.py",
        old="(rollout.entropy * mask).sum(-1) / lengths",
        new="rollout.entropy.mean(-1)",
        test="tests/ppo/test_trainer.py::test_metrics_of_a_rollout_count_real_tokens_only",
    ),
    Plant(
        name="explained_variance_over_padding",
        bug="a metric of the rollout is taken over padding, too: the explained variance",
        shipped="trl#2022",
        file="rlhf/ppo/logged.py",
        old="ppo_math.explained_variance(values, returns, real.bool())",
        new="ppo_math.explained_variance(values, returns, torch.ones_like(real).bool())",
        test="tests/ppo/test_trainer.py::test_metrics_of_a_rollout_count_real_tokens_only",
    ),
    Plant(
        name="clip_fraction_over_padding",
        bug="a metric of the loss is a mean over padding, too: the clip fraction",
        shipped="trl#2022",
        file="rlhf/ppo/math.py",
        old="clip_fraction=masked_mean((clipped < unclipped).float(), mask, count)",
        new="clip_fraction=(clipped < unclipped).float().mean()",
        test="tests/ppo/test_math.py::test_policy_loss_against_the_slow_loop",
    ),
    # -- score 0.0 taken for missing
    Plant(
        name="zero_is_missing",
        bug="a score of 0.0 is taken for a missing one",
        shipped="OpenRLHF#1219",
        file="rlhf/scores.py",
        old="        if answer is None:\n            continue",
        new="        if not answer:\n            continue",
        test="tests/test_scores.py::test_a_score_of_zero_is_a_score",
    ),
    # -- last rollout batch not trained
    Plant(
        name="last_minibatch_not_trained",
        bug="the last minibatch of a rollout is not trained on",
        shipped="OpenRLHF#1300",
        file="rlhf/ppo/trainer.py",
        old="in rollout.plan if inner_epoch == 0 else",
        new="in rollout.plan[:-1] if inner_epoch == 0 else",
        test="tests/ppo/test_trainer.py::test_every_response_is_trained_once_per_inner_epoch",
    ),
    Plant(
        name="last_rollout_not_trained",
        bug="the last rollout is not trained on",
        shipped="OpenRLHF#1300",
        file="rlhf/ppo/run.py",
        old="return early or self.trainer.update_index >= self.trainer.args.updates",
        new="return early or self.trainer.update_index >= self.trainer.args.updates - 1",
        test="tests/ppo/test_trainer.py::test_learning_rates_fall_by_update",
    ),
    # -- loss over pads in the reward model
    Plant(
        name="reward_loss_over_pads",
        bug="the reward model's loss reads scores on padding",
        shipped="DeepSpeedExamples#316",
        file="reward_models/trainer.py",
        old="last = mask.sum(-1, keepdim=True) - 1  # padded on the right",
        new="last = torch.full_like(mask[:, :1], mask.shape[1] - 1)",
        test="tests/reward_models/test_trainer.py::test_the_loss_is_that_of_a_slow_loop",
    ),
    Plant(
        name="score_read_on_pads",
        bug="a trained reward model's score is read on padding",
        shipped="DeepSpeedExamples#316",
        file="rlhf/models/scalar.py",
        old="last = torch.where(real, indices, -1).amax(-1)",
        new="last = torch.full_like(mask[:, 0], mask.shape[1] - 1)",
        test="tests/reward_models/test_scoring.py::test_padding_side_and_width_do_not_change_a_score",
    ),
    # -- reward model re-scored differently after save/reload, head or normaliser lost
    Plant(
        name="normaliser_not_saved",
        bug="the reward model's normaliser is not saved",
        shipped="OpenRLHF#643, OpenRLHF#1342, OpenRLHF#1343",
        file="reward_models/trainer.py",
        old="self.normalizer.save(output_dir or self.config.output_dir)",
        new="pass",
        test="tests/reward_models/test_trainer.py::test_a_saved_model_scores_as_it_did_in_training",
    ),
    Plant(
        name="normaliser_not_loaded",
        bug="the reward model's normaliser is not loaded",
        shipped="OpenRLHF#643, OpenRLHF#1342, OpenRLHF#1343",
        file="rlhf/models/scalar.py",
        old="return model.eval(), ScoreNormalizer.load(path)",
        new="return model.eval(), ScoreNormalizer()",
        test="tests/reward_models/test_trainer.py::test_a_saved_model_scores_as_it_did_in_training",
    ),
    Plant(
        name="normaliser_twice",
        bug="after a reload, the reward model's scores are normalised once more",
        shipped="OpenRLHF#643, OpenRLHF#1342, OpenRLHF#1343",
        file="reward_models/scoring.py",
        old="return self.normalizer(self.raw_scores(conversations))",
        new="once = self.normalizer(self.raw_scores(conversations))\n"
        "        return once if self.folder is None else self.normalizer(once)",
        test="tests/reward_models/test_trainer.py::test_a_saved_model_scores_as_it_did_in_training",
    ),
    Plant(
        name="head_lost_with_lora",
        bug="a LoRA reward model's head is neither trained nor saved",
        shipped="trl#1379",
        file="reward_models/model.py",
        old="adapter.modules_to_save = sorted({*heads, *(adapter.modules_to_save or [])})",
        new="adapter.task_type = TaskType.FEATURE_EXTRACTION",
        test="tests/reward_models/test_trainer.py::test_a_lora_head_is_trained_and_survives",
    ),
    # -- resume that silently starts a fresh Adam or loses the KL coefficient, sampler or RNG
    Plant(
        name="resume_with_a_fresh_adam",
        bug="a resumed run starts with a fresh Adam",
        shipped="NeMo-RL#3171",
        file="rlhf/ppo/trainer.py",
        old='        distributed.load_optimizer_state(self.optimizer, state["optimizer"])\n',
        new="",
        test="tests/ppo/test_trainer.py::test_resume_is_exact_and_logs_every_update_once",
    ),
    Plant(
        name="resume_loses_the_kl_coefficient",
        bug="a resumed run starts with the first KL coefficient",
        shipped="verl#2653",
        file="rlhf/ppo/trainer.py",
        old='        self.kl_coef = state["kl_coef"]\n',
        new="",
        test="tests/ppo/test_trainer.py::test_resume_is_exact_and_logs_every_update_once",
    ),
    Plant(
        name="resume_loses_the_sampler",
        bug="a resumed run starts with the first prompts again",
        shipped="NeMo-RL#3171, verl#2653",
        file="rlhf/ppo/plan.py",
        old="        first = update * rollout_size\n",
        new='        asked = self.__dict__.setdefault("_asked", [-1])\n        asked[0] += 1\n'
        "        first = asked[0] * rollout_size\n",
        test="tests/ppo/test_trainer.py::test_resume_is_exact_and_logs_every_update_once",
        here="the prompts are a pure function of seed and update",
    ),
    Plant(
        name="resume_loses_the_samplings_rng",
        bug="a resumed run draws its responses from the beginning of the random stream",
        shipped="NeMo-RL#3171, verl#2653",
        file="rlhf/ppo/plan.py",
        old="        seeds = [_mix(self.seed, 2, update, place) for place in places]\n",
        new='        asked = self.__dict__.setdefault("_sampled", [-1])\n        asked[0] += 1\n'
        "        seeds = [_mix(self.seed, 2, asked[0], place) for place in places]\n",
        test="tests/ppo/test_trainer.py::test_resume_is_exact_and_logs_every_update_once",
        here="sampling and minibatches are drawn by generators that are pure functions of seed and update",
    ),
    Plant(
        name="resume_loses_the_global_rng",
        bug="a resumed run loses the global random states, from which reward functions may draw",
        shipped="NeMo-RL#3171, verl#2653",
        file="rlhf/ppo/run.py",
        old='restore_random_state(state["random"][trainer.accelerator.process_index])',
        new="pass",
        test="tests/run/test_resume.py::test_the_global_random_states_and_users_callbacks_go_on_too",
    ),
    # -- learning-rate schedule counted per process
    Plant(
        name="schedule_per_process",
        bug="PPO's learning-rate schedule goes faster with more processes",
        shipped="LLaMA-Factory#424",
        file="rlhf/ppo/trainer.py",
        old="args.learning_rates(self.update_index)",
        new="args.learning_rates(self.update_index * accelerator.num_processes)",
        test="tests/test_invariance.py::test_two_processes[forked-ppo-full]",
        here="the schedule is a pure function of the update",
    ),
    Plant(
        name="steps_per_process",
        bug="the reward model's optimizer steps, and so its schedule, are counted per process",
        shipped="LLaMA-Factory#424",
        file="rlhf/run/trl_arguments.py",
        old="share = batch_size // processes",
        new="share = batch_size",
        test="tests/test_invariance.py::test_two_processes[forked-reward_model-full]",
    ),
    # -- engine and trainer disagree, and the correction is wrong
    Plant(
        name="importance_weights_not_truncated",
        bug="the weights that correct for the engine's probabilities are not truncated",
        shipped="none known",
        file="rlhf/ppo/math.py",
        old="torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)",
        new="torch.where(mask, log_ratio.exp(), 0.0)",
        test="tests/ppo/test_math.py::test_importance_weights_by_hand",
    ),
    Plant(
        name="importance_weights_upside_down",
        bug="the weights that correct for the engine's probabilities are upside down: engine over trainer",
        shipped="none known",
        file="rlhf/ppo/math.py",
        old="logprobs.detach().float() - engine_logprobs.float()",
        new="engine_logprobs.float() - logprobs.detach().float()",
        test="tests/ppo/test_math.py::test_importance_weights_by_hand",
    ),
    Plant(
        name="importance_weights_unused",
        bug="the weights that correct for the engine's probabilities are computed and not used",
        shipped="none known",
        file="rlhf/ppo/math.py",
        old="    if weights is not None:\n",
        new="    if weights is not None and count is None:\n",
        test="tests/sampling/test_vllm.py::test_the_loss_is_weighted_and_the_value_loss_is_not",
    ),
    Plant(
        name="engine_keeps_old_weights",
        bug="the engine goes on sampling with the weights that it started with",
        shipped="verl#7495, verl#5220",
        file="rlhf/sampling/vllm_transport.py",
        old='            self.server.post("/collective_rpc", reload)\n',
        new="            _ = reload\n",
        test="tests/sampling/test_vllm.py::test_ppo_trains_with_it_and_the_server_has_the_current_weights[full-None]",
        here="log-probabilities are compared each time weights were sent",
    ),
    Plant(
        name="engine_logprobs_leave_out_the_temperature",
        bug="the engine's log-probabilities leave out the temperature",
        shipped="trl#4159",
        file="rlhf/sampling/vllm_check.py",
        old="    off = apart(server.sampled, trainer.sampled)\n",
        new="    off = 0.0\n",
        test="tests/sampling/test_vllm_faults.py::"
        "test_a_server_that_does_something_else_is_caught_at_once[raw logprobs]",
        here="log-probabilities at the run's temperature are compared, too",
    ),
    # -- the saved checkpoint is not the policy
    Plant(
        name="saved_model_is_the_reference",
        bug="what is saved is not the policy but the model it started from",
        shipped="trl#5151",
        file="rlhf/ppo/actor_critic.py",
        old="            self.policy.save_pretrained(str(folder), **given)\n",
        new="            (self.reference or self.policy).save_pretrained(str(folder), **given)\n",
        test="tests/ppo/test_trainer.py::test_save_model_saves_the_policy_that_was_trained",
    ),
    Plant(
        name="saved_adapter_is_the_reference",
        bug="with LoRA, what is saved is not the policy's adapter but the one it started from",
        shipped="trl#5151",
        file="rlhf/ppo/actor_critic.py",
        old="            self.policy.save_pretrained(str(folder), selected_adapters",
        new='            given["state_dict"] = {\n'
        '                name.replace(".reference.", ".default."): p\n'
        "                for name, p in self.policy.state_dict().items()\n"
        '                if ".default." not in name\n'
        "            }\n"
        "            self.policy.save_pretrained(str(folder), selected_adapters",
        test="tests/ppo/test_trainer.py::test_save_model_saves_the_policy_that_was_trained",
    ),
    # -- process rewards
    Plant(
        name="neutral_step_as_wrong",
        bug="a neutral step (PRM800K's 0) is learned as a wrong one",
        shipped="trl's PRM800K rows, up to 1.13",
        file="reward_models/losses.py",
        old="signed = torch.where(labels < 0, -logits.float(), logits.float())",
        new="signed = torch.where(labels <= 0, -logits.float(), logits.float())",
        test="tests/reward_models/test_process_trainer.py::test_the_loss_is_that_of_a_slow_loop[0.0-scalar]",
    ),
    Plant(
        name="step_label_on_another_token",
        bug="a step's label stands on the token before its last one",
        shipped="not known to be",
        file="reward_models/process.py",
        old="    places = [len(prompt) + end for end in ends]\n",
        new="    places = [len(prompt) + end - 1 for end in ends]\n",
        test="tests/reward_models/test_process_trainer.py::test_the_loss_is_that_of_a_slow_loop[0.0-scalar]",
        here="the test finds the tokens by the tokenizer's own offsets",
    ),
    Plant(
        name="step_labels_on_the_prompt",
        bug="steps are counted from the prompt's first token",
        shipped="not known to be",
        file="reward_models/process.py",
        old="    places = [len(prompt) + end for end in ends]\n",
        new="    places = list(ends)\n",
        test="tests/reward_models/test_process.py::test_probabilities_are_those_of_a_plain_forward_up_to_each_step[scalar]",
    ),
    Plant(
        name="separator_tokenised_away",
        bug="a tokenizer that loses the separator makes one step of several, without a word",
        shipped="not known to be",
        file="reward_models/process.py",
        old="    if len(ends) != len(spans):\n",
        new="    if len(ends) > len(spans):\n",
        test="tests/reward_models/test_process.py::test_a_tokenizer_that_loses_the_separator_is_refused",
    ),
    Plant(
        name="step_score_behind_its_step",
        bug="PPO's step score stands one token behind its step",
        shipped="not known to be",
        file="reward_models/process.py",
        old="            scores[end] += change\n",
        new="            scores[min(end + 1, len(scores) - 1)] += change\n",
        test="tests/reward_models/test_process.py::test_step_scores_stand_at_the_steps_last_tokens",
    ),
)


def table() -> str:
    """The bugs as rows of a Markdown table, in the order of PLANTS."""
    rows = ["| bug | shipped in | planted in | the test that fails | kept out by |", "|---|---|---|---|---|"]
    for plant in PLANTS:
        cells = (plant.bug, plant.shipped, f"`{plant.file}`", f"`{plant.test.removeprefix('tests/')}`", plant.here)
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def main(file: str) -> None:
    """Rewrite the table between the two marks in a Markdown file."""
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    before, after = text.split(TABLE[0])[0], text.split(TABLE[1])[1]
    path.write_text(f"{before}{TABLE[0]}\n{table()}\n{TABLE[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
