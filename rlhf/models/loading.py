"""Loading of policies and tokenizers.

A model is given as a folder (full weights, or a LoRA adapter with its base's name), a hub id, or an object. LoRA
adapters are never merged: every stage of the chain is an adapter over the same base. `rlhf.models.scalar` loads reward
models.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import utils as hub
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf import chat
from rlhf.errors import InputError, reason
from rlhf.models import encoders
from rlhf.models.adapter_check import check_config, check_held, check_same, read_adapter
from rlhf.models.adapters import base_model, is_adapter, train_in_float32
from rlhf.models.pretrained import (
    UNREADABLE,
    base_of,
    check_folder,
    config_of,
    fit_embeddings,
    from_pretrained,
    load_adapter,
    load_base,
    mend_generation_config,
    saved_rows,
    unreadable,
)

log = logging.getLogger("rlhf")

# peft uses transformers' older name of this attribute whenever it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
_downloads_shown = not hub.are_progress_bars_disabled()
transformers_logging.disable_progress_bar()  # of reading and writing weights: two bars with every checkpoint
if _downloads_shown:  # the line above has switched these bars off too
    hub.enable_progress_bars()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id, with a chat template and a pad token (see rlhf.chat).

    It gets no pad token that the model would have no embedding for: any id can pad, since masks decide."""
    check_folder(path)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{path}: model folder without a tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(path, "no tokenizer", error) from error
    if not tokenizer.chat_template:
        encoders.prepare_tokenizer(tokenizer, config_of(base_of(path) if is_adapter(path) else path))
    if needs_new_pad(tokenizer):
        return tokenizer
    chat.prepare_tokenizer(tokenizer)
    return tokenizer


def needs_new_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer that is ready for chat has no token that could pad, so that one would be added."""
    return chat.prepare_tokenizer(copy.deepcopy(tokenizer)) == ["<|pad|>"]


def tokenizer_of(
    model: str | Path | PreTrainedModel | PeftModel, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer to train with, prepared for chat: the one passed, else the one in the model's folder."""
    if given is not None:
        if isinstance(model, nn.Module):
            encoders.prepare_tokenizer(given, model.config)
        chat.prepare_tokenizer(given)
        return given
    path = str(model.name_or_path if isinstance(model, nn.Module) else model)
    if not path:
        raise InputError("a model object needs its tokenizer: pass processing_class=tokenizer")
    tokenizer = load_tokenizer(path)
    chat.prepare_tokenizer(tokenizer)  # with a pad token of its own: the trainers add embeddings
    return tokenizer


def load_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
    how: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel | PeftModel:
    """Load a causal language model to train: full weights, an adapter to continue, or (`lora`) a new adapter.

    The trained adapter is named "default". A model object is used itself, not copied, in its own precision
    (`in_float32` changes it). how: further arguments for
    transformers' `from_pretrained` (`held_in_4_bits`). Raises InputError for an adapter
    that is not supported, and for `lora` settings that differ from those of the adapter that the model already is.
    """
    if isinstance(model, nn.Module):
        loaded = model
        mend_generation_config(loaded)
    elif is_adapter(model):
        _refuse_classifier(model)
        base = load_base(AutoModelForCausalLM, model, dtype, **how)
        fit_embeddings(base, max(len(load_tokenizer(model)), saved_rows(model, base)))
        loaded = load_adapter(base, model, trainable=True)
    else:
        _refuse_classifier(model)
        loaded = from_pretrained(AutoModelForCausalLM, model, dtype, **how)
    keep_gradients(loaded)
    if isinstance(loaded, PeftModel):
        check_held(loaded)
        if lora is not None:
            check_same(lora, loaded, "the model")
        return loaded
    return with_adapter(loaded, lora, seed) if lora is not None else loaded


