"""Supervised fine-tuning: the policy learns to write the demonstrations' responses.

The first of InstructGPT's three stages (Ouyang et al. 2022, section 3.5 and appendix C.1). trl's trainer does the
training; this file decides what it is fed (which tokens carry the loss, what is too long) and what is left behind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf import InputError, RunStopped, chat, preflight
from rlhf.callbacks import Babysitter, attach
from rlhf.config import resume_settings
from rlhf.entry import training_arguments, use_bf16
from rlhf.models import load_policy, load_tokenizer, lora_config
from rlhf.records import Demonstration, check_disjoint, read_demonstrations
from rlhf.resume import resume_point
from rlhf.sft_config import SFTConfig

logger = logging.getLogger("rlhf")

IGNORED = -100  # the label of tokens without loss, in transformers


class SFTTrainer(trl.SFTTrainer):
    """trl's SFTTrainer on our records: ``SFTTrainer(model, SFTConfig(...), "demonstrations.jsonl").train()``.

    ``loss = -sum_t mask_t log p(token_t | tokens_<t) / sum_t mask_t`` over all trained tokens (the assistant's, and
    their end of turn) of the optimizer step's ``batch_size`` demonstrations, so no split into micro-batches changes a
    gradient.

    model: a folder, a hub id or an object; an adapter (folder or PeftModel) is continued. Datasets: whatever
    ``read_demonstrations`` takes. processing_class: the tokenizer; by default the model's. peft_config instead of
    ``args.lora_rank`` for any other adapter.

    Departs from trl: masks come from ``rlhf.chat`` (no ``{% generation %}`` in the template needed), over-long
    demonstrations are left out instead of cut, every metric is a mean over all trained tokens (trl: over batches),
    with several processes each demonstration counts once (accelerate repeats some to fill the last batch), and the
    model is an ordinary one after training (trl leaves a patched ``forward`` on it, which survives a deepcopy
    wrongly).
    """

    loss_is_scaled_for_ga: Any = True  # it is divided by the tokens of the whole optimizer step, for every architecture

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        config = args or SFTConfig()
        if train_dataset is None:
            raise InputError("train_dataset is missing; give a JSONL file, a dataset or a list of rows")
        tokenizer = _tokenizer(model, processing_class)
        train = read_demonstrations(train_dataset)
        held_out = None if eval_dataset is None else read_demonstrations(eval_dataset)
        if held_out is not None:
            check_disjoint(train, held_out, ("train_dataset", "eval_dataset"))
        model, peft_config = prepare_model(model, tokenizer, config, peft_config)
        self.config = config
        self.first_demonstrations = train[:64]  # preflight compares a few with what is trained
        self._forward: dict[str, Any] = {}
        self._sums: dict[str, list[Tensor]] = {"train": [], "eval": []}  # per micro-batch since the last log
        super().__init__(
            model=model,
            args=trl_arguments(config, evaluate=held_out is not None),
            data_collator=Collator(chat.pad_id(tokenizer)),
            train_dataset=encode_demonstrations(tokenizer, train, config.max_length, "train_dataset"),
            eval_dataset=None
            if held_out is None
            else encode_demonstrations(tokenizer, held_out, config.max_length, "eval_dataset"),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self._uninstall_forward()
        show_bias(_base(self.model).get_output_embeddings())
        attach(self, "sft", ("loss", "eval_loss", "token_accuracy"), config.output_dir)
        self._settings = resume_settings(config, SFTConfig)
        self._babysitter = Babysitter(self, self._settings, config.save_total_limit, config.on_alarm)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint, if there is one."""
        folder = resume_point(self.accelerator, self.config.output_dir, resume_from_checkpoint, self._settings)
        if folder is None:
            preflight.check_sft(self)
        self._sums["train"].clear()
        with self._babysitter.watch(), self._trl_forward():
            return super().train(None if folder is None else str(folder), *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: trl's card names no base model, and a run's report says more."""

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``eval_loss`` (mean over all trained tokens) and ``eval_token_accuracy``, on any held-out demonstrations."""
        encoded = isinstance(eval_dataset, Dataset) and "labels" in eval_dataset.features
        if eval_dataset is not None and not encoded:
            records, tokenizer = read_demonstrations(eval_dataset), cast(Any, self.processing_class)
            eval_dataset = encode_demonstrations(tokenizer, records, self.config.max_length, "eval_dataset")
        self._sums["eval"].clear()
        with self._trl_forward():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """One optimizer step's micro-batches, and the number of trained tokens in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._silence_repeated(batches[-1])
        count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(float(count), device=device), "sum")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            self._silence_repeated(inputs)
        said: list[Any] = []  # what trl's forward says of every token, which its own metrics average over batches
        hook = cast(nn.Module, self.model).register_forward_hook(lambda model, args, outputs: said.append(outputs))
        try:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()
        counted = (inputs["labels"] != IGNORED).any(-1)
        numbers = [-said[0].log_probs, said[0].entropy, said[0].is_top1, said[0].label_mask]
        sums = [number.detach().double().sum() for number in [*numbers, inputs["attention_mask"][counted]]]
        self._sums["train" if model.training else "eval"].append(torch.stack(sums))
        loss = result[0] if isinstance(result, tuple) else result
        if model.training and not bool(loss.isfinite()):
            raise RunStopped(self._broken(model, inputs, loss.item()))
        return result

    @torch.no_grad()
    def _broken(self, model: nn.Module, inputs: dict[str, Any], loss: float) -> str:
        """One line: which demonstration and which token gave a loss that is no number."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        targets = inputs["labels"][:, 1:]
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        bad = (~logprobs.isfinite() & (targets != IGNORED)).nonzero().tolist()
        where = "in no single token: it overflows in the sum"
        if bad:
            (row, token), tokenizer = bad[0], cast(Any, self.processing_class)
            text = tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True)
            where = f"at token {token + 1} (id {int(targets[row, token])}) of {text[:80]!r}"
        step = self.state.global_step + 1
        return (
            f"step {step}: loss is {loss} {where}; lower learning_rate, or look at that demonstration. No step was "
            "taken on it; the last checkpoint is good"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces trl's means over batches by means over all tokens, of all processes, since the last log."""
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
        """Take the loss off rows that only fill the epoch's last batch."""
        real = real_rows(self.accelerator, len(batch["labels"]))
        batch["labels"] = torch.where(
            torch.arange(len(batch["labels"]), device=batch["labels"].device)[:, None] < real, batch["labels"], IGNORED
        )

    @contextmanager
    def _trl_forward(self) -> Iterator[None]:
        """Lend the model the ``forward`` that trl's loss calls, for as long as trl runs."""
        base = _base(self.model)
        outermost = "forward" not in vars(base)
        if outermost:
            vars(base).update(self._forward)
        try:
            yield
        finally:
            if outermost:
                self._uninstall_forward()

    def _uninstall_forward(self) -> None:
        base = _base(self.model)
        self._forward = {"forward": vars(base).pop("forward")} if "forward" in vars(base) else {}


def real_rows(accelerator: Accelerator, rows: int) -> int:
    """How many of this process's ``rows`` in the batch just fetched are the data's own, and not repeated.

    With several processes accelerate fills the last batch of an epoch with rows from its beginning, so that all
    have as many; trained on, they would count twice, and how many depends on the number of processes.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder < 1:  # of the last batch's rows over all processes; 0: all real
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


@dataclass(frozen=True)
class Collator:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels [B, T]``; labels are -100 where there is no loss."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(values: Iterator[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (length - len(value)) for value in values])

        return {
            "input_ids": padded((list(row["input_ids"]) for row in rows), self.pad_id),
            "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
            "labels": padded((list(row["labels"]) for row in rows), IGNORED),
        }


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], max_length: int, name: str
) -> Dataset:
    """Columns ``input_ids`` and ``labels``, -100 outside the assistant's tokens and their end of turn.

    Demonstrations of more than ``max_length`` tokens are left out: a cut one would teach never to stop. How many, and
    which, is logged; InputError when none remains.
    """
    rows: list[dict[str, list[int]]] = []
    too_long: dict[int, int] = {}
    for index, demonstration in enumerate(demonstrations):
        ids, mask = chat.encode_conversation(tokenizer, demonstration.messages, demonstration.trained_from)
        if len(ids) > max_length:
            too_long[index] = len(ids)
        else:
            rows.append({"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]})
    if not rows:
        if not too_long:
            raise InputError(f"{name}: no demonstrations; give at least one")
        raise InputError(
            f"{name}: none of {len(demonstrations)} demonstrations fits max_length={max_length}; the shortest has "
            f"{min(too_long.values())} tokens: raise max_length or shorten them"
        )
    if too_long:
        named = ", ".join(str(index + 1) for index in list(too_long)[:10])
        logger.warning(
            f"{name}: {len(too_long)} of {len(demonstrations)} demonstrations are longer than "
            f"max_length={max_length} tokens and left out; the longest has {max(too_long.values())}; "
            f"demonstrations {named}{', ...' if len(too_long) > 10 else ''} (counted from 1)"
        )
    return Dataset.from_list(rows)


def prepare_model(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    peft_config: PeftConfig | None = None,
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """The policy to train, its vocabulary grown to the tokenizer's, and the adapter that it is yet to get, if any.

    Under a new adapter, rows of the embeddings that the base never learned (tokens added for chat) are trained and
    saved with it. The stop tokens and padding are written to generation_config, so that plain ``generate`` stops.
    """
    adapter: Any = peft_config or lora_config(
        config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules
    )
    light = adapter is not None and use_bf16(config.bf16)
    policy: Any = load_policy(model, dtype=torch.bfloat16 if light else torch.float32)
    if isinstance(policy, PeftModel) and adapter is not None:
        raise InputError("the model is already an adapter: leave out lora_rank and peft_config to continue it")
    if config.dropout is not None:
        set_dropout(policy, config.dropout)
    new_tokens = grow_vocabulary(policy, tokenizer)
    if adapter is not None and new_tokens and getattr(adapter, "trainable_token_indices", None) is None:
        adapter.trainable_token_indices = dict.fromkeys(_embedding_names(policy), new_tokens)
    _tell_special_tokens(policy, tokenizer)
    return policy, adapter


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make room for the tokenizer's tokens; returns ids whose embeddings the model never learned.

    New rows start at the mean of the old ones (Hewitt 2021: no new token is then likelier than the average).
    Vocabularies padded beyond the tokenizer are never cut.
    """
    rows = len(_weight(model.get_input_embeddings()))
    if len(tokenizer) <= rows:
        return _chat_tokens(tokenizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = _weight(embeddings)
        weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    return sorted({*range(rows, len(tokenizer)), *_chat_tokens(tokenizer)})


def _tell_special_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = model.config.get_text_config()
    text.pad_token_id = chat.pad_id(tokenizer)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(text, name, getattr(tokenizer, name))
    generation = model.generation_config
    if generation is not None:
        generation.bos_token_id, generation.pad_token_id = text.bos_token_id, text.pad_token_id
        generation.eos_token_id = list(chat.stop_ids(tokenizer, generation.eos_token_id))


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of the architecture; the saved config keeps the model's own. InputError if it has none."""
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_" not in name:
            module.p, found = probability, found + 1
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout, found = probability, found + 1
    if not found:
        raise InputError(f"dropout={probability}: {type(model).__name__} has no dropout to set; leave it out")


def trl_arguments(config: SFTConfig, *, evaluate: bool) -> trl.SFTConfig:
    """Our settings as the TrainingArguments that trl's trainer and the callbacks receive."""
    schedules = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    return training_arguments(
        config,
        trl.SFTConfig,
        lr_scheduler_type=schedules[config.lr_schedule],
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if config.lr_schedule == "cosine" else None,
        max_length=None,
        eval_strategy=("steps" if config.eval_steps else "epoch") if evaluate else "no",
        eval_steps=config.eval_steps or None,
        report_to=config.report_to or [],
    )


def _chat_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """ChatML's tokens where the model came without a chat template: in its vocabulary or not, it never used them."""
    if tokenizer.chat_template != chat.CHATML:
        return []
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in ("<|im_start|>", "<|im_end|>"))


def show_bias(head: Any) -> None:
    """Let trl's loss read ``head.bias``, which peft's wrapper of trained token rows hides (peft 0.21)."""
    if not hasattr(head, "bias"):
        vars(head)["bias"] = head.original_module.bias


def _weight(embeddings: Any) -> Tensor:
    return embeddings.weight


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """The last part of the names of the input embeddings and, where it has its own weights, the head."""
    modules = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not modules[0].weight:
        modules.append(model.get_output_embeddings())
    named = model.named_modules()
    return [name.rsplit(".", 1)[-1] for name, module in named if any(module is wanted for wanted in modules)]


def _tokenizer(model: Any, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if given is not None:
        chat.prepare_tokenizer(given)
        return given
    path = model if not isinstance(model, nn.Module) else getattr(model, "name_or_path", "")
    if not path:
        raise InputError("a model object needs its tokenizer: pass processing_class=tokenizer")
    return load_tokenizer(path)
