"""A trained moderation model: how likely each category of a text is, and whether it is flagged.

A trunk reads a text once and gives a logit per category, which sigmoid(scale z + shift) turns into a probability; a
text whose probability reaches the category's threshold is flagged. A text of more tokens than `max_length` is read in
overlapping windows, and the highest logit of each category counts: nothing of it is cut. An encoder is read at the mean
of its last states, of length 1, where sentence encoders keep a text's meaning; a decoder at its last token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.scoring import CATEGORIES_FILE, length_batches, place
from reward_models.thresholds import Calibration
from reward_models.words import WordClassifier
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models import loading as models
from rlhf.models.adapters import backbone, base_model
from rlhf.models.pretrained import check_folder
from rlhf.models.scalar import last_token_scores, load_scalar_model
from rlhf.padding import pad, position_ids
from rlhf.rows.jsonl import read_object
from rlhf.rows.messages import Messages, check_several, text_of
from rlhf.serving.app import Verdict

WORDS_FILE = "words.npz"
OVERLAP = 32
"""Tokens that two neighbouring windows of a long text share."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """One thing that a text may be, and how its logit is read."""

    name: str
    offset: float = 0.0
    """Is added to the head's number: the bias that a causal model's head has not."""
    scale: float = 1.0
    shift: float = 0.0
    threshold: float = 0.5
    """A text is flagged from this probability on."""
    flagged: int = 0
    """Of `negatives`, those that are flagged at this threshold."""
    negatives: int = 0
    """Held-out texts without the category, on which the threshold was chosen."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a moderation model's folder says of it, in categories.json."""

    categories: tuple[Category, ...]
    max_length: int
    reads: str = "trunk"
    """trunk, or trunk_and_words: the mean of its logits and of a bag of words'."""
    wanted_false_positive_rate: float | None = None
    """For which the thresholds were chosen; None: they were not."""

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    @property
    def offsets(self) -> Float[Tensor, " K"]:
        """Return what is added to each category's number from the head."""
        return torch.tensor([category.offset for category in self.categories])

    def save(self, folder: str | Path) -> None:
        """Write categories.json."""
        Path(folder, CATEGORIES_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> About:
        """Read categories.json. Raises InputError where the folder holds no moderation model."""
        path = Path(folder, CATEGORIES_FILE)
        content = read_object(path, f"{folder} holds no moderation model; train one", "moderation model")
        try:
            categories = tuple(Category(**category) for category in content["categories"])
            about = cls(**{**content, "categories": categories})
            numbers = np.array([(c.offset, c.scale, c.shift, c.threshold) for c in categories], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not what `rlhf moderation` writes ({error}); copy the folder again") from None
        if about.reads not in ("trunk", "trunk_and_words"):
            raise InputError(f"{path}: reads: got {about.reads!r}; one of trunk, trunk_and_words")
        if not categories or not np.isfinite(numbers).all():
            raise InputError(f"{path}: a category without finite offset, scale, shift, threshold; copy it again")
        return about


# ------------------------------------------------------------------------------------------------ reading


def windows_of(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, encoder: bool) -> list[list[int]]:
    """Encode a text as one or more windows of at most `max_length` tokens; control tokens written in it stay text.

    An encoder's windows stand between its own first and last token; a decoder's begin as its tokenizer begins a text
    and end with an end of turn."""
    content = chat.encode_text(tokenizer, text)
    if encoder:
        before, after = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    else:
        begun = tokenizer.encode("a", add_special_tokens=True)[:1]
        before = begun if begun == [tokenizer.bos_token_id] else []
        after = [chat.end_of_turn_id(tokenizer)]
    size = max_length - len(before) - len(after)
    step = size - min(OVERLAP, size // 4)
    starts = range(0, max(1, len(content) - size + step), step)
    return [[*before, *content[start : start + size], *after] for start in starts]


def direction(states: Float[Tensor, "s T H"], mask: Int[Tensor, "s T"]) -> Float[Tensor, "s H"]:
    """Compute the mean of the states of real tokens, scaled to length 1, in float32: sentence encoders are trained so
    that only the direction of it tells texts apart."""
    weights = mask.unsqueeze(-1).float()
    mean = (states.float() * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def window_logits(
    model: nn.Module,
    plain: PreTrainedModel | PeftModel,
    input_ids: Int[Tensor, "s T"],
    attention_mask: Int[Tensor, "s T"],
) -> Float[Tensor, "s K"]:
    """Compute an encoder's logits, in float32: its last linear layer, on the `direction` of its last states.

    model: `plain` itself, or what accelerate made of it, which is called; hooks put that in the place of what the
    family's own head would read."""
    caught: list[Tensor] = []

    def read_mean(layer: nn.Linear, given: tuple[Any, ...]) -> tuple[Tensor]:
        return (direction(caught[-1], attention_mask).to(layer.weight.dtype),)

    hooks = [
        backbone(plain).register_forward_hook(lambda trunk, given, out: caught.append(out.last_hidden_state)),
        encoders.last_linear(base_model(plain)).register_forward_pre_hook(read_mean),
    ]
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read_states(
    model: PreTrainedModel | PeftModel, windows: Sequence[Sequence[int]], pad_id: int, tokens_per_microbatch: int
) -> Float[Tensor, "s H"]:
    """Return the state that the head reads of each window, on the CPU: an encoder's `direction`, a decoder's last."""
    device, found = next(model.parameters()).device, list[Tensor]()
    order: list[int] = []
    for indices in length_batches([len(ids) for ids in windows], tokens_per_microbatch):
        input_ids, real = pad([windows[i] for i in indices], pad_id, device)
        mask = real.long()
        if encoders.is_encoder(model.config):
            read = direction(backbone(model)(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask)
        else:
            given = {"attention_mask": mask, "position_ids": position_ids(mask), "use_cache": False}
            states = backbone(model)(input_ids=input_ids, **given).last_hidden_state.float()
            read = states[torch.arange(len(indices), device=device), mask.sum(1) - 1]
        found.append(read.cpu())
        order += indices
    states = torch.cat(found)
    return states[torch.tensor(order).argsort()]


def plain_logits(
    model: PreTrainedModel | PeftModel, input_ids: Int[Tensor, "s T"], attention_mask: Int[Tensor, "s T"]
) -> Float[Tensor, "s K"]:
    """Compute a model's logits of windows that are padded on the right."""
    if encoders.is_encoder(model.config):
        return window_logits(model, model, input_ids, attention_mask)
    return last_token_scores(model, input_ids, attention_mask).reshape(len(input_ids), -1)


def highest(logits: Float[Tensor, "s K"], texts: Int[Tensor, " s"], count: int) -> Float[Tensor, "n K"]:
    """Return each text's highest logit of every category over its windows. texts: whose each window is."""
    found = logits.new_full((count, logits.shape[1]), -torch.inf)
    return found.scatter_reduce(0, texts[:, None].expand_as(logits), logits, "amax")


@torch.no_grad()
def read_logits(
    model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[list[int]]], pad_id: int, tokens_per_microbatch: int
) -> Float[Tensor, "n K"]:
    """Return the logits of texts, given as their windows, on the CPU; windows of like length are read together."""
    flat = [(number, ids) for number, windows in enumerate(texts) for ids in windows]
    device, parts, order = next(model.parameters()).device, list[Tensor](), list[int]()
    for indices in length_batches([len(ids) for _, ids in flat], tokens_per_microbatch):
        input_ids, mask = pad([flat[i][1] for i in indices], pad_id, device)
        parts.append(plain_logits(model, input_ids, mask.long()).cpu())
        order += indices
    return highest(torch.cat(parts), torch.tensor([flat[i][0] for i in order]), len(texts))


def read_at_the_mean(model: PreTrainedModel | PeftModel) -> None:
    """Freeze what an encoder's family has between its states and its last layer, which the mean does not pass."""
    plain = base_model(model)
    if not encoders.is_encoder(plain.config):
        return
    last = encoders.last_linear(plain)
    if last.in_features != plain.config.hidden_size:
        seen = f"its head reads {last.in_features} numbers, its states have {plain.config.hidden_size}"
        raise InputError(f"{type(plain).__name__}: {seen}; take another encoder as trunk")
    pooler = getattr(backbone(plain), "pooler", None)
    unused = [*encoders.head_modules(plain).values(), *([pooler] if isinstance(pooler, nn.Module) else [])]
    own = {id(parameter) for parameter in last.parameters()}
    for module in unused:
        for parameter in module.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ scores


class ModerationModel:
    """A moderation model: texts in, a verdict per text out, as /v1/moderations, filters and the monitor call one.

    `probabilities` gives the calibrated probability of each of `categories`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        about: About,
        words: WordClassifier | None = None,
        *,
        tokens_per_microbatch: int = 4096,
        name: str = "moderation",
    ) -> None:
        """words: with whose logits the trunk's are averaged."""
        self.words = words
        self.model, self.tokenizer, self.about = model.eval(), tokenizer, about
        self.tokens_per_microbatch = tokens_per_microbatch
        self._encoder = encoders.is_encoder(model.config)
        self.__name__ = name

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_microbatch: int = 4096,
    ) -> ModerationModel:
        """Load the moderation model of a folder (full weights or a LoRA adapter).

        device: by default the accelerator, where there is one. dtype: by default float32. tokens_per_microbatch: padded
        tokens per forward; a memory setting. Raises InputError where the folder holds no moderation model."""
        check_folder(path)
        about = About.read(path)
        model, _ = load_scalar_model(path, dtype, len(about.categories))
        place(model, device)
        tokenizer = models.load_tokenizer(path)
        words = WordClassifier.load(Path(path, WORDS_FILE)) if about.reads == "trunk_and_words" else None
        return cls(model, tokenizer, about, words, tokens_per_microbatch=tokens_per_microbatch, name=Path(path).name)

    @property
    def categories(self) -> list[str]:
        """Return the categories' names, in the order of the columns of `probabilities`."""
        return self.about.names

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Return a verdict per text: by category, whether it is flagged, and its probability."""
        found = self.probabilities(texts)
        limits = [category.threshold for category in self.about.categories]
        return [
            Verdict(
                {name: bool(p >= limit) for name, p, limit in zip(self.categories, row, limits, strict=True)},
                {name: float(p) for name, p in zip(self.categories, row, strict=True)},
            )
            for row in found
        ]

    def probabilities(self, texts: Sequence[str | Messages]) -> np.ndarray:
        """Return [texts, categories]; a conversation is read as `text_of` writes it."""
        return self.calibrated(self.logits(texts))

    def logits(self, texts: Sequence[str | Messages]) -> np.ndarray:
        """Return logits [texts, categories], before calibration."""
        check_several(texts)
        if not texts:
            return np.zeros((0, len(self.about.categories)))
        plain = [text if isinstance(text, str) else text_of(text) for text in texts]
        length = self.about.max_length
        windows = [windows_of(self.tokenizer, text, length, self._encoder) for text in plain]
        found = read_logits(self.model, windows, chat.pad_id(self.tokenizer), self.tokens_per_microbatch)
        logits = found.double().numpy() + np.array([category.offset for category in self.about.categories])
        return logits if self.words is None else (logits + self.words.logits(plain)) / 2

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits [texts, categories] into probabilities."""
        columns = [Calibration(c.scale, c.shift)(logits[:, n]) for n, c in enumerate(self.about.categories)]
        return np.stack(columns, axis=1)

    def with_categories(self, categories: Sequence[Category], wanted: float | None) -> ModerationModel:
        """Return the same model, read by other scales, shifts and thresholds."""
        about = replace(self.about, categories=tuple(categories), wanted_false_positive_rate=wanted)
        settings: dict[str, Any] = {"tokens_per_microbatch": self.tokens_per_microbatch, "name": self.__name__}
        return ModerationModel(self.model, self.tokenizer, about, self.words, **settings)