def in_float32(model: Any) -> None:
    """Hold the weights of a model object that are to be trained in float32, as a folder's are: transformers gives an
    object in its checkpoint's bfloat16, in which most of a small update is rounded away.

    These are all weights; under an adapter the adapter's (the base stays as it is)."""
    if isinstance(model, PeftModel):
        train_in_float32(model)
    elif is_quantized(model):  # refused, or about to get an adapter
        return
    elif half := {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        log.info("the model object's weights are in %s: trained in float32, to which they are converted", names)
        model.float()


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


def held_in_4_bits(model: Any, dtype: torch.dtype, adapted: bool) -> dict[str, Any]:
    """Return the arguments with which transformers holds a frozen base in 4 bits, for `load_in_4bit`.

    QLoRA's (Dettmers et al. 2023, 2305.14314): NF4, the blocks' scales quantized too, products in `dtype`. adapted:
    whether an adapter is trained. {} for an object that is quantized already. Raises InputError where it cannot be."""
    if not adapted and not isinstance(model, PeftModel):
        raise InputError(
            "load_in_4bit: weights in 4 bits stay as they are; set lora_rank to train an adapter over them"
        )
    if isinstance(model, nn.Module):
        if is_quantized(model):
            return {}
        raise InputError("load_in_4bit: the model is loaded already; pass its folder, or load the object in 4 bits")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit: bitsandbytes is not installed; pip install 'rlhf-recipes[qlora]'")
    if not torch.cuda.is_available():
        raise InputError("load_in_4bit: there is no GPU here, and on a CPU it only costs time; leave it out")
    return in_4_bits(dtype, f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


def default_device() -> torch.device:
    """Return the accelerator, where there is one; of several, this process's own (LOCAL_RANK), as accelerate does."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return torch.device("cpu")
    own = os.environ.get("LOCAL_RANK")
    return kind if own is None else torch.device(kind.type, int(own) % torch.accelerator.device_count())


def in_4_bits(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `held_in_4_bits`'s arguments for a device."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


@contextmanager
def trained_weights_kept(model: nn.Module) -> Iterator[None]:
    """Keep a quantized model's trained weights as they are: trl's trainers, when built, round them to bfloat16."""
    held = [(p, p.data) for p in model.parameters() if p.requires_grad] if is_quantized(model) else []
    yield
    for parameter, data in held:
        parameter.data = data.to(parameter.device)


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
    check_config(config, "peft_config")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # for example layers of a Mamba model, which LoRA cannot adapt
            what = reason(error, 200).split(". ")[0]
            raise InputError(f"LoRA: {what}; name the layers to adapt in lora_target_modules") from error
    train_in_float32(adapted)
    return adapted


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode (which gradient checkpointing needs) stays exact."""
    set_dropouts(model, 0.0)


def set_dropouts(model: nn.Module, probability: float, kept: Sequence[str] = ()) -> int:
    """Set every dropout probability, but those with a word of `kept` in their names; return in how many modules.

    Families keep the probabilities in `nn.Dropout`, in attributes (attention_dropout, attn_dropout, layerdrop
    ...), or read them from their config at every forward (Falcon). Inner modules therefore get their own copy of the
    config, so that the saved one keeps the model's numbers.
    """
    copies: dict[int, PreTrainedConfig] = {}
    found = 0
    for path, module in model.named_modules():
        if any(word in path for word in kept):
            continue
        if isinstance(module, nn.Dropout):
            module.p = probability
        found += isinstance(module, nn.Dropout) + _set_attributes(module, probability, kept)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel | PeftModel):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                _set_attributes(copies[id(config)], probability, kept)
            module.config = copies[id(config)]  # type: ignore[assignment]
    return found


def _set_attributes(thing: nn.Module | PreTrainedConfig, probability: float, kept: Sequence[str]) -> bool:
    numbers = {name: value for name, value in vars(thing).items() if type(value) in (float, int)}
    names = [name for name in numbers if "drop" in name and not any(word in name for word in kept)]
    vars(thing).update(dict.fromkeys(names, probability))  # past a config's checks, where 0 was a whole number
    return bool(names)


def clone(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """Copy a model so that nothing is shared; to its own device, or to another.

    (`copy.deepcopy` fails if a trainer has replaced the model's `forward`: the copy then runs the original's weights.)
    """
    twin: Any = type(model)(copy.deepcopy(model.config))
    held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        # each in its own precision: rotary frequencies stay in float32
        tensor.data = held[name].detach().to(device, copy=True)
    return twin


def _refuse_classifier(path: str | Path) -> None:
    """Raise InputError for a reward model, which transformers would load as a language model with a random head."""
    check_folder(path)
    if is_adapter(path):
        what = str(read_adapter(path).task_type or "")
    else:
        what = ", ".join(config_of(path).architectures or [])
    if "SEQ_CLS" in what or "SequenceClassification" in what:
        raise InputError(f"{path}: holds a reward model ({what}), not a language model; name the policy's folder")
