"""What every recipe does around its stage: inputs from earlier stages, skip, resume, manifest.

A run is one folder; a stage is a folder in it. What a stage needs and its config does not name, it takes from
its sibling folders: `rlhf ppo --config my.yaml` finds the SFT model and the reward model there.

A recipe imports configs at its top, and what needs torch inside the functions that use it: loading that takes
seconds, and `--help`, a mistyped flag and a stage that is complete need none of it.
"""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rlhf import cards, chat
from rlhf.config import read_yaml, to_dict
from rlhf.errors import InputError
from rlhf.rows.mixed import mapped
from rlhf.run import console, lock
from rlhf.run.changes import no_effect
from rlhf.run.checkpoint import full_disk_explained, require_disk
from rlhf.run.fingerprint import data_fingerprint, placed, tokenizer_hash
from rlhf.run.lookup import look_up
from rlhf.run.objects import OURS
from rlhf.run.owner import by_main, wait_for_all
from rlhf.run.stages import (
    Manifest,
    State,
    begin_stage,
    drop_checkpoints,
    finish_stage,
    reopen_stage,
    stage_changes,
    stage_state,
)

Config = TypeVar("Config")
SCORERS = ("reward_model", "judge", "ensemble")
"""Stages whose folder scores responses."""
NONE = "none"
"""Named in the place of an optional earlier stage: nothing, though the run may have that stage."""
SECTIONS = (
    "data", "base", "sft", "reward_model", "process_reward", "ppo", "baseline", "evaluation", "flywheel", "run_evals",
    "judge_card", "contamination", "system_card", "predict_capability", "ensemble", "best_of_n", "synthetic",
    "red_team", "moderation", "monitor", "label", "collected", "serve_policy", "chat", "evaluate_reward_model",
    "serve_reward_model", "push_to_hub", "benchmark", "inspect_rollout", "import_gguf", "report",
)  # fmt: skip
"""Of a YAML that serves all recipes; each reads its own and leaves the others alone."""


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
    keep_checkpoint: bool = False
    begun: bool = False

    def begin(self) -> None:
        """Take the folder and write down what the stage was given. Called once all of it has been read and found good,
        right before the work: a mistake in the input leaves nothing behind that the corrected run would trip over.
        The folder is this run's until the stage, or its process, ends."""
        if not self.begun:
            by_main(self._begin)
        self.begun = True

    def _begin(self) -> None:
        lock.hold(self.folder)
        try:
            if stage_state(self.folder, self.inputs, self.overwrite) != ("interrupted" if self.resuming else "absent"):
                seen = "another process has worked in it meanwhile"
                raise InputError(f"output_dir {self.folder}: {seen}; run the same command again")
            begin_stage(self.folder, self.inputs, self.overwrite)
        except BaseException:
            lock.release(self.folder)
            raise

    def finish(self, outputs: dict[str, Any], tokenizer: Any = None, base_model: str | None = None) -> dict[str, Any]:
        """Write the manifest, which makes the stage complete; returns `outputs`."""
        self.outputs = outputs
        about = {} if tokenizer is None else {
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "template_hash": chat.template_hash(tokenizer),
            "pad_id": chat.pad_id(tokenizer),
            "stop_ids": chat.stop_ids(tokenizer),
        }  # fmt: skip
        manifest = Manifest(
            stage=self.name, inputs=self.inputs, seed=self.seed, outputs=outputs, base_model=base_model,
            seconds=time.perf_counter() - self.started, **about,
        )  # fmt: skip
        self.seconds = by_main(lambda: self._finish(manifest))
        console.stage_line(self.name, f"done in {self.seconds:.0f} s  {_shown(outputs)}")
        console.stage_line("", f"saved in {self.folder}")
        for page in sorted(self.folder.glob("*.html")):
            console.stage_line("", f"report {page}")
        return outputs

    def _finish(self, manifest: Manifest) -> float:
        (self.folder / "README.md").unlink(missing_ok=True)  # peft's placeholder, or the card of a shorter run
        manifest = finish_stage(self.folder, manifest, self.keep_checkpoint)
        cards.write_model_card(self.folder)
        lock.release(self.folder)
        return manifest.seconds


@dataclass(frozen=True)
class Step:
    """A stage of a run of several: what runs it, and what finds its inputs without running anything."""

    name: str
    config: Any
    run: Callable[[Any], dict[str, Any]]
    inputs: Callable[[Any], tuple[Any, dict[str, Any]]]


