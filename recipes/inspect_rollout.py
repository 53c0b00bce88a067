"""A PPO update that was kept, response by response.

    rlhf inspect_rollout runs/my                      # which were kept
    rlhf inspect_rollout runs/my --update 4 --sort kl # a line per response
    rlhf inspect_rollout runs/my --update 4 --row 3   # one, token by token
    rlhf inspect_rollout runs/my --update 4 --row 3 --html row.html
    rlhf inspect_rollout runs/my --update 4 --html pages  # all, linked
    rlhf inspect_rollout runs/my --update 4 --replay  # run again, compare

Train with --save_rollouts N (in a chain --ppo.save_rollouts N) to keep updates. The first word is a run's folder or
its ppo stage's. --replay exits with 1 where any number differs.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.flags import first_word
from rlhf.ppo.view import Sort, number, response_lines, response_page, response_view, rows_table
from rlhf.run import console
from rlhf.run import page as html
from rlhf_recipes.stage import SECTIONS

if TYPE_CHECKING:
    from rlhf.ppo.rollout import Rollout
    from rlhf.ppo.saved import Origin
    from rlhf.ppo.trainer import PPOTrainer

console.quiet()

RECOMPUTED = ("rewards", "advantages", "returns")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Looking into a PPO update that was kept."""

    run: str
    """The run's folder or its ppo stage's; also given as the first word, without a flag."""
    update: int | None = None
    """Which update, by its "step" in metrics.jsonl; null lists those that were kept."""
    row: int | None = None
    """Which response, counted from 0; null lists them all."""
    sort: Sort | None = None
    """Order of that list, highest first; null: as they were collected."""
    html: str | None = None
    """Write web pages instead: with --row the response's, into this file; else every response's and an index, into this
    folder."""
    replay: bool = False
    """Run the update again from its saved state and compare every number with the log."""
    model: str | None = None
    """For --replay: the policy's folder, where the run was given an object or the folder has moved."""
    value_model: str | None = None
    """For --replay: what the value model started from, likewise."""

    def __post_init__(self) -> None:
        needs = {"row": self.row, "sort": self.sort, "replay": self.replay or None}
        for name, value in needs.items():
            if value is not None and self.update is None:
                raise InputError(f"--{name} needs --update N; without flags, the updates that were kept are listed")
        if self.html is not None and self.row is None and (self.update is None or self.html.endswith(".html")):
            raise InputError(
                "--html needs --update N and --row K for one page; with --update N and a folder it writes all"
            )
        if self.row is not None and (self.sort or self.replay):
            raise InputError(f"--row shows one response; leave out --{'sort' if self.sort else 'replay'}")
        if self.replay and self.html is not None:
            raise InputError("--html shows responses; leave it out with --replay")
        if self.sort and self.replay:
            raise InputError("--sort orders the list of responses; leave it out with --replay")
        if not self.replay and (self.model or self.value_model):
            raise InputError(f"--{'model' if self.model else 'value_model'} is for --replay; leave it out")


def inspect(config: InspectConfig) -> bool:
    """Show what was asked for; False where a replay differs from the log."""
    from rlhf.ppo.saved import load_rollout, saved_updates, update_folder

    stage = ppo_folder(config.run)
    updates = saved_updates(stage)
    if config.update is None:
        console.console().print(f"updates kept in {stage / 'rollouts'}", markup=False, soft_wrap=True)
        console.console().print(updates_table(stage, updates))
        return True
    if config.update not in updates:
        kept = ", ".join(map(str, updates)) or "none"
        raise InputError(f"--update {config.update}: {stage} kept no such update; it has {kept}")
    folder = update_folder(stage, config.update)
    if config.replay:
        return replay(folder, config)
    rollout = load_rollout(folder)
    if config.row is None and config.html is not None:
        write_all(config, stage, folder, rollout)
        return True
    if config.row is None:
        console.console().print(rows_table(rollout, config.sort, console.console().width))
        return True
    show_row(config, folder, rollout, config.row)
    return True


