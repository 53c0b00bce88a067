"""`RewardTrainer`: train a reward model on rankings, on top of trl's trainer.

trl's trainer compares pairs and averages their accuracy over batches. Ours takes K ranked responses per prompt, scores
each once, and learns from all their pairs (InstructGPT, section 3.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from reward_models import encoding, losses
from reward_models.best import Best, KeepBest
from reward_models.config import RewardConfig, trl_arguments
from reward_models.encoding import RankingBatch
from reward_models.model import prepare_model
from reward_models.normalizing import demonstrated, sampled_responses, shared_scores
from reward_models.preflight import check_reward_model
from rlhf import chat
from rlhf.config import resume_settings
from rlhf.errors import InputError, RunStopped, short
from rlhf.models import encoders, packing
from rlhf.models.adapters import drop_input_hooks
from rlhf.models.head_outputs import head_outputs, packs_rows
from rlhf.models.loading import tokenizer_of, trained_weights_kept
from rlhf.models.positions import positions_of
from rlhf.models.scalar import ScoreNormalizer, last_token_scores
from rlhf.rows.records import HELD_OUT, check_disjoint, read_rankings
from rlhf.rows.sources import Source
from rlhf.run import distributed, strategy
from rlhf.run import plot as plots
from rlhf.run.callbacks import Babysitter, attach
from rlhf.run.fingerprint import of_run
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype, log_choice
from rlhf.run.trl_arguments import with_learning_rate


class RewardTrainer(trl.RewardTrainer):
    """Trains a scalar head and its backbone on rankings by the Bradley-Terry loss.

    ::

        trainer = RewardTrainer("my_sft_model", args=RewardConfig(output_dir="rm"), train_dataset="rankings.jsonl")
        trainer.train()
        trainer.save_model()

    model: a folder or hub id of an SFT model (its backbone gets a new head; an adapter folder is continued) or of an
        encoder (BERT and its kind, with its family's own head), a model object of either (its weights are copied), or
        a reward model object (trained further, in place).
    normalizer_dataset: demonstrations (any source that `rlhf.read_demonstrations` reads) on whose responses the scores
        get mean 0 and standard deviation 1, as in InstructGPT; default: the training responses.
    train_dataset, eval_dataset: any source that `rlhf.read_rankings` reads: a path, hub id, datasets.Dataset or list.
    processing_class: the tokenizer; by default the model's. peft_config: a LoraConfig, instead of `args.lora_rank`.

    `evaluate()` counts every pair once, over all batches and processes. With `args.keep_best` training ends with the
    weights of the lowest held-out loss (`best` holds their step). After training, the mean and standard deviation of
    the scores of `args.normalizer_samples` responses become `normalizer` (InstructGPT, section 3.5; Ziegler et al.
    2019), which `save_model` writes beside the model: a KL coefficient then means the same with every reward model.
    """

    loss_is_scaled_for_ga = True  # we divide by the prompts of the whole optimizer step ourselves
    CONFIG: type[RewardConfig] = RewardConfig
    ENCODED = "chosen_ids"  # a column by which an encoded dataset is known
    SHOWN: tuple[str, ...] = ("loss", "accuracy", "margin", "eval_accuracy")

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        train_dataset: Source,
        eval_dataset: Source | None = None,
        normalizer_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        config = args if args is not None else self.CONFIG()
        if not isinstance(config, self.CONFIG):
            raise TypeError(f"args: expected reward_models.{self.CONFIG.__name__}, got a {type(config).__module__} one")
        tokenizer = chat.set_template_kwargs(tokenizer_of(model, processing_class), config.chat_template_kwargs)
        self.config, self._tokenizer = config, tokenizer
        train = self.read(train_dataset, "train")
        held_out = None if eval_dataset is None else self.read(eval_dataset, HELD_OUT)
        if held_out is not None:
            check_disjoint(train, held_out, ("train_dataset", "eval_dataset"))
        given = by_main(lambda: of_run(tokenizer, train, peft_config=peft_config, model=model))
        reward_model = prepare_model(model, tokenizer, config, peft_config)
        self._of_encoder = encoders.is_encoder(reward_model.config)
        rate = config.full_learning_rate(self._of_encoder)
        self.config = config = with_learning_rate(config, isinstance(reward_model, PeftModel), rate)
        limit = encoders.position_limit(reward_model) if self._of_encoder else None
        self._max_length = min(config.max_length, limit or config.max_length)
        self._positions = positions_of(reward_model)
        held_out = None if held_out is None else self.encoded(encoding.sample(held_out, config), "eval_dataset")
        encoded = self.encoded(train, "train_dataset")
        if config.keep_best and held_out is None:
            raise InputError("keep_best needs held-out losses to choose by: give an eval_dataset")
        log_choice(config.bf16)
        self.normalizer = ScoreNormalizer()
        self.best: Best | None = None  # set by `keep_best`
        self._normalized_on: list[list[int]] | None = None  # encoded here: a bad row found after training would lose it
        if normalizer_dataset is not None:
            self._normalized_on = demonstrated(normalizer_dataset, tokenizer, config, self._max_length, self._positions)
        self._seen: list[Tensor] = []  # `sums` of the micro-batches since the last log
        self._packs = False  # while it trains, perhaps
        reward_model.config.num_labels = 1  # trl takes no other
        with trained_weights_kept(reward_model):
            super().__init__(
                model=reward_model,
                args=trl_arguments(config, evaluate=held_out is not None),
                data_collator=cast(Any, self.collator()),
                train_dataset=encoded,
                eval_dataset=held_out,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        reward_model.config.num_labels = config.labels
        strategy.configure_trainer(self.accelerator, self.model, config.keep_best, config)
        attach(self, "reward model", self.SHOWN, config.output_dir)
        settings = {**resume_settings(config, self.CONFIG), **given}
        self._babysitter = Babysitter(self, settings, config.save_total_limit, config.on_alarm)
        self._keeper = KeepBest(config.output_dir)
        if config.keep_best:
            self.add_callback(self._keeper)

    def read(self, source: Source, split: str) -> list[Any]:
        """Read the records to train or evaluate on."""
        return read_rankings(source, split, self.config.on_bad_row)

    def encoded(self, records: list[Any], name: str) -> Dataset:
        """Encode records as rows for the collator. name: "train_dataset" or "eval_dataset"."""
        settings = (self.config.labeler_weights, self.config.on_bad_row, self._positions)
        data = encoding.encode_rankings(self._tokenizer, records, self._max_length, name, *settings)
        if self.config.label_smoothing and name == "train_dataset" and any(data["margin"]):
            raise InputError(f"label_smoothing={self.config.label_smoothing}: not with a `margin` column")
        return data

    def collator(self) -> Callable[[Any], Any]:
        """Return what makes a batch of encoded rows."""
        return encoding.RankingCollator(chat.pad_id(self._tokenizer))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """Return one optimizer step's micro-batches and the number that its loss divides by, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [len(batch["row"]) for batch in batches]
        sizes[-1:] = [distributed.real_rows(self.accelerator, size) for size in sizes[-1:]]
        count = sum(self.count(batch, real) for batch, real in zip(batches, sizes, strict=True))
        return batches, self.accelerator.reduce(torch.tensor(float(count), device=device), reduction="sum")

    def count(self, batch: Any, real: int) -> int:
        """Take what repeats rows, behind the first `real`, out of the loss; return the number to divide the rest by."""
        batch["ranks"] = torch.where(batch["prompts"] < real, batch["ranks"], 0.0)  # equal ranks: no pair
        return real

    def compute_loss(  # type: ignore[override]  # `inputs` are what our collator makes
        self,
        model: nn.Module,
        inputs: RankingBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute this micro-batch's share of the optimizer step's loss: the sum of its prompts' mean losses, divided
        by the number of prompts in the step."""
        scores = self.scores(model, inputs)
        loss = self.loss(scores, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # undo DDP's averaging: gradients are to be added
        if model.training:
            if not bool(loss.isfinite()):
                raise RunStopped(self._broken(scores, inputs, loss.item()))
            self._seen.append(self.sums(scores.detach(), inputs))
        return (loss, {"scores": scores}) if return_outputs else loss

    def _broken(self, scores: Float[Tensor, " n"], inputs: RankingBatch, loss: float) -> str:
        """Write the error, one line, for a loss that is NaN or infinite, with the text whose score caused it."""
        bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
        where = "though every score is finite"
        if bad:
            ids = encoding.tokens_read(inputs, bad[0])
            text = short(str(self._tokenizer.decode(ids, skip_special_tokens=True)), 80)
            where = f"since the score is {scores[bad[0]].tolist()} at the last token (number {len(ids)}) of {text!r}"
        return (
            f"step {self.state.global_step + 1}: loss is {loss} {where}; lower learning_rate, or look at that "
            "response. No step was taken on it; the last checkpoint is good"
        )

    def scores(self, model: nn.Module, inputs: RankingBatch) -> Float[Tensor, " n"]:
        """Return raw scores [n] of a batch's responses, in float32, read at each one's last real position. The model is
        called through accelerate's wrapper (DDP, FSDP, autocast)."""
        mask = inputs["attention_mask"]
        if self._of_encoder:
            return encoders.encoder_scores(model, inputs["input_ids"], mask)
        last = mask.sum(-1, keepdim=True) - 1  # padded on the right
        return self.head_outputs(model, inputs).squeeze(-1).float().gather(1, last).squeeze(1)

    def head_outputs(self, model: nn.Module, inputs: Any) -> Float[Tensor, "n T labels"]:
        """Return a decoder's head at every real position."""
        return head_outputs(model, cast(Any, self.model), inputs["input_ids"], inputs["attention_mask"], self._packs)

    def plain_scores(self, model: Any, inputs: Any) -> Tensor:
        """Return the same scores as `RewardModel` computes them."""
        return last_token_scores(model, inputs["input_ids"], inputs["attention_mask"])

    def loss(
        self, scores: Float[Tensor, " n"], inputs: RankingBatch, count: Tensor | float | None = None
    ) -> Float[Tensor, ""]:
        """Compute the loss of a batch's prompts, divided by `count` prompts. Override it for a loss of your own."""
        ranks, coefficient = inputs["ranks"], self.config.center_rewards_coefficient
        where = (inputs["prompts"], inputs["texts"], count, inputs.get("weights"))
        if "margins" in inputs:
            loss = losses.margin_ranking_loss(scores, ranks, inputs["margins"], *where)
        elif self.config.label_smoothing:
            loss = losses.smoothed_ranking_loss(scores, ranks, self.config.label_smoothing, *where)
        else:
            loss = losses.ranking_loss(scores, ranks, *where)
        return loss + coefficient * losses.centering_penalty(scores, ranks, *where) if coefficient else loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, take the best weights (`keep_best`), then measure the normaliser; `resume_from_checkpoint=True`
        resumes from the newest complete checkpoint, if there is one."""
        with self._babysitter.watch(resume_from_checkpoint) as checkpoint:
            self.begin(checkpoint)
            self._seen.clear()
            with self._babysitter.fast() as may_pack, packing.attention_kept(self.model):
                run = compute_dtype(self.config.bf16), self.accelerator.device
                self._packs = may_pack and packs_rows(self.model, self.config.packing, *run)
                output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        self._packs = False
        drop_input_hooks(cast(nn.Module, self.model))
        if self.config.keep_best:
            self._take_best()
        self.fit_normalizer()
        return output

    def begin(self, checkpoint: Path | None) -> None:
        """Check the model before the first step. checkpoint: what a run goes on from, which was checked as it began."""
        self._babysitter.check(check_reward_model)

    def _take_best(self) -> None:
        """Load the weights of the lowest held-out loss, after evaluating those of the last step too."""
        self.accelerator.wait_for_everyone()  # the main process may still be writing
        measured = any(log["step"] == self.state.global_step and "eval_loss" in log for log in self.state.log_history)
        if not measured or self._keeper.read() is None:
            self.evaluate()
        self.accelerator.wait_for_everyone()
        self.best = self._keeper.read()
        self._keeper.load_into(cast(nn.Module, self.model))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return `eval_loss` (mean over prompts), `eval_accuracy` and `eval_margin` (means over all pairs),
        `eval_pairs` and `eval_prompts`, on the trainer's eval_dataset or on any source that `read_rankings` reads."""
        strategy.require_trained(self.accelerator, self.model_wrapped)
        encoded = isinstance(eval_dataset, Dataset) and self.ENCODED in eval_dataset.column_names
        if eval_dataset is not None and not encoded:
            eval_dataset = self.encoded(encoding.sample(self.read(eval_dataset, HELD_OUT), self.config), "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate every row exactly once, though distributed samplers repeat rows to fill their last batches."""
        model = self.model_wrapped
        model.eval()
        mine: list[tuple[int, list[float]]] = []
        for batch in dataloader:
            scores = self.scores(model, batch)
            for own, row in encoding.rows_of(batch):
                sums = self.sums(scores[own], row)
                mine.append((int(row["row"]), [self.loss(scores[own], row).item(), *sums.tolist()]))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rows = dict(gather_object(mine))
        loss, *totals = np.sum(list(rows.values()), axis=0).tolist()
        found = self.evaluated(loss, totals, len(rows)).items()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(rows))

    def sums(self, scores: Float[Tensor, " n"], inputs: Any) -> Tensor:
        """Return what a batch adds to the logged means: pairs right (equal scores count half), margins, pairs."""
        outcomes, margins = encoding.compared(scores, inputs)
        return torch.stack([outcomes.sum(), margins.sum(), outcomes.new_tensor(len(outcomes))])

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the metrics that `sums` over several batches come to."""
        right, margin, pairs = totals
        return {"accuracy": right / pairs, "margin": margin / pairs}

    def evaluated(self, loss: float, totals: Sequence[float], rows: int) -> dict[str, float]:
        """Return the metrics of an evaluation. loss: the sum of the rows' own."""
        return {"loss": loss / rows, **self.means(totals), "pairs": int(totals[-1]), "prompts": rows}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding `means` over all that was trained on since the last log."""
        if "loss" in logs and self._seen:
            logs |= self.means(self.accelerator.reduce(torch.stack(self._seen).sum(0), "sum").tolist())
            self._seen.clear()
        if self.state.epoch is not None:  # in optimizer steps; transformers counts micro-batches, of uneven size
            steps = math.ceil(len(cast(Dataset, self.train_dataset)) / self.config.rows_per_batch)
            self.state.epoch = self.state.global_step / steps
        super().log(logs, start_time)

    def fit_normalizer(self) -> ScoreNormalizer:
        """Measure mean and (population) standard deviation of raw scores on a sample of responses, from training or
        from `normalizer_dataset`."""
        if count := self.config.normalizer_samples:
            data, pad_id = cast(Dataset, self.train_dataset), chat.pad_id(self._tokenizer)
            sequences = self._normalized_on or sampled_responses(data, count, self.config.seed)
            self.model_wrapped.eval()
            with self.accelerator.autocast():  # same precision as in training and in PPO's scoring
                raw = shared_scores(self.accelerator, self.model_wrapped, self.scores, sequences, pad_id)
            self.normalizer = ScoreNormalizer(float(np.mean(raw)), float(np.std(raw)), len(raw))
        return self.normalizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model (or adapter), tokenizer and score_normalizer.json: a folder for `RewardModel.load`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.normalizer.save(output_dir or self.config.output_dir)

    def plot(self, *names: str) -> plots.Figure:
        """Draw what was logged: the metrics that are named, or all. A notebook shows it; `.savefig("run.png")`."""
        return plots.plot(self.state.log_history, names)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: trl's card would describe trl's loss."""