def open_stage(name: str, config: Any, sources: Mapping[str, Any], reopened: bool = False) -> Stage:
    """A stage that is to begin (`stage.begin()`), or is complete (`stage.complete`) or was interrupted
    (`stage.resuming`). Writes nothing; of a complete one, checkpoints that a killed run left are deleted, and the card
    of its model is written where there is none.

    sources: the models and data it reads, by name; their fingerprints go into the manifest, and a stage whose
    inputs changed is not taken for complete. reopened: by `reopen`, which has told why it goes on. Raises InputError
    where output_dir belongs to another run.
    """
    folder, overwrite = Path(config.output_dir), getattr(config, "overwrite", False)
    keep = bool(getattr(config, "keep_checkpoint", False))

    def look() -> tuple[dict[str, Any], State, Manifest | None]:
        inputs = inputs_of(config, sources)
        state = stage_state(folder, inputs, overwrite)
        if state == "complete":
            if lock.is_free(folder):  # else the run that has just finished does this
                drop_checkpoints(folder, keep=int(keep))
                cards.write_model_card(folder)
            return inputs, state, Manifest.read(folder)
        lock.require_free(folder)
        require_disk(folder, needed_bytes(config, sources.get("model")))
        return inputs, state, None

    inputs, state, manifest = by_main(look)
    if manifest is not None:
        console.stage_line(name, "complete, skipped")
        seconds, done = manifest.seconds, manifest.outputs
        return Stage(name, folder, inputs, config.seed, True, False, done, seconds, 0.0, keep_checkpoint=keep)
    resuming = state == "interrupted"
    if resuming and not reopened:
        console.stage_line(name, "was interrupted: going on")
    free_memory()
    started = time.perf_counter()
    return Stage(name, folder, inputs, config.seed, False, resuming, {}, 0.0, started, overwrite, keep)


def free_memory() -> None:
    """Free what finished stages of this process have left: a trainer and its model refer to each other."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_and_save(trainer: Any, stage: Stage, name: str, metric: str) -> None:
    """Train, going on where an interrupted run stopped, and save the model in the stage's folder;
    when it returns, the main process has saved. metric: what the bar shows beside the loss."""
    from rlhf.run.callbacks import attach

    attach(trainer, name, ("loss", metric, "learning_rate"), trainer.config.output_dir)
    trainer.train(resume_from_checkpoint=True)
    with full_disk_explained(stage.folder):
        trainer.save_model(str(stage.folder))
    wait_for_all()


def reopen(name: str, config: Any, sources: Mapping[str, Any], later: Sequence[str]) -> bool:
    """Let a stage go on in its folder where only settings and inputs in `later` have changed: those that decide what is
    done with what it keeps there; returns whether it does. Called before `open_stage`."""
    folder, inputs = Path(config.output_dir), inputs_of(config, sources)
    found = [] if config.overwrite else stage_changes(folder, inputs)
    if not found or any(change.name.removeprefix("config.").split(".")[0] not in later for change in found):
        return False
    lock.require_free(folder)
    console.stage_line(name, f"what it keeps stays; {', '.join(map(str, found))}")
    reopen_stage(folder, inputs)
    return True


def inputs_of(config: Any, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a stage's result: its settings, the models and data that it reads, and the files of the
    functions that its settings name."""
    settings = to_dict(config, without=(*no_effect(config), "overwrite", *sources))
    code = {text: file for text in _texts(to_dict(config)) if (file := function_file(text))}
    given = {source: fingerprint_of(value) for source, value in sources.items() if value is not None}
    files = {text: data_fingerprint(file) for text, file in code.items()}
    return {"config": settings, **given} | ({"code": files} if files else {})


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in plain values, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def function_file(spec: str) -> Path | None:
    """Return the file of a function written as file.py:name or package.module:name, but for this library's modules,
    whose next versions a run goes on with; one that isn't there is named where it is imported."""
    place, _, name = spec.rpartition(":")
    if not name.isidentifier():
        return None
    if place.endswith(".py"):
        with suppress(InputError):
            return look_up(place, spec)
    elif all(map(str.isidentifier, place.split("."))) and place.partition(".")[0] not in OURS:
        with suppress(Exception):  # what a package that holds the module raises
            found = find_spec(place)
            return Path(found.origin) if found and found.origin and found.has_location else None
    return None


