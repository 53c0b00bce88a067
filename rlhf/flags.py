"""A config class's fields as command-line flags, and its --help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from rlhf.errors import InputError, unknown
from rlhf.hints import choices_of, field_of, hints_of, is_list, is_required, one_line, sections_of


def all_flags(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every flag's dotted name and type; an optional section is a flag too, for `--base null`."""
    sections = sections_of(cls)
    for name, hint in hints_of(cls).items():
        if name in sections:
            if sections[name][2]:
                yield ".".join((*path, name)), None
            yield from all_flags(sections[name][1], (*path, name))
        else:
            yield ".".join((*path, name)), hint


ELSEWHERE = {
    "num_train_epochs": "epochs", "per_device_train_batch_size": "microbatch_size", "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule", "warmup_ratio": "warmup_fraction", "max_seq_length": "max_length",
    "model_name_or_path": "model", "model_name": "model", "model_path": "model", "dataset_name": "train_data",
    "dataset": "train_data", "train_file": "train_data", "reward_model_path": "reward_model",
    "reward_funcs": "reward_functions", "lora_r": "lora_rank", "use_peft": "lora_rank", "beta": "kl_coef",
    "init_kl_coef": "kl_coef", "cliprange": "clip_ratio", "epsilon": "clip_ratio", "cliprange_value": "clip_value",
    "vf_coef": "value_loss_coef", "lam_gae": "lam", "gae_lambda": "lam", "num_ppo_epochs": "inner_epochs",
    "num_iterations": "inner_epochs", "max_completion_length": "max_new_tokens", "response_length": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens", "missing_eos_penality": "missing_eos_penalty", "max_steps": "updates",
    "total_episodes": "updates", "activation_checkpointing": "gradient_checkpointing", "torch_compile": "compile",
    "whiten_rewards": "rescale_rewards", "per_device_eval_batch_size": "microbatch_size", "data_seed": "seed",
}  # fmt: skip
"""What transformers, trl and peft call a setting -> our name; consulted where a name is unknown."""


def unknown_name(name: str, known: Collection[str], where: str, kind: str, dashes: str = "") -> NoReturn:
    """Refuse a flag or a key: name the setting that transformers or trl call so, or that of a section, or the nearest
    name."""
    section, _, last = name.replace("-", "_").rpartition(".")
    for wanted in (last, ELSEWHERE.get(last, "")):
        found = [other for other in known if other.rpartition(".")[2] == wanted]
        found = [other for other in found if section and other.startswith(f"{section}.")] or found
        if found:
            advice = " or ".join(f"{dashes}{other}" for other in found[:4])
            raise InputError(f"{where}: unknown {kind} {dashes}{name}; did you mean {advice}?")
    unknown(f"{dashes}{name}", [f"{dashes}{other}" for other in known], where, kind)


def read_flags(argv: Sequence[str], known: dict[str, Any]) -> tuple[str | None, list[tuple[tuple[str, ...], Any]]]:
    """Read `--name value` words: the file that --config names, and every other flag's path with its value.

    As transformers' parser does, it takes hyphens for underscores, a flag of true or false without a value, and for a
    list several words (`--report_to tensorboard wandb`), which become a list.
    """
    file, flags, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"command line: unexpected {word!r}; options are written `--name value`")
        name, equals, value = word[2:].partition("=")
        name = name if name in known else name.replace("-", "_")
        if name != "config" and name not in known:
            unknown_name(word[2:].partition("=")[0], ["config", *known], "command line", "flag", "--")
        words = [value] if equals else []
        while rest and not rest[0].startswith("--") and (not words or (is_list(known.get(name)) and not equals)):
            words.append(rest.pop(0))
        if not words and bool in choices_of(known.get(name)):
            words = ["true"]
        if not words:
            raise InputError(f"command line: --{name} needs a value")
        if name != "config":
            listed = len(words) > 1 and not words[0].startswith("[")
            flags.append((tuple(name.split(".")), words if listed else " ".join(words)))
        elif not words[0].strip():
            raise InputError("command line: --config is empty; name a YAML file")
        elif file:
            raise InputError(f"command line: --config is given twice: {file} and {words[0]}")
        else:
            file = words[0]
    return file, flags


def first_word(argv: Sequence[str], name: str, usage: str, what: str = "the run's folder") -> list[str]:
    """Let the first word, if it is no flag, be the value of --name. Raises InputError with the usage without it."""
    if argv and not argv[0].startswith("-"):
        return [f"--{name}", *argv]
    if not any(word.split("=")[0] in (f"--{name}", "--help", "-h") for word in argv):
        raise InputError(f"name {what} first: {usage}")
    return list(argv)


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


WIDTH, COLUMN = 80, 28  # of the help; where the text beside a flag begins


