"""A chosen update of PPO kept whole, to be looked at and run again.

::

    <output_dir>/rollouts/update-<N>/     N is the update's "step" in metrics.jsonl
        rollout-<process>.pt    prompts, responses and everything collected on them
        state/                  the trainer before this update: what a checkpoint folder holds, and as big
        tokenizer/              what shows the tokens as text
        run.json                what the trainer was made of and where it ran (class Origin)
        adapter_config.json     the LoRA configuration, where one was passed as an object
        metrics.json            what was logged of this update

The folder is written beside its place and renamed once the update is done: it is whole or it is not there.
`recipes/inspect_rollout.py` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.config import from_dict, to_dict
from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.rollout import ReadyRollout
from rlhf.records import Prompt
from rlhf.run.checkpoint import atomic_folder, write_json_atomic

PER_RESPONSE = ("stopped", "raw_scores", "scores", "used")
PER_TOKEN = (
    "mask", "logprobs", "reference_logprobs", "engine_logprobs", "entropy", "values", "rewards", "advantages",
    "returns", "importance",
)  # fmt: skip
BROKEN = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError, TypeError)
"""What torch.load and the code that takes its result apart raise on a file that was cut short or is another's."""


# ---------------------------------------------------------------- the rollout


def save_rollout(folder: str | Path, rollout: ReadyRollout, process_index: int = 0) -> Path:
    """Write ``rollout-<process>.pt``: a dict that ``torch.load(..., weights_only=True)`` reads.

    A prompt's columns are kept as far as JSON can hold them (anything else becomes its text); all else comes
    back from ``load_rollout`` exactly as it was.
    """
    content = {item.name: getattr(rollout, item.name) for item in dataclasses.fields(rollout)}
    content["prompts"] = json.dumps([asdict(prompt) for prompt in rollout.prompts], default=str)
    path = Path(folder) / f"rollout-{process_index}.pt"
    torch.save(content, path)
    return path


def load_rollout(folder: str | Path, process_index: int | None = None) -> ReadyRollout:
    """What ``save_rollout`` wrote; without a process's number, the rows of all processes, one after the other.

    Raises InputError where there is no such file, or it is broken.
    """
    folder = Path(folder)
    if process_index is not None:
        return _load_file(folder / f"rollout-{process_index}.pt")
    count = sum(path.stem.removeprefix("rollout-").isdigit() for path in folder.glob("rollout-*.pt"))
    return _joined([_load_file(folder / f"rollout-{index}.pt") for index in range(max(count, 1))])


def _load_file(path: Path) -> ReadyRollout:
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the folder of a saved update, with all of its rollout files")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["prompts"] = [Prompt(**prompt) for prompt in json.loads(content["prompts"])]
        rollout = ReadyRollout(**content)
        _check_shapes(rollout)
    except BROKEN as error:
        raise InputError(f"{path}: cut short or no saved rollout ({reason(error)}); look at another update") from None
    return rollout


def reason(error: Exception) -> str:
    """The first sentence of what a library says of a broken file."""
    return " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__


def _check_shapes(rollout: ReadyRollout) -> None:
    rows, width = rollout.mask.shape
    lengths = [len(ids) for ids in rollout.response_ids]
    for name in ("prompts", "prompt_ids", "response_ids", "texts"):
        if len(getattr(rollout, name)) != rows:
            raise ValueError(f"{name} has {len(getattr(rollout, name))} rows, mask {rows}")
    for name in (*PER_RESPONSE, *PER_TOKEN):
        tensor, expected = getattr(rollout, name), (rows,) if name in PER_RESPONSE else (rows, width)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
    if not torch.equal(rollout.mask.sum(-1), torch.tensor(lengths)):
        raise ValueError("mask and response_ids have different lengths")


