"""Reward models: a backbone with a scalar head, and the normaliser of its scores."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.errors import InputError, reason
from rlhf.models import encoders, packing
from rlhf.models.adapter_check import check_same, read_adapter
from rlhf.models.adapters import backbone, base_model, is_adapter
from rlhf.models.loading import is_quantized, load_tokenizer, with_adapter
from rlhf.models.long_row import Rows
from rlhf.models.pretrained import (
    adapter_weights,
    base_of,
    check_folder,
    config_of,
    fit_embeddings,
    from_pretrained,
    load_adapter,
    load_base,
    saved_rows,
    unreadable,
)
from rlhf.padding import position_ids
from rlhf.rows.jsonl import read_object

NORMALIZER_FILE = "score_normalizer.json"


@dataclass(frozen=True)
class ScoreNormalizer:
    """The mean and spread of a reward model's raw scores; a normalised score is ``(raw - mean) / std``.

    InstructGPT and Stiennon et al. (2020) shift scores so that reference responses score 0 on average; Ziegler
    et al. (2019) also scale to unit variance, so that the KL coefficient means the same with every reward model.
    count: the number of responses that mean and std were measured on (0: never measured).
    """

    mean: float = 0.0
    std: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise InputError(
                f"score normaliser: mean={self.mean} and std={self.std} must be finite, std positive; "
                "the reward model gives one score to everything: train it on more data"
            )

    def __call__(self, raw: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Normalise raw scores."""
        return (raw - self.mean) / self.std

    def save(self, folder: str | Path) -> None:
        """Write the normaliser beside a reward model."""
        Path(folder, NORMALIZER_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ScoreNormalizer:
        """Load the normaliser saved beside a reward model; the identity (count 0) if there is none."""
        path = Path(folder, NORMALIZER_FILE)
        if not path.is_file():
            return cls()
        content = read_object(path)
        try:
            return cls(float(content["mean"]), float(content["std"]), int(content.get("count", 0)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: no normaliser with numbers mean, std and count ({reason(error)})") from None


def new_scalar_model(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
    labels: int = 1,
    how: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel | PeftModel:
    """Make a reward model to train from an SFT model or an encoder: its backbone with a new scalar head (or, of a
    process model, one of several `labels`).

    The head's weight is drawn from N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020; 2403.17031, detail 14). It has no bias,
    since the Bradley-Terry loss depends only on differences and the normaliser shifts the scores. An adapter folder is
    continued (a copy of its LoRA weights, plus the head); `lora` starts a new adapter. An encoder keeps its family's
    own head; weights of it that the folder lacks are drawn with the seed. how: as for `load_policy`.
    """
    scalar: Any
    if isinstance(model, PeftModel):
        raise InputError("reward model: got a PeftModel object; save the adapter and pass its folder instead")
    adapter = model if not isinstance(model, nn.Module) and is_adapter(model) else None
    held = read_adapter(adapter) if adapter else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for the layers of an encoder's head before the last one, which is drawn below
        if isinstance(model, nn.Module) and is_quantized(model):
            raise InputError("reward model: a quantized object can get no head; pass its folder, with load_in_4bit")
        if isinstance(model, nn.Module):
            scalar = _with_scalar_head(model, labels, dtype)
        elif adapter:
            _provide_scalar_class(config_of(base_of(adapter)))
            scalar = load_base(
                AutoModelForSequenceClassification, adapter, dtype, new_modules, num_labels=labels, **how
            )
            fit_embeddings(scalar, max(len(load_tokenizer(adapter)), saved_rows(adapter, scalar)))
        else:
            _provide_scalar_class(config_of(model))
            scalar = from_pretrained(
                AutoModelForSequenceClassification, model, dtype, new_modules, num_labels=labels, **how
            )
    encoders.draw_head(_last_linear(scalar), seed)
    if adapter and held:
        continued = _continued(scalar, held, adapter, seed)
        if lora is not None:
            check_same(lora, continued, str(adapter))
        return continued
    return with_adapter(scalar, lora, seed) if lora is not None else scalar


def _continued(scalar: PreTrainedModel, held: LoraConfig, adapter: str | Path, seed: int) -> PeftModel:
    """Put a copy of an adapter on a reward model: its LoRA weights, trained tokens and saved modules, and the head.

    Left out is what belongs to a language head. Raises InputError if the adapter's file lacks anything else."""
    config = copy.deepcopy(held)
    names = {name.rsplit(".", 1)[-1] for name, _ in scalar.named_modules()}
    heads = list(new_modules(scalar))
    saved = [name for name in config.modules_to_save or [] if name.rsplit(".", 1)[-1] in names]
    config.modules_to_save = sorted({*saved, *heads})
    config.task_type, config.inference_mode, config.init_lora_weights = TaskType.SEQ_CLS, False, True
    if isinstance(config.trainable_token_indices, dict):
        kept = {name: ids for name, ids in config.trainable_token_indices.items() if name.rsplit(".", 1)[-1] in names}
        config.trainable_token_indices = kept or None
    peft_model = with_adapter(scalar, config, seed)
    own = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    parts = {f"base_model.model.{name}" for name, _ in scalar.named_children()}
    loaded = adapter_weights(adapter)
    loaded = {name: weight for name, weight in loaded.items() if ".".join(name.split(".")[:3]) in parts}
    lacking = [name for name in own if name not in loaded and set(heads).isdisjoint(name.split("."))]
    if lacking:
        raise InputError(f"{adapter}: its adapter lacks {len(lacking)} weights, first {lacking[0]}; copy it again")
    try:
        result: Any = set_peft_model_state_dict(peft_model, own | loaded)  # it wants the new head's weights too
    except RuntimeError as error:
        raise unreadable(adapter, "no adapter", error) from error
    if result.unexpected_keys:
        raise InputError(f"{adapter}: its adapter does not fit the base, first {result.unexpected_keys[0]}")
    return peft_model


def load_scalar_model(
    path: str | Path, dtype: torch.dtype | None = None, labels: int = 1, *, base: PreTrainedModel | None = None
) -> tuple[PreTrainedModel | PeftModel, ScoreNormalizer]:
    """Load a trained reward model and its normaliser from a full folder, an adapter folder or a hub id.

    labels: numbers that its head gives; of a reward model one. base: what `load_scalar_base` read for another adapter
    over the same base; its weights are shared, not read again."""
    check_folder(path)
    if is_adapter(path):
        _reward_adapter(path)
        base = load_scalar_base(path, dtype, labels) if base is None else _sharing(base)
        fit_embeddings(base, max(len(load_tokenizer(path)), saved_rows(path, base)))
        return load_adapter(base, path, trainable=False).eval(), ScoreNormalizer.load(path)
    config = config_of(path)
    if not any("SequenceClassification" in name or "RewardModel" in name for name in config.architectures or []):
        raise InputError(
            f"{path}: holds {config.architectures}, no reward model; train one with recipes/reward_model.py"
        )
    if config.num_labels != labels and _says_labels(path):
        wanted = "a reward model has one score" if labels == 1 else f"expected a head of {labels}"
        raise InputError(f"{path}: num_labels={config.num_labels}; {wanted}")
    _provide_scalar_class(config)
    model = from_pretrained(AutoModelForSequenceClassification, path, dtype, num_labels=labels)
    return model.eval(), ScoreNormalizer.load(path)


def load_scalar_base(path: str | Path, dtype: torch.dtype | None = None, labels: int = 1) -> PreTrainedModel:
    """Load the base of a reward model's adapter, with a head that the adapter replaces."""
    _provide_scalar_class(config_of(base_of(path)))
    held = {*(_reward_adapter(path).modules_to_save or []), "score", "classifier"}  # peft itself adds the last two
    base = load_base(AutoModelForSequenceClassification, path, dtype, lambda model: held, num_labels=labels)
    _head_in_float32(base)
    return base


def _reward_adapter(path: str | Path) -> LoraConfig:
    """Read the configuration of a reward model's adapter. Raises InputError for another model's."""
    adapter = read_adapter(path)
    if adapter.task_type != TaskType.SEQ_CLS:
        raise InputError(f"{path}: an adapter for {adapter.task_type}, not a reward model (SEQ_CLS)")
    return adapter


def _sharing(base: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules, to which an adapter can be added, around the same parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _says_labels(path: str | Path) -> bool:
    """Return whether a model's config.json gives a number of labels; transformers takes 2 where it gives none."""
    settings, _ = PreTrainedConfig.get_config_dict(str(path))
    return not {"num_labels", "id2label"}.isdisjoint(settings)


def new_modules(model: PreTrainedModel) -> Sequence[str]:
    """Return the names of the modules that a new reward model has and its pretrained trunk may lack."""
    if encoders.is_encoder(model.config):
        return encoders.new_modules(model)
    _last_linear(model)  # refuses families with another head
    return ["score"]


def _head_in_float32(scalar: PreTrainedModel) -> None:
    """Hold a decoder's score head in float32: it is small, trained, and one number decides."""
    if not encoders.is_encoder(scalar.config):
        _last_linear(scalar).float()


def score_head(model: nn.Module) -> nn.Module:
    """Return the module that computes the score: a linear layer `score`, or the head of an encoder's family."""
    plain = base_model(model)
    return list(encoders.head_modules(plain).values())[-1] if encoders.is_encoder(plain.config) else plain.score


def is_scalar(model: nn.Module, labels: int = 1) -> bool:
    """Return whether a model object already has a scalar head, or one of so many labels."""
    plain = base_model(model)
    if encoders.is_encoder(plain.config):
        return "SequenceClassification" in type(plain).__name__ and bool(plain.config.num_labels == labels)
    return hasattr(plain, "score") and bool(plain.config.num_labels == labels)


def freeze_bias(model: nn.Module) -> None:
    """Freeze the bias of an encoder's last layer, which would drift by rounding.

    The Bradley-Terry loss depends only on differences of scores, so the bias's exact gradient is 0."""
    plain = base_model(model)
    if encoders.is_encoder(plain.config):
        for module in score_head(plain).modules():
            if isinstance(module, nn.Linear) and module.out_features == 1 and module.bias is not None:
                module.bias.requires_grad_(False)


def last_token_scores(
    model: PreTrainedModel | PeftModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"],
    packs: bool = False,
) -> Float[Tensor, "B"]:
    """Compute raw scores in float32 at each row's last real position, found by the attention mask (pad may equal eos).

    An encoder's own head reads the position of its family, with padding masked. packs: rows that are padded on the
    right as one long row, if it is not too long, and what neighbouring rows begin with once (`packing`)."""
    if encoders.is_encoder(model.config):
        return encoders.encoder_scores(model, input_ids, attention_mask)
    real = attention_mask.bool()
    shared = packing.common(model, input_ids, real) if packs else None
    if packs and packing.fits(model, real, shared):
        tokens = Rows.of(real, shared=shared).tokens[:, -1]  # of its padding, too, a row's last token
        states = packing.packed_hidden(model, input_ids, real, shared)[tokens]
    else:
        mask = attention_mask.long()
        hidden = backbone(model)(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
        indices = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(real, indices, -1).amax(-1)
        states = hidden[torch.arange(len(last), device=last.device), last]
    head = score_head(model)
    return head(states.to(cast(Tensor, head.weight).dtype)).squeeze(-1).float()


def _with_scalar_head(model: PreTrainedModel, labels: int, dtype: torch.dtype | None) -> PreTrainedModel:
    if is_scalar(model, labels):
        return model
    config = copy.deepcopy(model.config)
    config.num_labels = labels
    _provide_scalar_class(config)
    scalar = AutoModelForSequenceClassification.from_config(config, dtype=dtype or torch.float32).to(model.device)
    trunk = model.base_model if model.get_output_embeddings() is None else backbone(model)
    # not strict for an encoder: a masked language model may have no pooler, which is drawn
    backbone(scalar).load_state_dict(trunk.state_dict(), strict=not encoders.is_encoder(config))
    return scalar


def _provide_scalar_class(config: PreTrainedConfig) -> None:
    """Register transformers' generic class with a score head for a family that has none (Granite, Cohere ...).

    It is registered for the family's config, so that a saved reward model loads again; plain transformers needs this
    call before it can load such a folder.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if type(config) not in MODEL_MAPPING:
        raise InputError(f"{config.model_type}: transformers has no backbone for this family; use another as trunk")
    trunk: Any = MODEL_MAPPING[type(config)]
    family = next(cls for cls in trunk.__mro__[1:] if issubclass(cls, PreTrainedModel))
    name = f"{trunk.__name__.removesuffix('Model')}ForSequenceClassification"
    fields = {"base_model_prefix": trunk.base_model_prefix, "config_class": type(config)}
    fields["__module__"] = trunk.__module__  # transformers looks there for the family's kinds of attention and experts
    scalar: Any = type(name, (GenericForSequenceClassification, family), fields)
    setattr(sys.modules[trunk.__module__], name, scalar)  # pickle looks there for a model's class
    AutoModelForSequenceClassification.register(type(config), scalar, exist_ok=True)  # else it is silently ignored


def _last_linear(scalar: Any) -> nn.Linear:
    if encoders.is_encoder(scalar.config):
        return encoders.last_linear(scalar)
    if not isinstance(getattr(scalar, "score", None), nn.Linear):
        raise InputError(f"{type(scalar).__name__} has no linear head named `score`; use a decoder or encoder as trunk")
    return scalar.score
