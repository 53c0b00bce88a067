"""Training a reward model on rankings: `RewardConfig` and `RewardTrainer`, on trl's.

trl's trainer compares pairs and averages their accuracy over batches. Ours takes K ranked responses per
prompt, scores each once, and learns from all their pairs (InstructGPT, section 3.5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from reward_models import losses
from reward_models.encoding import RankingCollator, encode_rankings, responses_of
from reward_models.scoring import score_sequences
from rlhf import InputError, chat, models
from rlhf.callbacks import MarkComplete
from rlhf.checkpoint import latest_checkpoint
from rlhf.entry import require_divides, training_arguments, use_bf16
from rlhf.models import ScoreNormalizer
from rlhf.records import Ranking, check_disjoint, read_rankings

@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Training a reward model."""

    output_dir: str = "reward_model"
    """Folder for checkpoints and metrics, and for the model that `save_model()` writes."""
    seed: int = 0
    """Draws the new head's weights and the order of the prompts."""
    epochs: float = 1.0
    """Passes over the training rankings. More than one overfits, most of all with many responses per prompt."""
    prompts_per_batch: int = 16
    """Prompts per optimizer step, over all processes; all responses to a prompt are in the same step."""
    microbatch_size: int = 4
    """Prompts per forward on one process. A memory setting: it changes no gradient."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW (InstructGPT: 9e-6 at 6B). LoRA wants about ten times as much."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to 0 (`constant`: it does not)."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round (below 0.5); for noisy labels."""
    max_length: int = 1024
    """Tokens of prompt and response together. A prompt with a longer response is left out, counted and named."""
    lora_rank: int = 0
    """Rank of a new LoRA adapter; 0 trains all weights, or continues the adapter that the model is."""
    lora_alpha: float = 32.0
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the input of a new LoRA adapter. Every other dropout is off."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter; null: every linear layer but the head."""
    eval_steps: int = 0
    """Evaluate every so many steps; 0: only when `evaluate()` is called."""
    max_eval_prompts: int = 0
    """Evaluate on so many prompts, drawn with the seed; 0: on all."""
    normalizer_samples: int = 2048
    """Training responses on which the score's mean and spread are measured after training; 0: scores stay raw."""
    logging_steps: int = 10
    """Log every so many steps."""
    save_steps: int = 500
    """Write a checkpoint to resume from every so many steps; 0: none."""
    report_to: list[str] | None = None
    """Where metrics go besides metrics.jsonl: trackio, tensorboard, wandb."""
    bf16: bool | None = None
    """Compute in bfloat16 (weights stay float32); null: on a GPU that has it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth slower."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "max_length", "logging_steps"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "max_grad_norm", "lora_rank", "eval_steps", "save_steps", "normalizer_samples"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        for name, limit in (("label_smoothing", 0.5), ("warmup_fraction", 1), ("lora_dropout", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise InputError(f"{name}={getattr(self, name)} must be at least 0 and below {limit}")
        require_divides("microbatch_size", self.microbatch_size, "prompts_per_batch", self.prompts_per_batch)


class RewardTrainer(trl.RewardTrainer):
    """Trains a scalar head and its backbone on rankings by the Bradley-Terry loss.

    ::

        trainer = RewardTrainer("my_sft_model", args=RewardConfig(output_dir="rm"), train_dataset="rankings.jsonl")
        trainer.train()
        trainer.save_model()

    model: a folder or hub id of an SFT model (its backbone gets a new head; an adapter folder is continued), a
        causal model object (its weights are copied), or a reward model object (trained further, in place).
    train_dataset, eval_dataset: whatever `rlhf.read_rankings` takes: a path, hub id, datasets.Dataset or list.
    processing_class: the tokenizer; default: the model folder's.
    peft_config: a LoraConfig, instead of `args.lora_rank`.

    `evaluate()` counts every pair once, over all batches and processes. After training, the mean and spread of
    the scores of `args.normalizer_samples` training responses become `normalizer`, which `save_model` writes
    beside the model: reference responses then score 0 on average (InstructGPT, section 3.5) with unit variance
    (Ziegler et al. 2019), and a KL coefficient keeps its meaning from one reward model to the next.
    """

    loss_is_scaled_for_ga = True  # we divide by the prompts of the whole optimizer step ourselves

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        config = args if args is not None else RewardConfig()
        if not isinstance(config, RewardConfig):
            raise TypeError(f"args: expected a reward_models.RewardConfig, got a {type(config).__module__} one")
        tokenizer = _tokenizer(model, processing_class)
        train = read_rankings(train_dataset)
        held_out = None if eval_dataset is None else read_rankings(eval_dataset)
        if held_out is not None:
            check_disjoint(train, held_out, ("train_dataset", "eval_dataset"))
            held_out = encode_rankings(tokenizer, _sample(held_out, config), config.max_length, "eval_dataset")
        encoded = encode_rankings(tokenizer, train, config.max_length, "train_dataset")
        if config.label_smoothing and any(encoded["margin"]):
            raise InputError(f"label_smoothing={config.label_smoothing}: not with a `margin` column; use one of the two")
        self.config = config
        self.normalizer = ScoreNormalizer()
        self._seen: list[Tensor] = []  # outcomes, margins and pairs of the micro-batches since the last log
        super().__init__(
            model=_reward_model(model, tokenizer, config, peft_config),
            args=trl_arguments(config, evaluate=held_out is not None),
            data_collator=RankingCollator(chat.pad_id(tokenizer)),
            train_dataset=encoded,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[MarkComplete(), *(callbacks or [])],
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """One optimizer step's micro-batches, and the number of prompts in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor(sum(len(batch["row"]) for batch in batches), dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(prompts, reduction="sum")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the optimizer step's loss: its prompts' mean losses over the step's prompts."""
        scores = self.scores(model, inputs)
        loss = self.loss(scores, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # their gradients get averaged, and are to be added
        if model.training:
            outcomes, margins = _compared(scores.detach(), inputs)
            self._seen.append(torch.stack([outcomes.sum(), margins.sum(), outcomes.new_tensor(len(outcomes))]))
        return (loss, {"scores": scores}) if return_outputs else loss

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Float[Tensor, " n"]:
        """Raw scores [n] of a batch's responses, in float32, read at each one's last real position.

        The model is called from outside, through whatever accelerate wrapped it in (DDP, FSDP, autocast); a hook
        takes what its head says of every position, since the model's own pooling would search for a pad id.
        """
        said: list[Tensor] = []
        hook = models.score_head(self.model).register_forward_hook(lambda head, args, output: said.append(output))
        mask = inputs["attention_mask"]
        places = models.position_ids(mask)
        try:
            model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=places, use_cache=False)
        finally:
            hook.remove()
        last = mask.sum(-1, keepdim=True) - 1  # padded on the right
        return said[0].squeeze(-1).float().gather(1, last).squeeze(1)

    def loss(self, scores: Float[Tensor, " n"], inputs: dict[str, Tensor], count: Any = None) -> Float[Tensor, ""]:
        """The loss of a batch's prompts, divided by `count` prompts; override it to learn by another."""
        where = {"prompts": inputs["prompts"], "texts": inputs["texts"], "count": count}
        if "margins" in inputs:
            return losses.margin_ranking_loss(scores, inputs["ranks"], inputs["margins"], **where)
        if self.config.label_smoothing:
            return losses.smoothed_ranking_loss(scores, inputs["ranks"], self.config.label_smoothing, **where)
        return losses.ranking_loss(scores, inputs["ranks"], **where)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, then measure the normaliser; `resume_from_checkpoint=True` goes on from the newest complete
        checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            newest = latest_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if newest is None else str(newest)
        self._seen.clear()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.fit_normalizer()
        return output

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """`eval_loss` (mean over prompts), `eval_accuracy` and `eval_margin` (means over all pairs), `eval_pairs` and
        `eval_prompts`, on held-out rankings in whatever form `read_rankings` takes."""
        encoded = isinstance(eval_dataset, Dataset) and "chosen_ids" in eval_dataset.column_names
        if eval_dataset is not None and not encoded:
            rankings = _sample(read_rankings(eval_dataset), self.config)
            eval_dataset = encode_rankings(self.processing_class, rankings, self.config.max_length, "eval_dataset")
        return super().evaluate(eval_dataset=eval_dataset, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Every prompt once, whatever the batches and processes: distributed samplers repeat rows to fill up."""
        model = self.model_wrapped
        model.eval()
        mine: list[tuple[int, list[float]]] = []
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            scores = self.scores(model, inputs)
            for number, row in enumerate(inputs["row"].tolist()):
                chosen = inputs["prompts"] == number
                one = {name: inputs[name][chosen] for name in ("ranks", "prompts", "texts", "margins") if name in inputs}
                outcomes, margins = _compared(scores[chosen], one)
                sums = [self.loss(scores[chosen], one), outcomes.sum(), margins.sum()]
                mine.append((row, [*torch.stack(sums).tolist(), len(outcomes)]))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        prompts = dict(gather_object(mine))
        loss, right, margin, pairs = np.sum(list(prompts.values()), axis=0).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / len(prompts),
            f"{metric_key_prefix}_accuracy": right / pairs,
            f"{metric_key_prefix}_margin": margin / pairs,
            f"{metric_key_prefix}_pairs": int(pairs),
            f"{metric_key_prefix}_prompts": len(prompts),
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(prompts))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `accuracy` and `margin` over every pair trained on since the last log."""
        if "loss" in logs and self._seen:
            right, margin, pairs = self.accelerator.reduce(torch.stack(self._seen).sum(0), "sum").tolist()
            logs |= {"accuracy": right / pairs, "margin": margin / pairs}
            self._seen.clear()
        super().log(logs, start_time)

    def fit_normalizer(self) -> ScoreNormalizer:
        """Measure mean and (population) standard deviation of raw scores on a sample of the training responses."""
        count = self.config.normalizer_samples
        if count:
            generator = np.random.default_rng(self.config.seed)
            rows = generator.permutation(len(self.train_dataset))[:count].tolist()  # enough: 2 responses each, or more
            sequences = [ids for row in self.train_dataset.select(rows) for ids in responses_of(row)]
            sequences = [sequences[i] for i in generator.permutation(len(sequences))[:count]]
            self.model.eval()
            scores = score_sequences(self.model, sequences, self.data_collator.pad_id, 16384).double()
            self.normalizer = ScoreNormalizer(scores.mean().item(), scores.std(correction=0).item(), len(scores))
        return self.normalizer

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        """Write model (or adapter), tokenizer and score_normalizer.json: a folder for `RewardModel.load`."""
        super().save_model(output_dir, **kwargs)
        if self.args.should_save:
            self.normalizer.save(output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: trl's card would describe trl's loss."""


def trl_arguments(config: RewardConfig, *, evaluate: bool) -> trl.RewardConfig:
    """Our settings as the TrainingArguments that trl's trainer and the callbacks receive."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    together = config.microbatch_size * world
    require_divides("microbatch_size x processes", together, "prompts_per_batch", config.prompts_per_batch)
    schedules = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    return training_arguments(
        config,
        trl.RewardConfig,
        per_device_train_batch_size=config.microbatch_size,
        per_device_eval_batch_size=config.microbatch_size,
        gradient_accumulation_steps=config.prompts_per_batch // together,
        lr_scheduler_type=schedules[config.lr_schedule],
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if config.lr_schedule == "cosine" else {},
        eval_strategy="steps" if evaluate and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        bf16=use_bf16(config.bf16),
        report_to=config.report_to or [],
        max_length=None,  # over-long rankings are counted and left out by encode_rankings
        disable_dropout=False,  # done by _reward_model, which spares a LoRA adapter's
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def _compared(scores: Float[Tensor, " n"], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of every pair: 1, 0.5 or 0 (right, equal, wrong), and the better response's score less the worse one's."""
    better, worse = losses.ranked_pairs(inputs["ranks"], inputs["prompts"], inputs["texts"])
    outcomes = losses.pair_outcomes(scores, inputs["ranks"], inputs["prompts"], inputs["texts"])
    return outcomes, scores[better] - scores[worse]


def _sample(rankings: list[Ranking], config: RewardConfig) -> list[Ranking]:
    """At most `max_eval_prompts` rankings, drawn with the seed, in their order."""
    if not 0 < config.max_eval_prompts < len(rankings):
        return rankings
    order = np.random.default_rng(config.seed).permutation(len(rankings))
    return [rankings[i] for i in sorted(order[: config.max_eval_prompts])]


def _tokenizer(model: Any, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if given is not None:
        chat.prepare_tokenizer(given)
        return given
    path = model.name_or_path if isinstance(model, nn.Module) else model
    if not path:
        raise InputError("a model object needs its tokenizer: pass processing_class=tokenizer")
    return models.load_tokenizer(path)


def _reward_model(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardConfig,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    """The model to train: a head on its backbone, room for the tokenizer's tokens, an adapter if asked for, no dropout."""
    adapter = peft_config or models.lora_config(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_target_modules,
        task_type=TaskType.SEQ_CLS,
    )
    continued = not isinstance(model, nn.Module) and models.is_adapter(model)
    if isinstance(model, nn.Module) and hasattr(_plain(model), "score"):
        scalar = model
    else:
        scalar = models.new_scalar_model(model, seed=config.seed, lora=adapter if continued else None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # what the trainer would set, with a warning
        setattr(scalar.config, name, getattr(tokenizer, name))
    rows = scalar.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        scalar.resize_token_embeddings(len(tokenizer))
    if adapter is not None and isinstance(scalar, PeftModel) and not continued:
        raise InputError("the model is already an adapter: to train it further, leave lora_rank and peft_config out")
    if adapter is not None and not continued:
        if not scalar.name_or_path:
            raise InputError("LoRA needs a base that can be loaded again: save the model and pass its folder")
        adapter.task_type = TaskType.SEQ_CLS
        adapter.modules_to_save = sorted({"score", *(adapter.modules_to_save or [])})
        if len(tokenizer) > rows and adapter.trainable_token_indices is None:
            adapter.trainable_token_indices = list(range(rows, len(tokenizer)))
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # peft draws the new weights from the global generator
            scalar = get_peft_model(scalar, adapter)
    models.disable_dropout(scalar)
    if isinstance(scalar, PeftModel):
        for name, module in scalar.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" in name:
                module.p = scalar.peft_config["default"].lora_dropout
    return scalar


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
