"""Loading and saving the four models of RLHF, and the scalar head two of them carry.

A model arrives as a folder (full weights, or a LoRA adapter beside its base's name), a hub id, or an
object. LoRA adapters are never merged: every stage of the chain is an adapter over the same base.
`rlhf.actor_critic` joins them for PPO.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf import InputError, chat, encoders

NORMALIZER_FILE = "score_normalizer.json"


@dataclass(frozen=True)
class ScoreNormalizer:
    """Mean and spread of a reward model's raw scores; a normalised score is ``(raw - mean) / std``.

    InstructGPT and Stiennon et al. (2020) shift so that reference responses score 0 on average; Ziegler
    et al. (2019) also scale to unit variance, so that the KL coefficient keeps its meaning from one reward
    model to the next. `count` is the number of responses it was measured on (0: never measured).
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
        return (raw - self.mean) / self.std

    def save(self, folder: str | Path) -> None:
        Path(folder, NORMALIZER_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ScoreNormalizer:
        """The normaliser saved beside a reward model; identity (count 0) where there is none."""
        path = Path(folder, NORMALIZER_FILE)
        return cls(**json.loads(path.read_text())) if path.is_file() else cls()


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def lora_config(
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
    task_type: TaskType | str = TaskType.CAUSAL_LM,
    trainable_tokens: list[int] | None = None,
) -> LoraConfig | None:
    """A LoRA configuration, or None where rank is 0. A reward model's score head is always trained and saved.

    trainable_tokens: ids whose embeddings the base never learned (chat tokens added to its vocabulary).
    """
    if rank == 0:
        return None
    modules = [target_modules] if isinstance(target_modules, str) and target_modules != "all-linear" else target_modules
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes floats too
        lora_dropout=dropout,
        target_modules=modules or "all-linear",
        task_type=task_type,
        modules_to_save=["score"] if task_type == TaskType.SEQ_CLS else None,
        trainable_token_indices=trainable_tokens or None,
    )


def is_adapter(path: str | Path) -> bool:
    """Does this folder hold a LoRA adapter rather than full weights?"""
    return Path(path, "adapter_config.json").is_file()


def check_folder(path: str | Path) -> None:
    """Refuse what looks like a local path and holds no model, before transformers asks a hub for it."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            raise InputError(f"{path}: no config.json and no adapter_config.json; name a folder with a saved model")
    elif folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1 or folder.is_file():
        raise InputError(f"{path}: no such model folder; name a saved model's folder or a hub id")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with a chat template and a pad token (see rlhf.chat)."""
    check_folder(path)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{path}: model folder without a tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from error
    if not tokenizer.chat_template:
        encoders.prepare_tokenizer(tokenizer, _config(_base_of(path) if is_adapter(path) else path))
    chat.prepare_tokenizer(tokenizer)
    return tokenizer


def load_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """A causal language model to train: full weights, an adapter that goes on, or (`lora`) a fresh adapter.

    Under LoRA the trained adapter is the one called "default". Objects are used as they are, in place.
    """
    if isinstance(model, nn.Module):
        loaded = model
    elif is_adapter(model):
        _refuse_classifier(model)
        base = _from_pretrained(AutoModelForCausalLM, _base_of(model), dtype)
        _fit_embeddings(base, load_tokenizer(model))
        loaded = PeftModel.from_pretrained(base, str(model), is_trainable=True)
    else:
        _refuse_classifier(model)
        loaded = _from_pretrained(AutoModelForCausalLM, model, dtype)
    keep_gradients(loaded)
    if isinstance(loaded, PeftModel):
        rank = getattr(loaded.peft_config["default"], "r", None)
        if lora is not None and lora.r != rank:
            raise InputError(
                f"lora_rank={lora.r}, but the model is already an adapter of rank {rank}; "
                "leave lora_rank at 0 to continue that adapter"
            )
        return loaded
    return _with_adapter(loaded, lora, seed) if lora is not None else loaded


