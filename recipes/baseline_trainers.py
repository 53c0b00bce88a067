"""What trl's trainers get for `rlhf baseline`: the run's model, its rankings or scored prompts, checkpoints as ours."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import trl
from datasets import Dataset, Features, Json, Value
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback

from rlhf import chat, scores
from rlhf import config as configs
from rlhf.config import to_dict
from rlhf.errors import InputError
from rlhf.models import loading as models
from rlhf.models.adapters import drop_input_hooks, is_adapter, lora_config
from rlhf.models.positions import check_responses
from rlhf.ppo.inputs import prompts_of
from rlhf.rows.records import BadRows, Prompt, read_judged, read_rankings
from rlhf.run.callbacks import Babysitter, attach
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype, log_choice
from rlhf.run.trl_arguments import training_arguments
from rlhf.sampling.engine import model_stop_ids
from rlhf.sampling.generate import generating_by
from rlhf.urls import is_url
from rlhf_recipes.baseline_config import FROM_RANKINGS, BaselineConfig
from rlhf_recipes.baseline_rows import fitting, labelled, pairs, weighing
from rlhf_recipes.stage import Stage

if TYPE_CHECKING:
    from rlhf.scores import RewardFunction

log = logging.getLogger("rlhf")

TRAINERS: dict[str, Any] = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
}
SHOWN = {
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"), "kto": ("loss", "rewards/margins"),
    "grpo": ("reward", "kl", "completions/mean_length"), "rloo": ("reward", "kl", "completions/mean_length"),
}  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """trl's trainer, and what gives it our checkpoints, alarms and signals."""

    trainer: Any
    babysitter: Babysitter

    def train(self) -> Any:
        """Train, from the newest complete checkpoint if there is one; return the trainer. `generate` would add to
        trl's settings those of the model's own that trl leaves out."""
        plain = generating_by(self.trainer.model, GenerationConfig())
        with plain, self.babysitter.watch(True) as checkpoint:
            self.trainer.train(None if checkpoint is None else str(checkpoint))
        drop_input_hooks(self.trainer.model)
        return self.trainer


def build(config: BaselineConfig, stage: Stage) -> Watched:
    """Read and check what the method learns from, and make its trainer."""
    tokenizer = models.load_tokenizer(str(config.model))
    policy, adapter = load(config, tokenizer)
    trainer_class, arguments_class = TRAINERS[config.method]
    given: dict[str, Any] = {"model": policy, "processing_class": tokenizer, "peft_config": adapter}
    settings = merged(config)
    if config.method in FROM_RANKINGS:
        read, make = (read_rankings, pairs) if config.method == "dpo" else (read_judged, labelled)
        judged = weighing(read(config.train_data, on_bad_row=config.on_bad_row))
        judged = fitting(judged, tokenizer, config)
        given |= {"train_dataset": dataset(make(judged, tokenizer, config.seed))}
        arguments = training_arguments(settings, arguments_class, max_length=None, beta=config.own.beta)
    else:
        prompts, ids = prompts_of("train_dataset", config.train_data, tokenizer, cast(Any, config), config.on_bad_row)
        check_responses(policy, ids, config.max_new_tokens)
        prompts = rendered_alike(prompts, tokenizer, config)
        scorer = Scored(config, prompts, tokenizer, model_stop_ids(policy, tokenizer))
        given |= {"train_dataset": dataset(prompt_rows(config, prompts, tokenizer)), "reward_funcs": scorer}
        arguments = training_arguments(settings, arguments_class, **online_arguments(config, tokenizer))
    log_choice(config.bf16)
    trainer = trainer_class(args=arguments, **given)
    trainer.create_model_card = lambda *args, **kwargs: None  # trl's names no base model
    attach(trainer, config.method, SHOWN[config.method], stage.folder)
    babysitter = Babysitter(trainer, stage.inputs, config.save_total_limit, config.on_alarm)
    if config.method not in FROM_RANKINGS:
        trainer.add_callback(AtRollouts(config.own.steps_per_update))
    return Watched(trainer, babysitter)


def merged(config: BaselineConfig) -> SimpleNamespace:
    """Return the settings of the method among those that all share, under the names that trl's arguments are made
    from."""
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    own = {name: value for name, value in to_dict(config.own).items() if name != "beta"}
    shared = {name: value for name, value in to_dict(config).items() if not isinstance(value, dict)}
    return SimpleNamespace(**shared | own | {"lr_schedule": schedules[config.lr_schedule]})


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows as trl takes them. Messages, tools and a template's settings are JSON: Arrow would give all of a
    column's objects the same keys, with nulls that a template may render."""
    plain = {"label": Value("bool"), "row": Value("int64")}
    return Dataset.from_list(rows, features=Features({name: plain.get(name, Json()) for name in rows[0]}))


