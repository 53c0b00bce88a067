"""The command `rlhf`: every recipe by its name, and what helps to find, copy and report things.

    rlhf list                              recipes, configs, notebooks
    rlhf chain --config toy.yaml           a recipe; --help shows its flags
    rlhf ppo --num_processes 8 ...         a recipe in several processes, started as `accelerate launch` does
    rlhf copy toy.yaml DIR                 a config, notebook or recipe, to change
    rlhf env                               what a bug report needs

Recipes are found by their files' names and imported when they are called: nothing here waits for torch.
"""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf import __version__
from rlhf.errors import InputError, run, unknown
from rlhf.run.lookup import look_up, recipes

OWN = {
    "list": "Name every recipe, config and notebook, a line each.",
    "copy": "Copy one of them into a folder: rlhf copy toy.yaml DIR.",
    "env": "Show versions and devices, for a bug report.",
}
LAUNCH = (
    "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids", "rdzv_backend",
    "rdzv_conf", "num_cpu_threads_per_process",
)  # fmt: skip
"""Flags of `accelerate launch` that a recipe's command line may hold."""

KINDS = {"configs": "*.yaml", "configs/accelerate": "*.yaml", "notebooks": "*.ipynb"}


def main() -> None:
    """Run the command line: exit code 0, 1 (a run stopped itself), 2 (a mistake in the input) or 130 (Ctrl-C)."""
    run(command)


def command(argv: list[str]) -> None:
    """Do what the first word says."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print_help()
    elif argv[0] in ("--version", "-V"):
        print(f"rlhf-recipes {__version__}")
    elif argv[0] == "copy":
        copy(argv[1:])
    elif argv[0] in OWN:
        if argv[1:]:
            raise InputError(f"rlhf {argv[0]}: unexpected {argv[1]!r}; it takes no arguments")
        print_list() if argv[0] == "list" else print_environment()
    elif argv[0] in (names := [file.stem for file in recipe_files()]):
        run_recipe(argv[0], argv[1:])
    else:
        unknown(argv[0], [*names, *OWN], "rlhf", "command")


# ---------------------------------------------------------------- recipes


def commands() -> dict[str, str]:
    """Return every recipe's name and the first line of its docstring."""
    texts = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in recipe_files()}
    return {name: (ast.get_docstring(text) or "").partition("\n")[0] for name, text in texts.items()}


def recipe_files() -> list[Path]:
    """Return the recipes that can be run, sorted."""
    files = sorted(recipes().glob("*.py"))
    return [file for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]


def run_recipe(name: str, argv: list[str]) -> None:
    """Call a recipe in this process, or launch as many processes as its flags ask for."""
    flags, rest = split_launch_flags(argv)
    several = flags.get("num_processes", "1") != "1" or "num_machines" in flags or "accelerate_config" in flags
    if several and not {"--help", "-h"} & set(rest):
        launch(recipes() / f"{name}.py", flags, rest)
        return
    if importlib.util.find_spec("rlhf_recipes") is None:  # a clone that is on PYTHONPATH alone
        sys.path.insert(0, str(recipes()))
    importlib.import_module(f"rlhf_recipes.{name}").main(rest)


def split_launch_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Divide a command line into accelerate's flags and the recipe's. Raises InputError where a value is missing."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")  # as with all other flags
        if not word.startswith("--") or name not in (*LAUNCH, "accelerate_config"):
            rest.append(word)
            continue
        flags[name] = value if equals else next(words, "--")
        if flags[name].startswith("--") or not flags[name]:
            raise InputError(f"command line: --{name} needs a value")
    if not flags.get("num_processes", "1").isdecimal() or flags.get("num_processes") == "0":
        raise InputError(f"num_processes={flags['num_processes']} must be a whole number from 1 up")
    return flags, rest


def launch(recipe: Path, flags: dict[str, str], argv: list[str]) -> None:
    """Start the recipe in several processes as `accelerate launch` does, on CPUs too, and end with their exit code."""
    config = flags.pop("accelerate_config", None)
    if config is None and "num_processes" not in flags:
        raise InputError("command line: --num_machines needs --num_processes too: of all machines together")
    words = [] if config is None else ["--config_file", str(_accelerate_config(config))]
    words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    if config is None:
        words += ["--multi_gpu"]  # on CPUs too: with --cpu accelerate would start one process
        words += [] if "main_process_port" in flags else ["--main_process_port", "0"]  # a free one, not always 29500
    # else DDP's advice of seven lines from every process; torch reads it when it is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import psutil
    import torch
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # gloo
    # torchrun kills its processes 30 seconds after a SIGTERM or Ctrl-C: too soon to finish a step and save
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    for name in ("torch.distributed", *logging.root.manager.loggerDict):  # torchrun's have levels of their own
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a recipe says itself what went wrong
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        launch_command(launch_command_parser().parse_args([*words, str(recipe), *argv]))
    except ChildFailedError as error:
        process, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            raise SystemExit(failure.exitcode) from None
        print("\n" * sys.stderr.isatty() + ended_by_signal(process, failure.signal_name()), file=sys.stderr)
        raise SystemExit(128 - failure.exitcode) from None
    except SignalException as signal:
        for child in psutil.Process().children(recursive=True):  # after a third Ctrl-C torchrun waits for none
            child.kill()
        raise SystemExit(128 + signal.sigval) from None
    except (ValueError, ImportError) as error:  # accelerate's own checks of its flags, and of what they need
        raise InputError(f"accelerate launch: {error}") from None
    finally:
        if sys.stderr.isatty():  # a bar whose process was ended has left the cursor hidden
            print("\x1b[?25h", end="", file=sys.stderr, flush=True)