def keep_gradients(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers hand gradients down on CPUs, too.

    On a CPU with AVX512-BF16 their first forward in eval mode (sampling, say) lays the weights out anew, for an
    operator without a backward: whatever lies below the layer would get no gradient from then on, without an error
    (bitsandbytes 0.50). Raises InputError where that has happened already."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError("the 4-bit model has been run in eval mode, after which it can't learn: load it anew")
        layer.support_avx512bf16_for_cpu = False


def is_quantized(model: Any) -> bool:
    """Are weights held in 8 or 4 bits? Then only adapters beside them can be trained."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(plain, "is_quantized", False))


def new_scalar_model(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """A reward model to train, started from an SFT model, or from an encoder: its backbone under a new scalar head.

    The head's weight is drawn from N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020; 2403.17031, detail 14); it has
    no bias, since the Bradley-Terry loss sees only differences and the normaliser shifts what remains. An
    adapter folder is continued (a copy of its LoRA weights, plus the head); `lora` starts a fresh one.
    An encoder keeps its family's own head; what of it the folder lacks is drawn with the seed.
    """
    scalar: Any
    adapter = model if not isinstance(model, nn.Module) and is_adapter(model) else None
    if isinstance(model, PeftModel):
        raise InputError("reward model: got a PeftModel object; save the adapter and pass its folder instead")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # an encoder's head has more layers than the last one, which is drawn below
        if isinstance(model, nn.Module):
            scalar = _with_scalar_head(model)
        else:
            source = _base_of(adapter) if adapter else model
            _provide_scalar_class(_config(source))
            scalar = _from_pretrained(AutoModelForSequenceClassification, source, dtype, num_labels=1)
            if adapter:
                _fit_embeddings(scalar, load_tokenizer(adapter))
    encoders.draw_head(_last_linear(scalar), seed)
    if adapter:
        config = copy.deepcopy(PeftConfig.from_pretrained(str(adapter)))
        if lora is not None and lora.r != config.r:
            raise InputError(f"lora_rank={lora.r}, but {adapter} is an adapter of rank {config.r}; leave it at 0")
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.SEQ_CLS, ["score"], False
        if isinstance(config.trainable_token_indices, dict):  # the causal head has no place in a reward model
            kept = {name: ids for name, ids in config.trainable_token_indices.items() if name != "lm_head"}
            config.trainable_token_indices = kept or None
        peft_model = _with_adapter(scalar, config, seed)
        own = get_peft_model_state_dict(peft_model)  # set_peft_model_state_dict wants the head's weight too
        loaded = load_peft_weights(str(adapter), device="cpu")
        set_peft_model_state_dict(peft_model, own | {name: w for name, w in loaded.items() if name in own})
        return peft_model
    return _with_adapter(scalar, lora, seed) if lora is not None else scalar


def _with_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """A fresh adapter whose weights the seed alone decides (peft draws them from the global generator)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # for example layers of a Mamba model, which LoRA cannot adapt
            what = _first_line(error).split(". ")[0]
            raise InputError(f"LoRA: {what}; name the layers to adapt in lora_target_modules") from error


def load_scalar_model(
    path: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel | PeftModel, ScoreNormalizer]:
    """A trained reward model and its normaliser, from a full folder, an adapter folder or a hub id."""
    check_folder(path)
    if is_adapter(path):
        config = PeftConfig.from_pretrained(str(path))
        if config.task_type != TaskType.SEQ_CLS:
            raise InputError(f"{path}: an adapter for {config.task_type}, not a reward model (SEQ_CLS)")
        _provide_scalar_class(_config(_base_of(path)))
        base = _from_pretrained(AutoModelForSequenceClassification, _base_of(path), dtype, num_labels=1)
        _fit_embeddings(base, load_tokenizer(path))
        return PeftModel.from_pretrained(base, str(path)).eval(), ScoreNormalizer.load(path)
    config = _config(path)
    if not any("SequenceClassification" in name or "RewardModel" in name for name in config.architectures or []):
        raise InputError(
            f"{path}: holds {config.architectures}, no reward model; train one with recipes/reward_model.py"
        )
    if config.num_labels != 1:
        raise InputError(f"{path}: num_labels={config.num_labels}; a reward model has one score")
    _provide_scalar_class(config)
    return _from_pretrained(AutoModelForSequenceClassification, path, dtype).eval(), ScoreNormalizer.load(path)


def backbone(model: Any) -> Any:
    """The transformer under a causal or scalar head: input ids in, hidden states out."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(plain, plain.base_model_prefix)


def score_head(model: Any) -> Any:
    """The module that writes the score: a linear layer `score`, or what an encoder's family has."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(encoders.head_modules(plain).values())[-1] if encoders.is_encoder(plain.config) else plain.score


def is_scalar(model: Any) -> bool:
    """Does this model object have a scalar head already?"""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if encoders.is_encoder(plain.config):
        return "SequenceClassification" in type(plain).__name__ and bool(plain.config.num_labels == 1)
    return hasattr(plain, "score")


def freeze_bias(model: Any) -> None:
    """The Bradley-Terry loss sees differences of scores only: an encoder's last bias would drift by rounding."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if encoders.is_encoder(plain.config):
        for module in score_head(plain).modules():
            if isinstance(module, nn.Linear) and module.out_features == 1 and module.bias is not None:
                module.bias.requires_grad_(False)


def position_ids(attention_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """0, 1, 2 ... over real tokens, so that left and right padding give a model the same positions."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_token_scores(
    model: PreTrainedModel | PeftModel, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Raw scores at each row's last real position, found by the attention mask (pad may equal eos), in float32.

    Of an encoder: whatever position its own head reads, with padding masked."""
    if encoders.is_encoder(model.config):
        return encoders.encoder_scores(model, input_ids, attention_mask)
    hidden = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    ).last_hidden_state
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(attention_mask.bool(), places, -1).amax(-1)
    return score_head(model)(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1).float()


def disable_dropout(model: nn.Module) -> None:
    """Dropout off by probability, so that train mode (which gradient checkpointing needs) stays exact.

    Families keep probabilities in `nn.Dropout`, in float attributes (attention_dropout, attn_dropout, layerdrop
    ...), or read them from their config at every forward (Falcon): inner modules then get a config of their
    own, so that the one that is saved keeps the model's numbers.
    """
    quiet: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropouts(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel | PeftModel):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _zero_dropouts(quiet[id(config)])
            module.config = quiet[id(config)]  # type: ignore[assignment]


def _zero_dropouts(thing: Any) -> None:
    for name, value in list(vars(thing).items()):
        if "drop" in name and isinstance(value, float):
            setattr(thing, name, 0.0)


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares nothing. (`copy.deepcopy` of a model whose `forward` a trainer replaced runs the
    original's weights.)"""
    twin: Any = type(model)(copy.deepcopy(model.config))
    twin.to(device=model.device, dtype=model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def _from_pretrained(cls: Any, path: str | Path, dtype: torch.dtype | None, **kwargs: Any) -> PreTrainedModel:
    check_folder(path)
    try:
        model = cls.from_pretrained(str(path), dtype=dtype or torch.float32, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no model could be loaded ({_first_line(error)})") from error
    if model.device.type == "cpu":
        # safetensors maps weights at any address, and a CPU's kernels round by it: at torch's own (aligned) addresses
        # a model gives the same numbers to the last bit whatever file it came from
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
    return model


def _config(path: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no model configuration ({_first_line(error)})") from error


def _refuse_classifier(path: str | Path) -> None:
    """transformers would load a reward model as a language model with a random head, without a word."""
    check_folder(path)
    if is_adapter(path):
        what = str(PeftConfig.from_pretrained(str(path)).task_type or "")
    else:
        what = ", ".join(_config(path).architectures or [])
    if "SEQ_CLS" in what or "SequenceClassification" in what:
        raise InputError(f"{path}: holds a reward model ({what}), not a language model; name the policy's folder")


def _base_of(adapter: str | Path) -> str:
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise InputError(
            f"{adapter}/adapter_config.json: base_model_name_or_path is empty; write the base's path there"
        )
    return base


def _fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the vocabulary for tokens that were added for chat; never shrink it (bases pad theirs)."""
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def _with_scalar_head(model: PreTrainedModel) -> PreTrainedModel:
    if is_scalar(model):
        return model
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    _provide_scalar_class(config)
    scalar = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype).to(model.device)
    # an encoder's masked language model may have no pooler, which is drawn
    backbone(scalar).load_state_dict(model.base_model.state_dict(), strict=not encoders.is_encoder(config))
    return scalar


def _provide_scalar_class(config: PreTrainedConfig) -> None:
    """Some families (Granite, Cohere ...) have no class with a score head: they get transformers' generic one.

    It is registered under the family's config, so that a saved reward model loads again; plain transformers
    needs this call before it can load such a folder.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if type(config) not in MODEL_MAPPING:
        raise InputError(f"{config.model_type}: transformers has no backbone for this family; use another as trunk")
    trunk: Any = MODEL_MAPPING[type(config)]
    family = next(cls for cls in trunk.__mro__[1:] if issubclass(cls, PreTrainedModel))
    name = f"{trunk.__name__.removesuffix('Model')}ForSequenceClassification"
    fields = {"base_model_prefix": trunk.base_model_prefix, "config_class": type(config)}
    fields["__module__"] = trunk.__module__  # where transformers looks up what the family's attention and experts can
    scalar: Any = type(name, (GenericForSequenceClassification, family), fields)
    AutoModelForSequenceClassification.register(type(config), scalar, exist_ok=True)  # else ignored without a word


def _last_linear(scalar: Any) -> nn.Linear:
    if encoders.is_encoder(scalar.config):
        return encoders.last_linear(scalar)
    if not isinstance(getattr(scalar, "score", None), nn.Linear):
        raise InputError(f"{type(scalar).__name__} has no linear head named `score`; use a decoder or encoder as trunk")
    return scalar.score


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