def online_arguments(config: BaselineConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what GRPO and RLOO call our settings. An update is a rollout and its optimizer steps."""
    own, steps = config.own, config.own.steps_per_update
    return {
        "max_steps": own.updates * steps,
        "save_steps": (own.save_steps or 1) * steps,
        "logging_steps": config.logging_steps * steps,
        "generation_batch_size": own.rollout_size,
        "num_generations": own.generations,
        "num_iterations": own.inner_epochs,
        "epsilon": own.clip_ratio,
        "beta": own.beta,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "chat_template_kwargs": chat.template_kwargs(tokenizer),
        "disable_dropout": True,
        "shuffle_dataset": False,  # `prompt_rows` has
    }


def load(config: BaselineConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """Load the policy to train, and the config of a new adapter, if any. What it is now becomes trl's reference: the
    folder's weights, a frozen copy of its adapter, or the policy without the new adapter."""
    adapter = lora_config(config.lora_rank, config.lora_alpha, 0.0, config.lora_target_modules)
    frozen = adapter is not None or is_adapter(str(config.model))
    policy = models.load_policy(str(config.model), dtype=compute_dtype(config.bf16) if frozen else torch.float32)
    if isinstance(policy, PeftModel) and adapter is not None:
        raise InputError("the model is already an adapter: leave out lora_rank to train it on")
    models.disable_dropout(policy)
    generation = policy.generation_config
    if generation is not None:
        generation.eos_token_id = list(model_stop_ids(policy, tokenizer))
    return policy, adapter


def save(trainer: Any, folder: Path) -> None:
    """Write the policy (without trl's frozen copy of its adapter) and its tokenizer."""
    model = trainer.model
    chosen = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    by_main(lambda: model.save_pretrained(str(folder), **chosen))
    by_main(lambda: trainer.processing_class.save_pretrained(str(folder)))


# --- from scores ----------------------------------------------------------------------------------------------------


def rendered_alike(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: BaselineConfig
) -> list[Prompt]:
    """Return the prompts that trl renders as we do: its GRPO and RLOO take the template's settings of a run, not of a
    row, and a row's tools not at all."""
    kept, refused = [], BadRows("train_data", config.on_bad_row)
    for prompt in prompts:
        _, tools, settings = chat.template_arguments(tokenizer, prompt.messages, prompt.columns)
        if tools or settings != chat.template_kwargs(tokenizer):
            seen = "tools" if tools else f"chat_template_kwargs: {settings}"
            todo = f"trl's {config.method.upper()} takes none of a row; take it out"
            refused.add(prompt.where, InputError(f"{seen}: {todo}"))
        else:
            kept.append(prompt)
    refused.tell(len(kept))
    return kept


def prompt_rows(
    config: BaselineConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return the prompts of all updates in their order, in trl's format, each with its number, by which the scorer
    finds its columns.

    The order is drawn here, pass by pass, since trl's sampler begins a resumed run with its first pass again."""
    count, order = config.own.updates * config.own.rollout_size // config.own.generations, list[int]()
    draw = random.Random(config.seed)
    while len(order) < count:
        order += draw.sample(range(len(prompts)), len(prompts))
    turns = [chat.template_arguments(tokenizer, prompt.messages)[0] for prompt in prompts]
    return [{"prompt": turns[row], "row": row} for row in order[:count]]


class Scored:
    """A reward function for trl's trainers that scores as PPO does: the run's reward model and functions, called with
    the same arguments and weighed, and the rule for responses without a stop token."""

    __name__ = "score"

    def __init__(
        self,
        config: BaselineConfig,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
    ) -> None:
        self.config, self.prompts, self.tokenizer, self.stops = config, prompts, tokenizer, tuple(stops)
        self.functions = scores.check_functions(score_functions(config))
        self.weights = config.reward_weights or [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            found = f"{len(self.weights)} numbers for {len(self.functions)} scores"
            raise InputError(f"reward_weights has {found}; give one each")
        scores.check_columns(self.functions, prompts, "train_data")
        self.calls = 0

    def __call__(self, completion_ids: Sequence[list[int]], row: Sequence[int], **others: Any) -> list[float]:
        prompts, ids = [self.prompts[number] for number in row], [list(one) for one in completion_ids]
        texts = [chat.decode_response(self.tokenizer, one, self.stops) for one in ids]
        answers = [
            chat.parse_response(self.tokenizer, text, prompt.columns)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        total, _ = scores.score_responses(
            self.functions, self.weights, prompts, texts, ids, columns=scores.columns_of(self.prompts), answers=answers,
            processing_class=self.tokenizer, stop_ids=self.stops,
        )  # fmt: skip
        self.calls += len(ids)
        stopped = torch.tensor([bool(one) and one[-1] in self.stops for one in ids])
        rule, penalty = self.config.missing_eos, self.config.missing_eos_penalty
        return scores.apply_missing_eos(total, stopped, rule, penalty).tolist()


def score_functions(config: BaselineConfig) -> list[RewardFunction]:
    """Return everything that scores a response, in the order of reward_weights."""
    from reward_models import RewardClient
    from reward_models.ensemble import load_scorer

    dtype = compute_dtype(config.bf16)
    functions: list[Any] = [load_scorer(config.reward_model, dtype=dtype)] if config.reward_model else []
    return functions + [
        RewardClient(spec) if is_url(spec) else configs.import_function(spec) for spec in config.reward_functions or []
    ]


class AtRollouts(TrainerCallback):
    """A callback that lets a run stop, and checkpoints be written, only between two rollouts: trl's buffer of sampled
    responses is in no checkpoint."""

    def __init__(self, steps_per_update: int) -> None:
        self.steps_per_update = steps_per_update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps_per_update:
            control.should_save = control.should_training_stop = False