@dataclasses.dataclass(frozen=True)
class Entry:
    """A flag in the help."""

    name: str
    takes: str
    text: str
    group: str

    def shown(self, width: int) -> str:
        """Return the flag with its text beside it, or below it where the flag is long."""
        flag, column = f"  --{self.name} {self.takes}", min(COLUMN, width // 3)
        lines = textwrap.wrap(self.text, width - column, break_long_words=False)
        head = f"{flag:<{column}}{lines.pop(0)}" if len(flag) + 2 <= column else flag
        return "\n".join([head, *(" " * column + line for line in lines)])


def print_help(cls: type, description: str) -> None:
    """Print what a recipe does, its examples as they are written, and its flags.

    The flags that `cls.MOST_USED` names come first, the others in groups: in a config's class, a string that stands by
    itself begins one.
    """
    width = min(WIDTH, shutil.get_terminal_size().columns)
    print(f"usage: {_program()} [--config FILE.yaml] [--name value ...]\n")
    for paragraph in (description or inspect.cleandoc(cls.__doc__ or "")).strip().split("\n\n"):
        as_written = paragraph.startswith("    ")
        print(paragraph if as_written else textwrap.fill(one_line(paragraph), width), end="\n\n")
    entries = list(_entries(cls, (), ""))
    used = [entry for name in getattr(cls, "MOST_USED", ()) for entry in entries if entry.name == name]
    config = Entry("config", "FILE.yaml", "a YAML file, here or among those of `rlhf list`; flags win over it", "")
    blocks = {"Most used" if used else "Flags": [config, *used]}
    for entry in entries:
        if entry not in used:
            blocks.setdefault(entry.group or "Flags", []).append(entry)
    for title, listed in blocks.items():
        print(f"{title}:", *(entry.shown(width) for entry in listed), sep="\n", end="\n\n")


INHERITED = ("seed", "output_dir")
"""Fields that a section takes from the level above it when it has no value of its own."""

OF_THE_CHAIN = ("overwrite", "overwrite_from")
"""Fields of a chain beside its sections, which say nothing to a stage that is run alone."""


def _entries(cls: type, path: tuple[str, ...], title: str, above: Collection[str] = ()) -> Iterator[Entry]:
    """Every flag: a class's own before those that it inherits, sections last. above: the fields of the level above."""
    sections, hints, docs = sections_of(cls), hints_of(cls), _docs(cls)
    for name in sorted(hints, key=[*docs, *hints].index):
        if name not in sections:
            text, group = docs.get(name, ("", ""))
            field = field_of(cls, name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if name in INHERITED and name in above:
                outer = ".".join((*path[:-1], name))
                text += f" (default: {f'<{outer}>/{path[-1]}' if name == 'output_dir' else f'that of --{outer}'})"
            elif is_required(field):
                text += " (required)"
            elif default != "" and (default is not None or not re.search(r"\b(null|default)\b", text)):
                text += f" (default: {_plain(default)})"
            group = ": ".join(part for part in (title, group) if part)
            yield Entry(".".join((*path, name)), _takes(hints[name]), text, group)
    for name, (field, inner, optional) in sections.items():
        dotted = (*path, name)
        off = " (off unless named)" if field.default is None else " (null turns it off)"
        heading = ".".join(dotted) + (off if optional else "")
        yield from _entries(inner, dotted, heading, hints)


def _takes(hint: Any) -> str:
    """What a flag takes, in a word."""
    kind = next(choice for choice in choices_of(hint) if choice is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    names = {
        int: "N",
        float: "NUMBER",
        bool: "true|false",
        str: "TEXT",
        list: "A,B",
        tuple: "A,B",
        dict: "{A: B}",
    }
    return names.get(typing.get_origin(kind) or kind, "VALUE")


def _plain(value: Any) -> str:
    """A default as YAML would write it."""
    if isinstance(value, str) and not value.strip():
        return json.dumps(value)  # a line break, say
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _program() -> str:
    """The command as it was typed: `rlhf ppo`, or the script."""
    name = Path(sys.argv[0]).name
    return " ".join(["rlhf", *sys.argv[1:2]]) if name.split(".")[0] in ("rlhf", "cli") else f"python {sys.argv[0]}"


@cache
def _docs(cls: type) -> dict[str, tuple[str, str]]:
    """The string under each field and the group that it is in; a class's own fields before those that it inherits."""
    docs: dict[str, tuple[str, str]] = {}
    for owner in cls.__mro__[:-1]:
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        group, above = "", None
        for line in tree.body:
            if _is_text(line) and isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name):
                docs.setdefault(above.target.id, (one_line(line.value.value), group))
            elif _is_text(line) and above is not None:  # the first string is the class's own
                group = line.value.value
            above = line
    return docs


def _is_text(line: Any) -> bool:
    value = line.value if isinstance(line, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
