"""WARM (Rame et al. 2401.12187): the weights of several reward models averaged into one, an ordinary folder.

The average costs no more to score with than one model, and needs members that start from the same weights: the same
base, and the same head (`init_seed` of the reward model's training). Full weights are averaged as they are. Adapters
are averaged as the changes that they make to the base's weights: the factors of low rank stand side by side in one
adapter, whose rank is the sum of theirs, since the product of two averaged factors would not be the average.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reward_models.ensemble import conversations_of, measured
from reward_models.scoring import RewardModel
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import loading
from rlhf.models.adapter_check import read_adapter
from rlhf.models.adapters import is_adapter
from rlhf.models.pretrained import adapter_weights, base_of
from rlhf.models.scalar import ScoreNormalizer, load_scalar_model, score_head
from rlhf.rows.sources import Source
from rlhf.run.checkpoint import remove
from rlhf.run.fingerprint import of_path, tokenizer_hash

Named = Mapping[str, Tensor]

CONFIGS = ("config.json", "adapter_config.json")
"""One of these is in a folder that holds a model."""
ALIKE = 0.5
"""Least cosine between the weights of two members: above it they can have begun from one model (fine-tuning moves a
trunk by a few per cent, a head by more), far below it (unrelated weights have about 0) they cannot."""

_DOWN, _UP = re.compile(r"\.lora_(embedding_)?A(\.weight)?$"), re.compile(r"\.lora_(embedding_)?B(\.weight)?$")


def average_folders(folders: Sequence[str | Path], out: str | Path, responses: Source) -> RewardModel:
    """Average reward models into the folder `out`, measure its normaliser on `responses`, and return it loaded.

    folders: full models, or LoRA adapters over one base. responses: rankings or demonstrations. Raises InputError
    where the members' kinds, tokenizers, bases, shapes or heads differ, or `out` holds a model already. A call that was
    killed leaves no half of one there.
    """
    names = [str(folder) for folder in folders]
    if len(names) < 2:
        raise InputError(f"average: got {len(names)} reward models; give at least two")
    if any(Path(out, name).exists() for name in CONFIGS):
        raise InputError(f"average: {out} holds a model already; name a new folder")
    kinds = ["an adapter" if is_adapter(name) else "a full model" for name in names]
    for name, kind in zip(names, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(f"average: {names[0]} is {kinds[0]} and {name} {kind}; give models of one kind")
    tokenizer = _shared_tokenizer(names)
    conversations = conversations_of(responses)
    made = Path(out, ".average.writing")
    remove(made)  # of a killed call
    made.mkdir(parents=True)
    (_average_adapters if kinds[0] == "an adapter" else _average_full)(names, made)
    tokenizer.save_pretrained(str(made))
    ScoreNormalizer().save(made)  # without one it would be read as another library's reward model
    measured(RewardModel.load(made), conversations).save(made)
    for file in sorted(made.iterdir(), key=lambda file: file.name in CONFIGS):  # last what a model is known by
        file.replace(Path(out, file.name))
    made.rmdir()
    return RewardModel.load(out)


def _shared_tokenizer(names: Sequence[str]) -> Any:
    tokenizers = [loading.load_tokenizer(name) for name in names]
    facts = [(tokenizer_hash(tokenizer), chat.template_hash(tokenizer)) for tokenizer in tokenizers]
    for name, fact in zip(names, facts, strict=True):
        if fact != facts[0]:
            raise InputError(f"average: {names[0]} and {name} have different tokenizers or chat templates")
    return tokenizers[0]


# ---------------------------------------------------------------- full weights


@torch.no_grad()
def _average_full(names: Sequence[str], out: Path) -> None:
    """Average whole models, one in memory beside the sum."""
    total, _ = load_scalar_model(names[0])
    mine = dict(total.named_parameters())
    first = {name: parameter.clone() for name, parameter in score_head(total).named_parameters()}
    for parameter in mine.values():
        parameter.div_(len(names))
    for name in names[1:]:
        other, _ = load_scalar_model(name)
        theirs = dict(other.named_parameters())
        _check_shapes(mine, theirs, names[0], name)
        _check_alike(first, dict(score_head(other).named_parameters()), "heads", names[0], name)
        _check_alike(mine, theirs, "weights", names[0], name)  # the sum so far points where the first members do
        for key, parameter in mine.items():
            parameter.add_(theirs[key].to(parameter.dtype), alpha=1 / len(names))
    total.save_pretrained(str(out))


def _check_shapes(mine: Named, theirs: Named, one: str, other: str) -> None:
    for key in [*mine, *theirs]:
        if key not in mine or key not in theirs:
            has, lacks = (one, other) if key in mine else (other, one)
            raise InputError(f"average: {has} has {key}, and {lacks} has not; average models of one base")
        if mine[key].shape != theirs[key].shape:
            shapes = f"{list(mine[key].shape)} and {list(theirs[key].shape)}"
            raise InputError(f"average: {key} has shapes {shapes} in {one} and {other}; they differ in their base")


def _check_alike(mine: Named, theirs: Named, what: str, one: str, other: str) -> None:
    """Raise InputError where the weights of two models point apart: then they began from different ones."""
    products = [torch.zeros(3, dtype=torch.float64)]
    for key, parameter in mine.items():
        if parameter.ndim < 2:  # the weights of norms are near 1 in every model
            continue
        a, b = parameter.detach().double().flatten().cpu(), theirs[key].detach().double().flatten().cpu()
        products.append(torch.stack([a @ b, a @ a, b @ b]))
    both, own, its = torch.stack(products).sum(0).tolist()
    cosine = both / math.sqrt(own * its) if own * its > 0 else 0.0
    if cosine < ALIKE:
        remedy = "train them with one init_seed" if what == "heads" else "average models of one base"
        raise InputError(f"average: the {what} of {one} and {other} point apart (cosine {cosine:.2f}); {remedy}")


# ---------------------------------------------------------------- adapters


def _average_adapters(names: Sequence[str], out: Path) -> None:
    """Average adapters: one adapter of the summed rank, whose product is the mean of theirs."""
    bases = [base_of(name) for name in names]
    prints = {base: of_path(base) for base in dict.fromkeys(bases)}
    for name, base in zip(names, bases, strict=True):
        if prints[base] != prints[bases[0]]:
            raise InputError(f"average: {names[0]} and {name} are adapters over different bases")
    configs = [read_adapter(name) for name in names]
    for name, config in zip(names, configs, strict=True):
        for setting in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters"):
            if getattr(config, setting, None):
                raise InputError(f"average: {name}: {setting} is not supported here; average merged models")
    members = [adapter_weights(name) for name in names]
    scales = [
        config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r) / len(names) for config in configs
    ]
    for name, member in zip(names[1:], members[1:], strict=True):
        if differ := members[0].keys() ^ member.keys():
            raise InputError(f"average: {names[0]} and {name} adapt different layers, first {sorted(differ)[0]}")
        first, its = ({key: w for key, w in some.items() if _is_head(key)} for some in (members[0], member))
        _check_shapes(first, its, names[0], name)
        _check_alike(first, its, "heads", names[0], name)
    averaged = {key: joined(key, [member[key] for member in members], scales) for key in members[0]}
    config = configs[0]
    config.r = sum(one.r for one in configs)
    config.lora_alpha, config.use_rslora, config.inference_mode = config.r, False, True
    config.base_model_name_or_path = os.path.abspath(bases[0]) if Path(bases[0]).is_dir() else bases[0]
    config.save_pretrained(str(out))
    save_file({key: tensor.contiguous() for key, tensor in averaged.items()}, out / "adapter_model.safetensors")


def joined(key: str, tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Join one tensor of several adapters: factors side by side, the second one scaled, and all else averaged.

    ``[B_1 s_1, B_2 s_2] @ [A_1; A_2] = s_1 B_1 A_1 + s_2 B_2 A_2``, where s holds each adapter's own scale over the
    number of adapters."""
    if _DOWN.search(key):
        return torch.cat([tensor.float() for tensor in tensors], dim=0)
    if _UP.search(key):
        return torch.cat([tensor.float() * scale for tensor, scale in zip(tensors, scales, strict=True)], dim=1)
    if ".lora_" in key or any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise InputError(f"average: {key} cannot be averaged; average merged models")
    return torch.stack([tensor.float() for tensor in tensors]).mean(0)


def _is_head(key: str) -> bool:
    return bool({"score", "classifier"} & set(key.split(".")))
