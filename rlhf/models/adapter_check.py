"""Check an adapter's settings before anything is loaded or trained: what every stage computes exactly, or one line.

Policy, reference and value model are adapters over one base, and later stages load that base again from its folder. So
an adapter must leave the base's weights as they are, and all that it trains must be its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.errors import InputError, reason
from rlhf.models.adapters import backbone, base_name

HEADS = ("lm_head", "embed_out")
"""The names of the language head in transformers' families."""

# Initialisations that leave the base as it is. The second row needs no data and starts at the base's own output.
LOADED = (True, False, "eva", "gaussian", "orthogonal")
NEW = (True, "gaussian", "orthogonal")

# Settings of any value: peft saves them, loads them and keeps them apart for each adapter.
SUPPORTED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "fan_in_fan_out", "init_lora_weights", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


# What a setting for a new adapter is called here, by peft's name.
_COMPARED = {
    "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}  # fmt: skip


def read_adapter(folder: str | Path) -> LoraConfig:
    """Read a folder's adapter_config.json. Raises InputError if it is unreadable or names what is not supported."""
    where = Path(folder, "adapter_config.json")
    try:
        settings = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({reason(error)}); save the adapter again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{where}: holds no settings by name; save the adapter again")
    check_settings(settings, str(where))
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    newer = sorted(name for name, value in settings.items() if name not in known | {"runtime_config"} and value)
    if newer:
        version = settings.get("peft_version") or "a newer version"
        raise InputError(
            f"{where}: peft {version} wrote settings that are unknown here: {', '.join(newer)}; update peft"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # of settings for another initialisation, which have no effect
            return LoraConfig(**{name: value for name, value in settings.items() if name in known})
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {reason(error)}") from error


def check_config(config: Any, where: str) -> None:
    """Raise InputError if the configuration of a new adapter is not supported; `where` names it in the error."""
    check_settings(vars(config), where, NEW)


def check_held(model: PeftModel) -> None:
    """Raise InputError if a model object's adapter is not named "default", or its configuration is not supported."""
    if "default" not in model.peft_config:
        names = ", ".join(model.peft_config)
        raise InputError(f"the PeftModel has the adapters {names}; load the one to train under peft's name 'default'")
    check_settings(vars(model.peft_config["default"]), "peft_config of the model")


def check_settings(settings: Mapping[str, Any], where: str, starts: tuple[bool | str, ...] = LOADED) -> None:
    """Raise InputError if an adapter's settings are not supported; starts: the allowed initialisations."""
    kind = getattr(settings.get("peft_type"), "value", settings.get("peft_type"))
    if kind != "LORA":
        raise InputError(
            f"{where}: peft_type is {kind}, and only LORA adapters can share a base with reference and value model; "
            "train a LoRA adapter, or merge this one and name the merged folder"
        )
    start = settings.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if start not in starts:
        raise InputError(
            f"{where}: init_lora_weights={start!r} {_why(start)}; "
            + (
                f"take {' or '.join(map(repr, starts))}"
                if starts is NEW
                else "convert it to plain LoRA (peft's save_pretrained with path_initial_model_for_weight_conversion), "
                "or merge it and name the merged folder"
            )
        )
    if settings.get("bias", "none") != "none":
        raise InputError(
            f"{where}: bias={settings['bias']!r} trains biases of the base, which reference and value model share; "
            "train with bias='none', or merge the adapter and name the merged folder"
        )
    for field in dataclasses.fields(LoraConfig):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = settings.get(field.name, default)
        if field.name not in SUPPORTED | {"bias"} and value != default and value:
            raise InputError(
                f"{where}: {field.name} is not supported; train without it, or merge the adapter and name the merged "
                "folder"
            )
    if _targets_head(settings):
        raise InputError(
            f"{where}: target_modules names the language head, whose weight the losses read without an adapter; "
            "take it out, or put it into modules_to_save to train all of it"
        )


def _targets_head(settings: Mapping[str, Any]) -> bool:
    targets = settings.get("target_modules") or ()
    elsewhere = {*(settings.get("modules_to_save") or ()), *(settings.get("exclude_modules") or ())}
    heads = [name for name in HEADS if name not in elsewhere]
    if isinstance(targets, str):  # a regular expression, or "all-linear", which leaves the head out
        return any(re.fullmatch(targets, name) for name in heads)
    return any(str(target).rsplit(".", 1)[-1] in heads for target in targets)


def _why(start: Any) -> str:
    if start is False:
        return "starts at random, so the policy would not be the model that it starts from"
    if start == "eva":
        return "starts from statistics of your data, which only peft's initialize_lora_eva_weights computes"
    if str(start).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return "rewrites the base's weights, which the other adapters and every later stage share"
    return "is not supported"


def check_same(asked: LoraConfig, model: PeftModel, where: str) -> None:
    """Raise InputError if the settings for a new adapter differ from those of the adapter that `where` already is."""
    held: Any = model.peft_config["default"]
    pairs = [(setting, getattr(asked, name), getattr(held, name)) for name, setting in _COMPARED.items()]
    wanted = set(adapted_layers(model)) if asked.target_modules is None else layers_named(asked.target_modules, model)
    if wanted != set(adapted_layers(model)):
        pairs.append(("lora_target_modules", _last_parts(wanted), _last_parts(adapted_layers(model))))
    for setting, one, other in pairs:
        if one != other or setting == "lora_target_modules":
            words = "of rank" if setting == "lora_rank" else f"with {setting}"
            raise InputError(
                f"{setting}={one}, but {where} is already an adapter {words} {other}; "
                "leave lora_rank at 0 to continue that adapter"
            )


def adapted_layers(model: PeftModel) -> list[str]:
    """Return the names of the layers that have LoRA weights."""
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]


def layers_named(targets: str | Collection[str], model: PeftModel) -> set[str]:
    """Return the names of the layers that an adapter's target_modules mean in a model, as peft reads them."""
    plain = model.get_base_model()
    named = [(name, module) for name, module in plain.named_modules() if "lora_" not in name]
    if targets == "all-linear":
        trunk = set(backbone(plain).modules())
        linear = [name for name, module in named if isinstance(module, nn.Linear | Conv1D) and module in trunk]
        return {base_name(name) for name in linear}
    names = {base_name(name) for name, module in named if not isinstance(module, nn.ModuleList)}
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}


def _last_parts(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
