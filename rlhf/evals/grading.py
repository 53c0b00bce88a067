"""An eval: its samples, and the class that judges answers, made from a class's name and its arguments.

Arguments are those of OpenAI Evals' YAML; one that is not known here is refused by name, since it would change what is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, unknown
from rlhf.evals.classes import TEXT_CLASSES, Excludes, Includes, TextClass
from rlhf.evals.modelgraded import ModelBasedClassify, Spec
from rlhf.evals.samples import Sample, digest, read_examples, read_samples
from rlhf.rows.files import show, wrong

CLASSES = (*TEXT_CLASSES, ModelBasedClassify.name)

_COMMON = ("samples_jsonl", "max_tokens")
_SAMPLING = ("max_tokens", "temperature")
_KNOWN = {
    "Match": (*_COMMON, "num_few_shot", "few_shot_jsonl"),
    "Includes": (*_COMMON, "ignore_case", "num_few_shot", "few_shot_jsonl"),
    "FuzzyMatch": (*_COMMON, "num_few_shot", "few_shot_jsonl"),
    "JsonMatch": (*_COMMON, "num_few_shot", "few_shot_jsonl"),
    "Excludes": (*_COMMON, "num_few_shot", "few_shot_jsonl"),
    "ModelBasedClassify": (
        *_COMMON, "modelgraded_spec", "modelgraded_spec_args", "eval_type", "match_fn", "metaeval", "multicomp_n",
        "multicomp_temperature", "samples_renamings", "sample_kwargs", "eval_kwargs",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Eval:
    """A set of samples and the class that judges their answers."""

    name: str
    grader: TextClass | ModelBasedClassify
    samples: tuple[Sample, ...]
    where: str = ""
    max_new_tokens: int | None = None
    """The eval's own limit, which goes before the command's."""
    temperature: float | None = None
    """The eval's own, which goes before the command's."""
    judge_tokens: int | None = None
    """Longest reply of its judge."""
    dataset: str | None = None
    """Its data set on the hub, "name" or "name:task", for .eval_results."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of all that decides its verdicts: the class, the samples, its own limits."""
        samples = [[sample.messages, sample.ideal, sample.columns] for sample in self.samples]
        own = [repr(self.grader), self.max_new_tokens, self.temperature, self.judge_tokens]
        return digest([own, samples])

    @property
    def needs_judge(self) -> bool:
        """Return whether a judge reads the answers."""
        return isinstance(self.grader, ModelBasedClassify)


def make_eval(
    name: str,
    kind: str,
    arguments: Mapping[str, Any],
    where: str,
    find: Callable[[str], Path],
    spec: Callable[[str], Spec],
    dataset: str | None = None,
) -> Eval:
    """Make an eval: read its samples and few-shot turns, check its right answers. Raises InputError.

    find: returns the file that an argument names. spec: returns the modelgraded spec of a name."""
    for argument in arguments:
        if argument not in _KNOWN[kind]:
            unknown(str(argument), _KNOWN[kind], where, f"argument of {kind}")
    given = arguments.get("samples_jsonl")
    if not isinstance(given, str) or not given:
        raise wrong(f"{where}: samples_jsonl", f"got {show(given)}", "name the file of the samples")
    graded = kind == ModelBasedClassify.name
    renamed = {"forbidden": "ideal"} if kind == Excludes.name else arguments.get("samples_renamings") or {}
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise wrong(f"{where}: samples_renamings", f"got {show(renamed)}", "write column: new name lines")
    samples = read_samples(find(given), not graded, _examples(arguments, where, find), renamed)
    sampling = _sampling(arguments.get("sample_kwargs"), f"{where}: sample_kwargs")
    limit = arguments.get("max_tokens", sampling.get("max_tokens"))
    grader = _judged(arguments, where, spec) if graded else _by_text(kind, arguments, where)
    if isinstance(grader, ModelBasedClassify):
        if grader.compared > 1:  # equal answers have no best one; .4 is the package's own default
            sampling.setdefault("temperature", arguments.get("multicomp_temperature", 0.4))
        for sample in samples:
            grader.asks(sample)
    else:
        for sample in samples:
            grader.check(sample.ideal, f"{sample.where}: {'forbidden' if kind == Excludes.name else 'ideal'}")
    judge = _sampling(arguments.get("eval_kwargs"), f"{where}: eval_kwargs").get("max_tokens")
    return Eval(
        name, grader, samples, where, _count(limit, f"{where}: max_tokens"), sampling.get("temperature"),
        _count(judge, f"{where}: eval_kwargs"), dataset,
    )  # fmt: skip


def _by_text(kind: str, arguments: Mapping[str, Any], where: str) -> TextClass:
    if kind != Includes.name:
        return TEXT_CLASSES[kind]()
    ignore = arguments.get("ignore_case", False)
    if not isinstance(ignore, bool):
        raise wrong(f"{where}: ignore_case", f"got {show(ignore)}", "write true or false")
    return Includes(ignore)


def _judged(arguments: Mapping[str, Any], where: str, spec: Callable[[str], Spec]) -> ModelBasedClassify:
    name, texts = arguments.get("modelgraded_spec"), arguments.get("modelgraded_spec_args") or {}
    if not isinstance(name, str):
        raise wrong(f"{where}: modelgraded_spec", f"got {show(name)}", "name a modelgraded spec")
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise wrong(f"{where}: modelgraded_spec_args", f"got {show(texts)}", "write place: text lines")
    compared, metaeval = arguments.get("multicomp_n") or 1, arguments.get("metaeval", False)
    if isinstance(compared, bool) or not isinstance(compared, int) or compared < 1:
        raise wrong(
            f"{where}: multicomp_n", f"got {show(compared)}", "only one policy's answers are compared: a number"
        )
    if not isinstance(metaeval, bool):
        raise wrong(f"{where}: metaeval", f"got {show(metaeval)}", "write true or false")
    match = arguments.get("match_fn") or "starts_or_endswith"
    try:
        return ModelBasedClassify(spec(name), arguments.get("eval_type"), texts, str(match), metaeval, compared)
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None


def _examples(arguments: Mapping[str, Any], where: str, find: Callable[[str], Path]) -> list[dict[str, Any]]:
    count, file = arguments.get("num_few_shot") or 0, arguments.get("few_shot_jsonl")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise wrong(f"{where}: num_few_shot", f"got {show(count)}", "write a number of examples, 0 for none")
    if not count:
        return []
    if not isinstance(file, str):
        raise wrong(f"{where}: few_shot_jsonl", f"got {show(file)}", f"num_few_shot={count} needs a file of examples")
    return read_examples(find(file), count)


def _sampling(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not set(value) <= set(_SAMPLING):
        raise wrong(where, f"got {show(value)}", f"only {' and '.join(_SAMPLING)} are known")
    temperature = value.get("temperature", 0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < 100:
        raise wrong(where, f"temperature {show(temperature)}", "write a number from 0 up")
    return dict(value)


def _count(value: object, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise wrong(where, f"got {show(value)}", "write a number of tokens")
    return value