def next_command(
    name: str, argv: Sequence[str], output_dir: str, section: str = "", also: Sequence[str] = (), **needed: str
) -> None:
    """Print the command that runs the next stage of the same run; nothing where this one's config does not hold it.

    argv: this stage's command line, whose config the next one shares. output_dir: this stage's folder. section: the
    next stage's, where it is not `name`. also: flags that it needs. needed: a flag, and the file of the run that makes
    it unnecessary.
    """
    words, run = ["rlhf", name], Path(output_dir).parent
    given = {word.partition("=")[0]: word.partition("=")[2] or value for word, value in pairwise([*argv, ""])}
    if "--config" in given:
        if not _holds(given["--config"], name):
            return
        words += ["--config", given["--config"]]
    if "--config" not in given or "--output_dir" in given:
        words += ["--output_dir", str(run / (section or name))]
    for flag, file in needed.items():
        if "--config" not in given and not (run / file).exists():
            words += [f"--{flag}", Path(file).name]
    console.stage_line("next", shlex.join([*words, *also]))


def _holds(file: str, name: str) -> bool:
    """Return whether a config has the section of a command; a chain's has data."""
    keys = {*read_yaml(look_up(file, f"{file}: no such file", "configs"))[0]}
    return {"rankings": "data", "evaluate_policy": "evaluation", "chain": "data"}.get(name, name) in keys


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
    """What identifies an input: the content of a file or folder (with an earlier stage's manifest, and the part or
    split that is named), else its name; of several sources, each one's, with its weight and columns."""
    if isinstance(source, list):
        return [fingerprint_of(item) for item in source]
    if isinstance(source, dict):
        return {**source, "path": fingerprint_of(source["path"])}
    path, part = placed(str(source))
    if path is None:
        return str(source)
    content = data_fingerprint(path)
    found = {"manifest": Manifest.read(path).fingerprint} if (path / "manifest.json").is_file() else {}
    found |= {"part": part} if part else {}
    return {**found, "content": content} if found else content


def from_siblings(config: Config, **places: str) -> Config:
    """Fill fields that are None from the folders beside the stage's own; InputError where there is nothing, unless the
    place is written as ?place: of those `none` becomes None."""
    run, filled = Path(config.output_dir).parent, dict[str, str | None]()
    for name, place in places.items():
        optional = place.startswith("?")
        path = run / place.removeprefix("?")
        if getattr(config, name) == NONE:
            if not optional:
                raise InputError(f"{name}=none: it is needed here; name one, or leave it out for the run's own")
            filled[name] = None
            continue
        if getattr(config, name) is not None:
            continue
        if path.exists():
            filled[name] = str(path)
        elif not optional:
            raise InputError(f"--{name} is missing, and no earlier stage left {path}; name it")
    return replace(config, **filled)  # type: ignore[type-var]


def with_columns(config: Config, *names: str) -> Config:
    """Let the sources that a config names itself (not those of earlier stages) have its `columns`."""
    return replace(config, **{name: mapped(getattr(config, name), config.columns) for name in names})  # type: ignore


def check_kept(config: Any) -> None:
    """Raise InputError where `keep_checkpoint` has no checkpoint to keep."""
    if config.keep_checkpoint and not config.save_steps:
        raise InputError("keep_checkpoint needs checkpoints: set save_steps too, say to 100")


def check_model(path: str, stages: tuple[str, ...]) -> None:
    """Refuse an earlier stage's folder that is incomplete or holds another kind of model, before anything is loaded."""
    if (Path(path) / "inputs.json").is_file() and not (Path(path) / "manifest.json").is_file():
        raise InputError(f"{path}: its stage was interrupted; run that stage again, it goes on where it stopped")
    if (Path(path) / "manifest.json").is_file():
        stage = Manifest.read(path).stage
        if stage not in stages:
            raise InputError(f"{path}/manifest.json: made by stage {stage!r}; expected one of {', '.join(stages)}")


def as_outputs(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a command's metrics as a stage's outputs: each value under its name, its interval as <name>_ci."""
    found: dict[str, Any] = {name: metric["value"] for name, metric in metrics.items()}
    ends = {f"{name}_ci": [metric["low"], metric["high"]] for name, metric in metrics.items()}
    return found | {name: interval for name, interval in ends.items() if None not in interval}


def _shown(outputs: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in outputs.items() if isinstance(value, int | float)}
    return "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:6])