def ppo_folder(run: str) -> Path:
    """The PPO stage's folder of a run, or of itself."""
    for folder in (Path(run), Path(run) / "ppo"):
        if (folder / "rollouts").is_dir():
            return folder
    if not Path(run).is_dir():
        raise InputError(f"{run}: no such folder; name a run's folder or its ppo stage's")
    raise InputError(
        f"{run}: no rollouts were kept; train with --save_rollouts N (in a chain: --ppo.save_rollouts N) to keep "
        "every Nth update"
    )


def updates_table(stage: Path, updates: list[int]) -> Table:
    """A line per kept update."""
    from rlhf.ppo.saved import read_logged, update_folder

    names = ["score", "kl_nats", "entropy_nats", "response_tokens", "eos_rate", "explained_variance"]
    names = names if console.console().width >= 70 else names[:2]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("update", *names, "MB"):
        table.add_column(name.replace("_", " "), justify="right")
    for update in updates:
        folder = update_folder(stage, update)
        logged = read_logged(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        table.add_row(str(update), *(number(logged.get(name)) for name in names), f"{size:.1f}")
    return table


def show_row(config: InspectConfig, folder: Path, rollout: Rollout, row: int) -> None:
    """One response, in the terminal or as a page."""
    if not 0 <= row < len(rollout):
        raise InputError(f"--row {row}: update {config.update} has rows 0 to {len(rollout) - 1}")
    view = response_view(rollout, row, load_tokenizer(folder))
    if config.html is None:
        console.console().print(response_lines(view, console.console().width))
        return
    page = response_page(view, f"{Path(config.run).resolve().name}: update {view.update}, row {row}")
    try:
        html.write(config.html, page)
    except OSError as error:
        raise InputError(f"--html {config.html}: cannot be written ({error.strerror})") from None
    console.stage_line("inspect", f"wrote {config.html}")


def write_all(config: InspectConfig, stage: Path, folder: Path, rollout: Rollout) -> None:
    """Every response as a page, and the index."""
    from rlhf.ppo.pages import write_pages

    title = f"{Path(config.run).resolve().name}: update {config.update}"
    report = next((place / "report.html" for place in (stage.parent, stage) if (place / "report.html").is_file()), None)
    try:
        index = write_pages(
            rollout, load_tokenizer(folder), title, Path(str(config.html)), sort=config.sort, report=report
        )
    except OSError as error:
        raise InputError(f"--html {config.html}: cannot be written ({error.strerror})") from None
    console.stage_line("inspect", f"wrote {index} and {len(rollout)} pages")


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from rlhf.run.readable import first_sentence

    try:
        return AutoTokenizer.from_pretrained(str(folder / "tokenizer"), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'tokenizer'}: holds no tokenizer that loads ({first_sentence(error)})") from None


# ---------------------------------------------------------------- replay


@dataclass(frozen=True)
class Compared:
    """A number as it was logged and as it came out again."""

    name: str
    logged: float
    replayed: float

    @property
    def identical(self) -> bool:
        """To the last bit; two that are no numbers are the same (a log writes both as null)."""
        return self.logged == self.replayed or not (math.isfinite(self.logged) or math.isfinite(self.replayed))


def replay(folder: Path, config: InspectConfig) -> bool:
    """Run a saved update again, print the comparison; is every number as it was logged?"""
    import torch

    from rlhf.ppo.run import load_checkpoint
    from rlhf.ppo.saved import Origin, load_rollout, read_logged

    origin = Origin.read(folder)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != origin.processes:
        raise InputError(
            f"the run had {origin.processes} processes, this is {processes}: start it with "
            f"rlhf inspect_rollout {config.run} --update {config.update} --replay --num_processes {origin.processes}"
        )
    logged = read_logged(folder)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(origin.machine.get("threads", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as scratch:
        rollout = load_rollout(folder, int(os.environ.get("RANK", "0")))
        trainer = build_trainer(folder, origin, config, rollout, scratch)
        load_checkpoint(trainer, folder / "state")
        again = trainer.advantages(rollout)
        columns = [largest_difference(name, rollout, again) for name in RECOMPUTED]
        replayed = trainer.update(rollout)
    numbers = [Compared(name, value, replayed[name]) for name, value in logged.items() if name in replayed]
    rest = [name for name in logged if name not in replayed and name != "step"]
    identical = all(item.identical for item in [*numbers, *columns])
    if trainer.accelerator.is_main_process:
        show_comparison(folder, numbers, columns, rest, identical, origin)
    return identical


def build_trainer(folder: Path, origin: Origin, config: InspectConfig, rollout: Rollout, scratch: str) -> PPOTrainer:
    """The run's trainer as it was built, without trackers; its weights come with the state."""
    from peft import LoraConfig

    from rlhf.ppo.trainer import PPOTrainer

    model = config.model or origin.model
    value_model = config.value_model or origin.value_model
    if model is None:
        raise InputError("the run was given a model object, not a folder; pass --model FOLDER (the model it began as)")
    if value_model is None and not origin.value_from_policy:
        raise InputError("the run's value model began as an object; pass --value_model FOLDER (a reward model's)")
    for flag, place in (("model", origin.model), ("value_model", origin.value_model)):
        if getattr(config, flag) is None and place and Path(place).is_absolute() and not Path(place).exists():
            raise InputError(f"{place}: the run began from it and it is gone; pass --{flag} FOLDER")
    adapter = folder / "adapter_config.json"
    return PPOTrainer(
        model,
        [_no_score] * origin.functions,
        args=origin.args(output_dir=scratch, report_to=None),
        train_dataset=rollout.prompts,
        processing_class=load_tokenizer(folder),
        value_model=value_model,
        peft_config=LoraConfig.from_pretrained(str(folder)) if adapter.is_file() else None,
    )


def _no_score(**columns: Any) -> list[float]:
    raise AssertionError("a replay uses the saved scores")


def largest_difference(name: str, saved: Rollout, again: Rollout) -> Compared:
    """What is computed from the saved columns against what was saved: 0 where it is equal to the last bit."""
    one, other = getattr(saved, name), getattr(again, name)
    if one is None:
        raise InputError(f"the saved rollout holds no {name}; only a whole update can be run again")
    difference = (one - other).abs().max()
    return Compared(f"{name}, max difference", 0.0, float(difference))


def show_comparison(
    folder: Path, numbers: list[Compared], columns: list[Compared], rest: list[str], identical: bool, origin: Origin
) -> None:
    out = console.console()
    out.print(f"replay of {folder}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("metric", "logged", "replayed", "difference"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for item in [*numbers, *columns]:
        difference = "0" if item.identical else f"{item.replayed - item.logged:+.3g}"
        style = "" if item.identical else "bold red"
        if out.width >= 100:
            table.add_row(item.name, repr(item.logged), repr(item.replayed), difference, style=style)
        else:  # no digit may be cut
            line = f"{item.name}: logged {item.logged!r}, replayed {item.replayed!r}, difference {difference}"
            out.print(line, style=style, markup=False)
    if out.width >= 100:
        out.print(table)
    out.print("max difference: of the tokens' numbers, computed again from the saved ones, to the saved ones")
    if rest:
        out.print(f"not part of the update, so not run again: {', '.join(rest)}", markup=False)
    if identical:
        out.print("[bold green]identical[/]: every number is the logged one to the last bit")
        return
    count = sum(not item.identical for item in [*numbers, *columns])
    out.print(f"[bold red]not identical[/]: {count} of {len(numbers) + len(columns)} numbers differ")
    for difference in origin.differences():
        out.print(f"  {difference}: sums may be rounded in another order", markup=False)


def main(argv: list[str]) -> None:
    argv = first_word(argv, "run", "rlhf inspect_rollout RUN [--update N] [--row K]")
    if not inspect(
        configs.load(InspectConfig, argv, section="inspect_rollout", known_sections=SECTIONS, description=__doc__ or "")
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    configs.run(main)
