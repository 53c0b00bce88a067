"""Supervised fine-tuning: the policy learns to write the demonstrations' responses.

The first of InstructGPT's three stages (Ouyang et al. 2022, section 3.5 and appendix C.1). trl's trainer does the
training; this file gives it encoded demonstrations, counts tokens for the loss and the metrics, and saves and resumes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from rlhf import chat
from rlhf.config import resume_settings
from rlhf.errors import InputError, RunStopped, short
from rlhf.models import packing
from rlhf.models.adapters import base_model, drop_input_hooks, train_in_float32
from rlhf.models.loading import tokenizer_of, trained_weights_kept
from rlhf.models.positions import positions_of
from rlhf.padding import IGNORED
from rlhf.rows.records import HELD_OUT, Demonstration, check_disjoint, read_demonstrations
from rlhf.rows.sources import Source
from rlhf.run import distributed, strategy
from rlhf.run import plot as plots
from rlhf.run.callbacks import Babysitter, attach
from rlhf.run.fingerprint import of_run
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype, log_choice
from rlhf.run.trl_arguments import training_arguments, with_learning_rate
from rlhf.sft.config import SFTConfig
from rlhf.sft.data import Collator, encode_demonstrations, is_accepted
from rlhf.sft.forward import agrees, by_position, forward_of
from rlhf.sft.model import prepare_model, show_bias
from rlhf.sft.preflight import check_sft

logger = logging.getLogger("rlhf")


class SFTTrainer(trl.SFTTrainer):
    """A subclass of trl's trainer for our records: ``SFTTrainer(model, SFTConfig(...),
    "demonstrations.jsonl").train()``.

    ``loss = -sum_t mask_t log p(token_t | tokens_<t) / sum_t mask_t`` over all trained tokens (the assistant's, and
    their end of turn) of the optimizer step's ``batch_size`` demonstrations, so no split into micro-batches changes a
    gradient.

    model: a folder, a hub id or an object; an adapter (folder or PeftModel) is trained on. Datasets: any source that
    ``read_demonstrations`` reads. processing_class: the tokenizer; by default the model's. peft_config: a LoRA adapter
    with other settings than ``args`` has, instead of ``args.lora_rank``.

    Departs from trl: masks come from ``rlhf.chat`` (the template needs no ``{% generation %}``), demonstrations that
    are too long are left out instead of cut, every metric is a mean over all trained tokens (trl: over batches), with
    several processes each demonstration counts once (accelerate repeats some to fill the last batch), and the model is
    an ordinary one after training (trl leaves a patched ``forward`` on it, of which a deepcopy is wrong).
    """

    loss_is_scaled_for_ga: Any = True  # the loss is divided by the tokens of the whole optimizer step

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Source | None = None,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        config = args or SFTConfig()
        if train_dataset is None:
            raise InputError("train_dataset is missing; give a JSONL file, a dataset or a list of rows")
        tokenizer = tokenizer_of(model, processing_class)
        chat.set_template_kwargs(tokenizer, config.chat_template_kwargs)
        train = read_demonstrations(train_dataset, on_bad_row=config.on_bad_row)
        held_out = None if eval_dataset is None else read_demonstrations(eval_dataset, HELD_OUT, config.on_bad_row)
        if held_out is not None:
            check_disjoint(train, held_out, ("train_dataset", "eval_dataset"))
        given = by_main(lambda: of_run(tokenizer, train, peft_config=peft_config, model=model))
        self.given_object = isinstance(model, nn.Module)
        model, peft_config = prepare_model(model, tokenizer, config, peft_config)
        config = with_learning_rate(config, adapter=peft_config is not None or isinstance(model, PeftModel))
        log_choice(config.bf16)
        self._positions = positions_of(model)
        self.config = config
        self._tokenizer = tokenizer
        # preflight compares a few with the encoded rows
        self.first_demonstrations = [row for row in train[:64] if is_accepted(tokenizer, row)]
        self._forward: dict[str, Any] = {}
        self._packs = False  # while it trains, perhaps
        self._sums: dict[str, list[Tensor]] = {"train": [], "eval": []}  # per micro-batch since the last log
        with trained_weights_kept(model):
            super().__init__(
                model=model,
                args=trl_arguments(config, evaluate=held_out is not None),
                data_collator=Collator(chat.pad_id(tokenizer)),
                train_dataset=self._encoded(train, "train_dataset"),
                eval_dataset=None if held_out is None else self._encoded(held_out, "eval_dataset"),
                processing_class=tokenizer,
                peft_config=peft_config,
                callbacks=callbacks,
            )
        self._uninstall_forward()
        if peft_config is not None:
            train_in_float32(cast(nn.Module, self.model))
        strategy.configure_trainer(self.accelerator, self.model, config=config)
        with self.accelerator.autocast():
            ours = not (strategy.deepspeed(self.accelerator) or self.aux_loss_enabled) and agrees(self.model)
        if not ours:  # then trl's own forward computes the loss
            show_bias(self._base.get_output_embeddings())
        else:
            self._forward = {"forward": forward_of(self._base, lambda: self._packs)}
        attach(self, "sft", ("loss", "eval_loss", "token_accuracy"), config.output_dir)
        settings = {**resume_settings(config, SFTConfig), **given}
        self._babysitter = Babysitter(self, settings, config.save_total_limit, config.on_alarm)

    def _encoded(self, demonstrations: Sequence[Demonstration], name: str) -> Dataset:
        limits = (self.config.max_length, name, self.config.on_bad_row, self._positions)
        return encode_demonstrations(self._tokenizer, demonstrations, *limits)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; ``resume_from_checkpoint=True`` resumes from the newest complete checkpoint, if there is one."""
        with self._babysitter.watch(resume_from_checkpoint) as checkpoint:
            self._babysitter.check(check_sft)
            self._sums["train"].clear()
            with self._babysitter.fast() as may_pack, packing.attention_kept(self.model), self._trl_forward():
                run = compute_dtype(self.config.bf16), self.accelerator.device
                self._packs = may_pack and packing.prepare(self.model, self.config.packing, *run)
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        self._packs = False
        drop_input_hooks(cast(nn.Module, self.model))
        return output

    def plot(self, *names: str) -> plots.Figure:
        """Draw what was logged: the metrics that are named, or all. A notebook shows it; `.savefig("run.png")`."""
        return plots.plot(self.state.log_history, names)

    @property
    def _base(self) -> Any:
        return base_model(cast(nn.Module, self.model))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: trl's card names no base model, and a run's report has more."""

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return ``eval_loss`` (mean over all labelled tokens) and ``eval_token_accuracy``, on any demonstrations."""
        strategy.require_trained(self.accelerator, self.model_wrapped)
        encoded = isinstance(eval_dataset, Dataset) and "labels" in eval_dataset.features
        if eval_dataset is not None and not encoded:
            records = read_demonstrations(eval_dataset, HELD_OUT, self.config.on_bad_row)
            eval_dataset = self._encoded(records, "eval_dataset")
        self._sums["eval"].clear()
        with self._trl_forward():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """Return one optimizer step's micro-batches and the number of trained tokens in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._silence_repeated(batches[-1])
        count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(float(count), device=device), "sum")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            self._silence_repeated(inputs)
        caught: list[Any] = []  # trl's forward outputs, by token (trl's own metrics average them over batches)
        hook = cast(nn.Module, self.model).register_forward_hook(lambda model, args, outputs: caught.append(outputs))
        try:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()
        counted = (inputs["labels"] != IGNORED).any(-1)
        numbers = [-caught[0].log_probs, caught[0].entropy, caught[0].is_top1, caught[0].label_mask]
        sums = [number.detach().double().sum() for number in [*numbers, inputs["attention_mask"][counted]]]
        self._sums["train" if model.training else "eval"].append(torch.stack(sums))
        loss = result[0] if isinstance(result, tuple) else result
        if model.training and not bool(loss.isfinite()):
            raise RunStopped(self._broken(caught[0], inputs, loss.item()))
        return result

    def _broken(self, outputs: Any, inputs: dict[str, Tensor], loss: float) -> str:
        """Write the error, one line, for a loss that is NaN or infinite: it names the demonstration and the token."""
        targets = inputs["labels"][:, 1:]
        bad = (~by_position(outputs).isfinite() & (targets != IGNORED)).nonzero().tolist()
        where = "in no single token: it overflows in the sum"
        if bad:
            row, token = bad[0]
            text = short(str(self._tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True)), 80)
            where = f"at token {token + 1} (id {int(targets[row, token])}) of {text!r}"
        step = self.state.global_step + 1
        return (
            f"step {step}: loss is {loss} {where}; lower learning_rate, or look at that demonstration. No step was "
            "taken on it; the last checkpoint is good"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over all tokens, of all processes, since the last log, in place of trl's means over batches."""
        mode = "train" if cast(nn.Module, self.model).training else "eval"
        if self._sums[mode]:
            total = self.accelerator.reduce(torch.stack(self._sums[mode]).sum(0), "sum").tolist()
            self._sums[mode].clear()
            loss, entropy, right, count, tokens = total
            so_far = next((row["num_tokens"] for row in self.state.log_history[::-1] if "num_tokens" in row), 0)
            if mode == "train":
                so_far += int(tokens)
            elif name := next((name for name in logs if name.endswith("_loss")), None):  # eval_, or another prefix
                logs[name] = loss / count
            self._metrics[mode] |= {  # trl's `log` reads these; private, and pinned by tests/test_invariance.py
                "entropy": [entropy / count],
                "mean_token_accuracy": [right / count],
                "num_tokens": [so_far],
            }
        if self.state.epoch is not None:  # in optimizer steps; transformers counts micro-batches, of uneven size
            steps = math.ceil(len(cast(Dataset, self.train_dataset)) / self.config.batch_size)
            self.state.epoch = self.state.global_step / steps
        super().log(logs, start_time)

    def _silence_repeated(self, batch: dict[str, Tensor]) -> None:
        """Set the labels to IGNORED in rows that only fill the epoch's last batch."""
        real = distributed.real_rows(self.accelerator, len(batch["labels"]))
        batch["labels"] = torch.where(
            torch.arange(len(batch["labels"]), device=batch["labels"].device)[:, None] < real, batch["labels"], IGNORED
        )

    @contextmanager
    def _trl_forward(self) -> Iterator[None]:
        """Lend the model the ``forward`` that trl's loss calls, for as long as trl runs."""
        base = self._base
        outermost = "forward" not in vars(base)
        if outermost:
            vars(base).update(self._forward)
        try:
            yield
        finally:
            if outermost:
                self._uninstall_forward()

    @contextmanager
    def own_forward(self) -> Iterator[nn.Module]:
        """Give the model back its own ``forward`` for a while, as sampling needs it; yields the model."""
        base = self._base
        lent = {"forward": vars(base).pop("forward")} if "forward" in vars(base) else {}
        try:
            yield cast(nn.Module, self.model)
        finally:
            vars(base).update(lent)

    def _uninstall_forward(self) -> None:
        base = self._base
        self._forward = {"forward": vars(base).pop("forward")} if "forward" in vars(base) else {}


def trl_arguments(config: SFTConfig, *, evaluate: bool) -> trl.SFTConfig:
    """Convert our settings to the TrainingArguments that trl's trainer and the callbacks receive."""
    schedules = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    return training_arguments(
        config,
        trl.SFTConfig,
        lr_scheduler_type=schedules[config.lr_schedule],
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if config.lr_schedule == "cosine" else None,
        max_length=None,
        eval_strategy=("steps" if config.eval_steps else "epoch") if evaluate else "no",
        eval_steps=config.eval_steps or None,
    )
