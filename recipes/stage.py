"""What every recipe does around its stage: inputs from earlier stages, skip, resume, manifest.

A run is one folder; a stage is a folder in it. What a stage needs and its config does not name, it takes from
its sibling folders: `rlhf ppo --config my.yaml` finds the SFT model and the reward model there.

A recipe imports configs at its top, and what needs torch inside the functions that use it: loading that takes
seconds, and `--help`, a mistyped flag and a stage that is complete need none of it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rlhf import chat
from rlhf.config import NO_EFFECT, to_dict
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import require_disk
from rlhf.run.stages import (
    Manifest,
    begin_stage,
    data_fingerprint,
    drop_checkpoints,
    finish_stage,
    stage_state,
    tokenizer_hash,
)

Config = TypeVar("Config")
SECTIONS = ("data", "base", "sft", "reward_model", "ppo", "evaluation")


@dataclass
class Stage:
    """One stage being run, or found complete."""

    name: str
    folder: Path
    inputs: dict[str, Any]
    seed: int
    complete: bool
    resuming: bool
    outputs: dict[str, Any]
    seconds: float
    started: float
    overwrite: bool = False

    def begin(self) -> None:
        """Write down what the stage was given. Called once all of it has been read and found good, right before the
        work: a mistake in the input leaves nothing behind that the corrected run would trip over."""
        wait_for_all()  # each has seen the folder as it was
        if is_first():
            begin_stage(self.folder, self.inputs, self.overwrite)
        wait_for_all()

    def finish(self, outputs: dict[str, Any], tokenizer: Any = None, base_model: str | None = None) -> dict[str, Any]:
        """Write the manifest, which makes the stage complete; returns `outputs`."""
        self.outputs, self.seconds = outputs, time.perf_counter() - self.started
        about = {} if tokenizer is None else {
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "template_hash": chat.template_hash(tokenizer),
            "pad_id": chat.pad_id(tokenizer),
            "stop_ids": chat.stop_ids(tokenizer),
        }  # fmt: skip
        manifest = Manifest(
            stage=self.name, inputs=self.inputs, seed=self.seed, outputs=outputs, seconds=self.seconds,
            base_model=base_model, **about,
        )  # fmt: skip
        wait_for_all()  # the first has saved the model
        if is_first():
            finish_stage(self.folder, manifest)
        wait_for_all()
        console.stage_line(self.name, f"done in {self.seconds:.0f} s  {_shown(outputs)}")
        console.stage_line("", f"saved in {self.folder}")
        for page in sorted(self.folder.glob("*.html")):
            console.stage_line("", f"report {page}")
        return outputs


def is_first() -> bool:
    """Whether this is the only process or the first of several: the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Wait until every process of the run is here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def open_stage(name: str, config: Any, sources: Mapping[str, Any]) -> Stage:
    """A stage that is to begin (`stage.begin()`), or is complete (`stage.complete`) or was interrupted
    (`stage.resuming`). Writes nothing; of a complete one, checkpoints that a killed run left are deleted.

    sources: the models and data it reads, by name; their fingerprints go into the manifest, and a stage whose
    inputs changed is not taken for complete. Raises InputError where output_dir belongs to another run.
    """
    folder = Path(config.output_dir)
    inputs = {
        "config": to_dict(config, without=(*NO_EFFECT, "overwrite", *sources)),
        **{source: fingerprint_of(value) for source, value in sources.items() if value is not None},
    }
    overwrite = getattr(config, "overwrite", False)
    state = stage_state(folder, inputs, overwrite)
    if state == "complete":
        manifest = Manifest.read(folder)
        drop_checkpoints(folder)
        console.stage_line(name, "complete, skipped")
        return Stage(name, folder, inputs, config.seed, True, False, manifest.outputs, manifest.seconds, 0.0)
    require_disk(folder, needed_bytes(config, sources.get("model")))
    resuming = state == "interrupted"
    if resuming:
        console.stage_line(name, "was interrupted: going on")
    return Stage(name, folder, inputs, config.seed, False, resuming, {}, 0.0, time.perf_counter(), overwrite)


def next_command(
    name: str, argv: Sequence[str], output_dir: str, section: str = "", also: Sequence[str] = (), **needed: str
) -> None:
    """Print the command that runs the next stage of the same run.

    argv: this stage's command line, whose config the next one shares. output_dir: this stage's folder. section: the
    next stage's, where it is not `name`. also: flags that it needs. needed: a flag, and the file of the run that makes
    it unnecessary.
    """
    words, run = ["rlhf", name], Path(output_dir).parent
    given = {word.partition("=")[0]: word.partition("=")[2] or value for word, value in pairwise([*argv, ""])}
    if "--config" in given:
        words += ["--config", given["--config"]]
    if "--config" not in given or "--output_dir" in given:
        words += ["--output_dir", str(run / (section or name))]
    for flag, file in needed.items():
        if "--config" not in given and not (run / file).exists():
            words += [f"--{flag}", Path(file).name]
    console.stage_line("next", shlex.join([*words, *also]))


def needed_bytes(config: Any, model: Any) -> int:
    """About what a stage writes: the trained model, and its checkpoints with Adam's two moments, one more of them than
    are kept while the next is written (PPO trains the value model too). A new LoRA adapter is taken for a tenth of
    its base."""
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if model else 0
    if getattr(config, "lora_rank", 0):
        weights //= 10
    trained = weights * (2 if hasattr(config, "rollout_size") else 1)
    checkpoints = config.save_total_limit + 1 if getattr(config, "save_steps", 0) else 0
    if getattr(config, "save_rollouts", 0):
        checkpoints += config.updates // config.save_rollouts
    return 10**8 + trained * (1 + 3 * checkpoints)


def fingerprint_of(source: Any) -> Any:
    """What identifies an input: an earlier stage's manifest, a file's content, else its name."""
    path = Path(str(source))
    if (path / "manifest.json").is_file():
        return Manifest.read(path).fingerprint
    if path.is_file():
        return data_fingerprint(path)
    return str(source)


def from_siblings(config: Config, **places: str) -> Config:
    """Fill fields that are None from the folders beside the stage's own; InputError where there is nothing."""
    run, filled = Path(config.output_dir).parent, {}
    for name, place in places.items():
        optional = place.startswith("?")
        path = run / place.removeprefix("?")
        if getattr(config, name) is not None:
            continue
        if path.exists():
            filled[name] = str(path)
        elif not optional:
            raise InputError(f"--{name} is missing, and no earlier stage left {path}; name it")
    return replace(config, **filled)  # type: ignore[type-var]


def check_model(path: str, stages: tuple[str, ...]) -> None:
    """Refuse an earlier stage's folder that is incomplete or holds another kind of model, before anything is loaded."""
    if (Path(path) / "inputs.json").is_file() and not (Path(path) / "manifest.json").is_file():
        raise InputError(f"{path}: its stage was interrupted; run that stage again, it goes on where it stopped")
    if (Path(path) / "manifest.json").is_file():
        stage = Manifest.read(path).stage
        if stage not in stages:
            raise InputError(f"{path}/manifest.json: made by stage {stage!r}; expected one of {', '.join(stages)}")


def _shown(outputs: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in outputs.items() if isinstance(value, int | float)}
    return "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:6])
