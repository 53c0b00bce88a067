"""Evals in two lines: a JSONL file of `prompt` and `ideal`, with its class in a small YAML beside it or in a flag.

{"prompt": "What is 2 + 2?", "ideal": ["4", "four"]}        arithmetic.jsonl
class: Includes                                             arithmetic.yaml, which may say more
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config import read_yaml
from rlhf.errors import InputError, unknown
from rlhf.evals.grading import CLASSES, Eval, make_eval
from rlhf.evals.modelgraded import ModelBasedClassify, Spec, read_spec
from rlhf.rows.files import kind_of, show, wrong
from rlhf.run.lookup import look_up

FOLDERS = ("data/evals",)
"""Where the sets that come with the package are, in a clone and in the wheel."""
_OWN = ("class", "samples", "dataset", "description")
_ARGUMENTS = (
    "few_shot_jsonl", "num_few_shot", "ignore_case", "modelgraded_spec", "modelgraded_spec_args", "eval_type",
    "match_fn", "metaeval", "multicomp_n", "max_tokens", "sample_kwargs", "eval_kwargs",
)  # fmt: skip


def read_own(
    source: str, kind: str | None = None, few_shot: str | None = None, num_few_shot: int = 0, ignore_case: bool = False
) -> Eval:
    """Read an eval from a file of samples, or from the YAML that describes one; "arithmetic" is a set of ours.

    kind: the class, where no YAML names it: Match if neither does. few_shot, num_few_shot, ignore_case: as in a YAML,
    for a file without one. Raises InputError, one line with file, line and field.
    """
    file = _find(source)
    beside = file.with_name(f"{kind_of(file.name)[0]}.yaml")
    if file.suffix != ".yaml" and not beside.is_file():
        arguments: dict[str, Any] = {"few_shot_jsonl": few_shot and str(Path(few_shot).resolve())}
        arguments |= {"num_few_shot": num_few_shot} | ({"ignore_case": True} if ignore_case else {})
        return _made(file, file, kind or "Match", arguments, str(file))
    described = file if file.suffix == ".yaml" else beside
    tree, places = read_yaml(described)
    for name in tree:
        if name not in (*_OWN, *_ARGUMENTS):
            unknown(name, (*_OWN, *_ARGUMENTS), places[(name,)], "field of an eval")
    named = tree.get("class")
    if kind is not None and named is not None and kind != named:
        raise InputError(f"{places[('class',)]}: class: is {show(named)}, and --eval_class {kind}; drop the flag")
    samples = tree.get("samples", described.with_suffix(".jsonl").name)
    dataset = tree.get("dataset")
    for name, value in (("samples", samples), ("dataset", dataset)):
        if value is not None and not isinstance(value, str):
            raise wrong(f"{places[(name,)]}: {name}", f"got {show(value)}", "write a name")
    arguments = {name: value for name, value in tree.items() if name in _ARGUMENTS}
    given = {"few_shot": few_shot, "num_few_shot": num_few_shot, "ignore_case": ignore_case}
    if extra := next((name for name, value in given.items() if value), None):
        raise InputError(f"--{extra}: {described} describes this eval; write it there")
    target = file if file.suffix != ".yaml" else described.parent / samples
    return _made(described, target, str(named or kind or "Match"), arguments, str(described), dataset)


def _find(source: str) -> Path:
    """Find the file that a flag names: a path, or one of our sets, with or without its end."""
    end = "" if kind_of(source)[1] or source.endswith(".yaml") else ".yaml"
    return look_up(f"{source}{end}", f"eval_data={source}: no such file", *FOLDERS)


def _made(
    described: Path, samples: Path, kind: str, arguments: dict[str, Any], where: str, dataset: str | None = None
) -> Eval:
    if kind not in CLASSES:
        unknown(kind, CLASSES, where, "class")
    known = {name: value for name, value in arguments.items() if value is not None}
    if kind == ModelBasedClassify.name:
        known |= {"samples_renamings": {"prompt": "input"}}
        known = {name: value for name, value in known.items() if value or name not in ("num_few_shot", "ignore_case")}
    known["samples_jsonl"] = str(samples)
    name = kind_of(described.name)[0] if described.suffix != ".yaml" else described.stem
    return make_eval(name, kind, known, where, lambda given: described.parent / given, _spec(described), dataset)


def _spec(described: Path) -> Any:
    def read(name: str) -> Spec:
        file = described.parent / name
        tree, _ = read_yaml(file)
        return read_spec(tree, str(file))

    return read