def ended_by_signal(process: int, signal: str) -> str:
    """Write the line for a process that a signal has ended, which could not write its own."""
    likely = (
        ", most likely by the system for want of memory: lower microbatch_size or tokens_per_microbatch, or start "
        "fewer processes"
    )
    return (
        f"stopped: process {process} was ended by {signal}{likely if signal == 'SIGKILL' else ''}. The last "
        "checkpoint, if there is one, is good: the same command goes on from it"
    )


def _accelerate_config(name: str) -> Path:
    return look_up(name, f"accelerate_config={name}: no such file", "configs/accelerate", "configs")


# ---------------------------------------------------------------- list, copy, help


def print_help() -> None:
    """Print how to use the command, and every command with a line."""
    print("usage: rlhf COMMAND [--config FILE.yaml] [--name value ...]\n")
    width = min(80, shutil.get_terminal_size().columns)
    print(
        textwrap.fill("Post-training from human preferences. `rlhf COMMAND --help` shows its flags.", width), end="\n\n"
    )
    for title, listed in (("Recipes", commands()), ("Besides", OWN)):
        print(f"{title}:", *_lines(listed), sep="\n", end="\n\n")
    several = "Several processes: --num_processes N and --accelerate_config FILE.yaml may stand among a recipe's flags"
    launch = ", ".join(f"--{name}" for name in LAUNCH if name != "num_processes")
    print(textwrap.fill(f"{several}, and of `accelerate launch`'s {launch}.", width, break_on_hyphens=False))


def print_list() -> None:
    """Print the recipes, configs and notebooks."""
    print("Recipes (rlhf NAME --help):", *_lines(commands()), sep="\n", end="\n\n")
    titles = (
        "Configs (--config NAME)",
        "For several GPUs (--accelerate_config NAME)",
        "Notebooks (rlhf copy NAME DIR)",
    )
    for title, (folder, pattern) in zip(titles, KINDS.items(), strict=True):
        files = {file.name: _about(file) for file in sorted((recipes() / folder).glob(pattern))}
        print(f"{title}:", *_lines(files), sep="\n", end="\n\n")
    print(f"They are in {recipes()}; `rlhf copy NAME DIR` copies one, to change it.")


def print_environment() -> None:
    """Print versions and devices."""
    from rlhf.run import environment

    print(environment.report())


def _lines(named: dict[str, str]) -> Iterator[str]:
    """Names with what they are, in 80 columns; on a narrow terminal what they are stands below."""
    column, width = max(map(len, named), default=0) + 4, min(80, shutil.get_terminal_size().columns)
    for name, text in named.items():
        if width < 60:
            yield "\n".join(
                [f"  {name}", *textwrap.wrap(text, width, initial_indent=" " * 4, subsequent_indent=" " * 4)]
            )
            continue
        room = width - column
        short = text if len(text) <= room else f"{text[: room - 3].rpartition(' ')[0]}..."
        yield f"  {name:<{column - 2}}{short}".rstrip()


def _about(file: Path) -> str:
    """The first line of a config's header, or a notebook's title."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return text.partition("\n")[0].lstrip("# ")


def copy(argv: list[str]) -> None:
    """Copy a config, notebook or recipe into a folder, which is made where it is not there."""
    if len(argv) != 2 or argv[0].startswith("-"):
        raise InputError("rlhf copy NAME DIR: name one of `rlhf list` and a folder")
    name, folder = argv[0], Path(argv[1])
    here = [*(recipes() / f"{recipe}.py" for recipe in commands())]
    here += [file for kind, pattern in KINDS.items() for file in (recipes() / kind).glob(pattern)]
    found = [file for file in here if name in (file.name, file.stem, file.relative_to(recipes()).as_posix())]
    if not found:
        unknown(name, [file.name for file in here], "rlhf copy", "name")
    to = folder / found[0].name
    if to.exists() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{to if to.exists() else folder}: is there already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[0], to)
    print(f"wrote {to}")


if __name__ == "__main__":
    main()
