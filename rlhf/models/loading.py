"""Loading of policies and tokenizers.

A model is given as a folder (full weights, or a LoRA adapter with its base's name), a hub id, or an object. LoRA
adapters are never merged: every stage of the chain is an adapter over the same base. `rlhf.models.scalar` loads reward
models.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import utils as hub
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf import chat
from rlhf.errors import InputError, reason
from rlhf.models import encoders
from rlhf.models.adapters import base_model, is_adapter

# peft uses transformers' older name of this attribute whenever it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
_downloads_shown = not hub.are_progress_bars_disabled()
transformers_logging.disable_progress_bar()  # of reading and writing weights: two bars with every checkpoint
if _downloads_shown:  # the line above has switched these bars off too
    hub.enable_progress_bars()


def check_folder(path: str | Path) -> None:
    """Raise InputError for a local path without a model, before transformers looks for it on a hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            raise InputError(f"{path}: no config.json and no adapter_config.json; name a folder with a saved model")
    elif folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1 or folder.is_file():
        raise InputError(f"{path}: no such model folder; name a saved model's folder or a hub id")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id, with a chat template and a pad token (see rlhf.chat)."""
    check_folder(path)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{path}: model folder without a tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no tokenizer could be loaded ({reason(error, 200)})") from error
    if not tokenizer.chat_template:
        encoders.prepare_tokenizer(tokenizer, config_of(base_of(path) if is_adapter(path) else path))
    chat.prepare_tokenizer(tokenizer)
    return tokenizer


def tokenizer_of(
    model: str | Path | PreTrainedModel | PeftModel, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer passed, prepared for chat, else the one in the model's folder."""
    if given is not None:
        if isinstance(model, nn.Module):
            encoders.prepare_tokenizer(given, model.config)
        chat.prepare_tokenizer(given)
        return given
    path = str(model.name_or_path if isinstance(model, nn.Module) else model)
    if not path:
        raise InputError("a model object needs its tokenizer: pass processing_class=tokenizer")
    return load_tokenizer(path)


def load_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model to train: full weights, an adapter to continue, or (`lora`) a new adapter.

    The trained adapter is named "default". A model object is used itself, not copied.
    """
    if isinstance(model, nn.Module):
        loaded = model
    elif is_adapter(model):
        _refuse_classifier(model)
        base = from_pretrained(AutoModelForCausalLM, base_of(model), dtype)
        fit_embeddings(base, load_tokenizer(model))
        loaded = PeftModel.from_pretrained(base, str(model), is_trainable=True)
    else:
        _refuse_classifier(model)
        loaded = from_pretrained(AutoModelForCausalLM, model, dtype)
    keep_gradients(loaded)
    if isinstance(loaded, PeftModel):
        rank = getattr(loaded.peft_config["default"], "r", None)
        if lora is not None and lora.r != rank:
            raise InputError(
                f"lora_rank={lora.r}, but the model is already an adapter of rank {rank}; "
                "leave lora_rank at 0 to continue that adapter"
            )
        return loaded
    return with_adapter(loaded, lora, seed) if lora is not None else loaded


def keep_gradients(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers pass gradients to their inputs on CPUs too.

    On a CPU with AVX512-BF16 their first forward in eval mode (sampling, say) rearranges the weights for an operator
    without a backward: from then on the layers below would get no gradient, without an error (bitsandbytes 0.50).
    Raises InputError if that has happened already."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError("the 4-bit model has been run in eval mode, after which it can't be trained; load it anew")
        layer.support_avx512bf16_for_cpu = False


def is_quantized(model: nn.Module) -> bool:
    """Return whether weights are held in 8 or 4 bits, so that only adapters can be trained."""
    return bool(getattr(base_model(model), "is_quantized", False))


def with_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Add a new adapter whose weights depend on the seed alone (peft draws them from the global generator).

    Raises InputError for the inner model of another adapter, whose layers peft would adapt once more."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError(
            "the model object already carries an adapter, of an earlier trainer perhaps; pass that trainer's model to "
            "train it on, or load the model anew"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # for example layers of a Mamba model, which LoRA cannot adapt
            what = reason(error, 200).split(". ")[0]
            raise InputError(f"LoRA: {what}; name the layers to adapt in lora_target_modules") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode (which gradient checkpointing needs) stays exact.

    Families keep the probabilities in `nn.Dropout`, in float attributes (attention_dropout, attn_dropout, layerdrop
    ...), or read them from their config at every forward (Falcon). Inner modules therefore get their own copy of the
    config, so that the saved one keeps the model's numbers.
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


def _zero_dropouts(thing: nn.Module | PreTrainedConfig) -> None:
    for name, value in list(vars(thing).items()):
        if "drop" in name and isinstance(value, float):
            setattr(thing, name, 0.0)


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model so that nothing is shared.

    (`copy.deepcopy` fails if a trainer has replaced the model's `forward`: the copy then runs the original's weights.)
    """
    twin: Any = type(model)(copy.deepcopy(model.config))
    twin.to(device=model.device, dtype=model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' table of missing weights inside the context: new heads are drawn or loaded afterwards."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def from_pretrained(
    cls: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    path: str | Path,
    dtype: torch.dtype | None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model from a folder or hub id, by default in float32. Raises InputError if that fails."""
    check_folder(path)
    try:
        with quietly():
            model = cls.from_pretrained(str(path), dtype=dtype or torch.float32, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no model could be loaded ({reason(error, 200)})") from error
    if model.device.type == "cpu":
        # safetensors maps weights at unaligned addresses, which change how a CPU's kernels round. Copied to torch's own
        # (aligned) addresses, a model gives the same numbers to the last bit from any file.
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
    return model


def config_of(path: str | Path) -> PreTrainedConfig:
    """Load a model's configuration. Raises InputError if there is none."""
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no model configuration ({reason(error, 200)})") from error


def _refuse_classifier(path: str | Path) -> None:
    """Raise InputError for a reward model, which transformers would load as a language model with a random head."""
    check_folder(path)
    if is_adapter(path):
        what = str(PeftConfig.from_pretrained(str(path)).task_type or "")
    else:
        what = ", ".join(config_of(path).architectures or [])
    if "SEQ_CLS" in what or "SequenceClassification" in what:
        raise InputError(f"{path}: holds a reward model ({what}), not a language model; name the policy's folder")


def base_of(adapter: str | Path) -> str:
    """Return the folder or hub id of an adapter's base model. Raises InputError if the adapter names none."""
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise InputError(
            f"{adapter}/adapter_config.json: base_model_name_or_path is empty; write the base's path there"
        )
    return base


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Enlarge the embeddings for tokens that were added for chat; never shrink them (bases pad their vocabulary)."""
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