def _joined(rollouts: list[ReadyRollout]) -> ReadyRollout:
    """Several processes' rollouts as one; minibatch k of the plan holds everybody's minibatch k."""
    if len(rollouts) == 1:
        return rollouts[0]
    firsts = [sum(map(len, rollouts[:i])) for i in range(len(rollouts))]
    plan = [
        [[row + first for row in rows] for first, part in zip(firsts, parts, strict=True) for rows in part]
        for parts in zip(*(rollout.plan for rollout in rollouts), strict=True)
    ]
    lists = {
        name: [item for rollout in rollouts for item in getattr(rollout, name)]
        for name in ("prompts", "prompt_ids", "response_ids", "texts")
    }
    tensors = {name: _stacked([getattr(rollout, name) for rollout in rollouts]) for name in (*PER_RESPONSE, *PER_TOKEN)}
    own = {name: torch.cat([rollout.own_scores[name] for rollout in rollouts]) for name in rollouts[0].own_scores}
    return ReadyRollout(**lists, **tensors, own_scores=own, plan=plan, update=rollouts[0].update)  # type: ignore[arg-type]


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """Rows below each other, padded on the right with 0 (False) to the longest."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        return None
    width = max(tensor.shape[-1] for tensor in present)
    if present[0].ndim == 2:
        present = [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in present]
    return torch.cat(present)


# ---------------------------------------------------------------- the folder around it


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is needed to build the trainer of a saved update again, and where it ran."""

    config: dict[str, Any]
    """The PPOConfig's fields."""
    model: str | None
    """The policy's folder or hub id; null: it was passed as an object."""
    reference: str | None = None
    """The reference's, where one was given; null: a copy of the policy, or an object. An update doesn't use it."""
    value_model: str | None = None
    """What the value model started from; null: an object, or (`value_from_policy`) the policy under a zero head."""
    value_from_policy: bool = False
    functions: int = 1
    """Number of reward functions."""
    processes: int = 1
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    @classmethod
    def of(
        cls, args: PPOConfig, accelerator: Accelerator, functions: Sequence[Any], model: Any, reference: Any, value: Any
    ) -> Origin:
        """value: what `rlhf.ppo.inputs.value_start` chose."""
        own = {item.name for item in dataclasses.fields(PPOConfig)}  # a recipe's config has further ones
        return cls(
            config={name: value for name, value in to_dict(args).items() if name in own},
            model=_place(model),
            reference=_place(reference),
            value_model=_place(value),
            value_from_policy=value is None,
            functions=len(functions),
            processes=accelerator.num_processes,
        )

    @classmethod
    def read(cls, folder: str | Path) -> Origin:
        """``run.json`` of a saved update. Raises InputError."""
        try:
            return cls(**_read_json(Path(folder) / "run.json"))
        except TypeError as error:
            raise InputError(f"{folder}/run.json: was not written by save_rollouts of this version ({error})") from None

    def args(self, **changes: Any) -> PPOConfig:
        """The settings, with `changes`."""
        return from_dict(PPOConfig, self.config | changes, "run.json: config")

    def differences(self) -> list[str]:
        """What is otherwise here than where the run was, and may round otherwise."""
        here = machine()
        return [
            f"{name} {self.machine.get(name)} then, {here[name]} now"
            for name in here
            if here[name] != self.machine.get(name)
        ]


def machine() -> dict[str, Any]:
    """What decides how sums are rounded: the device, the threads among which torch splits them, the packages."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), **packages}


def _place(source: Any) -> str | None:
    """A model's name that holds in whatever folder the replay is started; None for an object."""
    if not isinstance(source, str | Path):
        return None
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def update_folder(output_dir: str | Path, update: int) -> Path:
    return Path(output_dir) / "rollouts" / f"update-{update}"


def saved_updates(output_dir: str | Path) -> list[int]:
    """Numbers of the saved updates, ascending."""
    names = [path.name.removeprefix("update-") for path in (Path(output_dir) / "rollouts").glob("update-*")]
    return sorted(int(name) for name in names if name.isdigit())


def read_logged(folder: str | Path) -> dict[str, float]:
    """``metrics.json`` of a saved update; what was no number (NaN, infinity) comes back as NaN. Raises InputError."""
    logged = _read_json(Path(folder) / "metrics.json")
    return {name: math.nan if value is None else value for name, value in logged.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {path.parent} the folder of a saved update?") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, got {type(content).__name__}")
    return content


Save = Callable[[ReadyRollout, Mapping[str, float]], None]


@contextmanager
def saving_update(
    folder: Path, accelerator: Accelerator, write_state: Callable[[Path], Any], origin: Origin, tokenizer: Any,
    peft_config: Any = None,
) -> Iterator[Save]:  # fmt: skip
    """Around an update that is to be saved: the state before it is written at once; call what this yields with the
    rollout and the logged numbers after it, on every process. Where the update fails, nothing stays behind."""
    with atomic_folder(folder) if accelerator.is_main_process else nullcontext() as writing:
        if writing is not None:
            (writing / "state").mkdir()
            write_state(writing / "state")
            tokenizer.save_pretrained(str(writing / "tokenizer"))
            write_json_atomic(writing / "run.json", origin)
            if peft_config is not None:
                peft_config.save_pretrained(str(writing))

        def save(rollout: ReadyRollout, logged: Mapping[str, float]) -> None:
            rollouts = gather_object([rollout])  # the main process may be the only one that sees this disk
            if writing is not None:
                for index, item in enumerate(rollouts):
                    save_rollout(writing, item, index)
                finite = {name: value if math.isfinite(value) else None for name, value in logged.items()}
                write_json_atomic(writing / "metrics.json", finite)

        yield save
