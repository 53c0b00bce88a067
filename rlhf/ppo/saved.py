"""A PPO update kept on disk, to be inspected and run again (`save_rollouts`).

::

    <output_dir>/rollouts/update-<N>/     N is the update's "step" in metrics.jsonl
        rollout-<process>.pt    prompts, responses and everything collected on them
        state/                  the trainer before this update: the files of a checkpoint, and as big
        tokenizer/              the tokenizer, which turns the tokens into text
        run.json                the trainer's arguments and the machine it ran on (class Origin)
        adapter_config.json     the LoRA configuration, if one was passed as an object
        metrics.json            the logged metrics of this update

The folder is written under a temporary name and renamed once the update is done, so it is never incomplete.
`recipes/inspect_rollout.py` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from rlhf.rows.jsonl import read_object
from rlhf.rows.records import Prompt
from rlhf.run.checkpoint import atomic_folder, write_json_atomic
from rlhf.run.readable import BROKEN, first_sentence

PER_RESPONSE = ("stopped", "raw_scores", "scores", "used")
PER_TOKEN = (
    "mask", "logprobs", "reference_logprobs", "engine_logprobs", "entropy", "values", "rewards", "advantages",
    "returns", "importance", "step_scores",
)  # fmt: skip


# ---------------------------------------------------------------- the rollout


def save_rollout(folder: str | Path, rollout: ReadyRollout, process_index: int = 0) -> Path:
    """Write ``rollout-<process>.pt``: a dict that ``torch.load(..., weights_only=True)`` reads.

    Values in a prompt's columns that JSON cannot hold become their text; ``load_rollout`` returns all else exactly.
    """
    content = {item.name: getattr(rollout, item.name) for item in dataclasses.fields(rollout)}
    content["prompts"] = json.dumps([asdict(prompt) for prompt in rollout.prompts], default=str)
    path = Path(folder) / f"rollout-{process_index}.pt"
    torch.save(content, path)
    return path


def load_rollout(folder: str | Path, process_index: int | None = None) -> ReadyRollout:
    """Read what ``save_rollout`` wrote: one process's rows, or (None) those of all processes, one after the other.

    Raises InputError if a file is missing or broken.
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
        what = first_sentence(error)
        raise InputError(f"{path}: cut short or no saved rollout ({what}); look at another update") from None
    return rollout


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
    """Join several processes' rollouts into one; minibatch k of the plan joins every process's minibatch k."""
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
    counts = {"update": rollouts[0].update, "staleness": rollouts[0].staleness}
    return ReadyRollout(**lists, **tensors, **counts, own_scores=own, plan=plan)  # type: ignore[arg-type]


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """Stack tensors row by row, padded on the right with 0 (False) to the longest; None if one of them is None."""
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
    """The arguments from which a saved update's trainer can be built again, and the machine it ran on."""

    config: dict[str, Any]
    """The PPOConfig's fields."""
    model: str | None
    """The policy's folder or hub id; null: it was passed as an object."""
    reference: str | None = None
    """The reference's folder or hub id; null: a copy of the policy, or an object. An update doesn't use it."""
    value_model: str | None = None
    """The start of the value model; null: an object, or (`value_from_policy`) the policy with a zero head."""
    value_from_policy: bool = False
    functions: int = 1
    """Number of reward functions."""
    processes: int = 1
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    @classmethod
    def of(
        cls, args: PPOConfig, accelerator: Accelerator, functions: Sequence[Any], model: Any, reference: Any, value: Any
    ) -> Origin:
        """Record a trainer's arguments. value: the choice of `rlhf.ppo.inputs.value_start`."""
        names = {item.name for item in dataclasses.fields(PPOConfig)}  # a recipe's config has further fields
        return cls(
            config={name: value for name, value in to_dict(args).items() if name in names},
            model=_address(model),
            reference=_address(reference),
            value_model=_address(value),
            value_from_policy=value is None,
            functions=len(functions),
            processes=accelerator.num_processes,
        )

    @classmethod
    def read(cls, folder: str | Path) -> Origin:
        """Read ``run.json`` of a saved update. Raises InputError."""
        content = read_object(Path(folder) / "run.json", f"is {folder} the folder of a saved update?")
        try:
            if not isinstance(content.get("config"), dict) or not isinstance(content.get("machine", {}), dict):
                raise TypeError("config and machine must be objects")
            return cls(**content)
        except TypeError as error:
            raise InputError(f"{folder}/run.json: was not written by save_rollouts of this version ({error})") from None

    def args(self, **changes: Any) -> PPOConfig:
        """Return the settings with `changes` applied."""
        return from_dict(PPOConfig, self.config | changes, "run.json: config")

    def differences(self) -> list[str]:
        """List the differences between this machine and the run's that may change rounding."""
        now = machine()
        return [
            f"{name} {self.machine.get(name)} then, {now[name]} now"
            for name in now
            if now[name] != self.machine.get(name)
        ]


def machine() -> dict[str, Any]:
    """Return what decides how sums are rounded: the device, the threads that torch splits them over, the packages."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), **packages}


def _address(source: Any) -> str | None:
    """Return a model's absolute path or hub id, so that a replay may start in any folder; None for an object."""
    if not isinstance(source, str | Path):
        return None
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def update_folder(output_dir: str | Path, update: int) -> Path:
    """Return the folder of a saved update."""
    return Path(output_dir) / "rollouts" / f"update-{update}"


def saved_updates(output_dir: str | Path) -> list[int]:
    """Return the numbers of the saved updates, ascending."""
    names = [path.name.removeprefix("update-") for path in (Path(output_dir) / "rollouts").glob("update-*")]
    return sorted(int(name) for name in names if name.isdigit())


def read_logged(folder: str | Path) -> dict[str, float]:
    """Read ``metrics.json`` of a saved update; null (a NaN or infinity when written) becomes NaN. Raises InputError."""
    logged = read_object(Path(folder) / "metrics.json", f"is {folder} the folder of a saved update?")
    return {name: math.nan if value is None else value for name, value in logged.items()}


Save = Callable[[ReadyRollout, Mapping[str, float]], None]


@contextmanager
def saving_update(
    folder: Path, accelerator: Accelerator, write_state: Callable[[Path], Any], origin: Origin, tokenizer: Any,
    peft_config: Any = None,
) -> Iterator[Save]:  # fmt: skip
    """Save the update that runs inside this context; if it fails, nothing is left on disk.

    The state before the update is written on entry. Yields a function: call it on every process after the update, with
    the rollout and the logged metrics."""
    with atomic_folder(folder) if accelerator.is_main_process else nullcontext() as writing:
        if writing is not None:
            (writing / "state").mkdir()
            write_state(writing / "state")
            tokenizer.save_pretrained(str(writing / "tokenizer"))
            write_json_atomic(writing / "run.json", origin)
            if peft_config is not None:
                peft_config.save_pretrained(str(writing))

        def save(rollout: ReadyRollout, logged: Mapping[str, float]) -> None:
            rollouts = gather_object([rollout])  # only the main process may have access to this disk
            if writing is not None:
                for index, item in enumerate(rollouts):
                    save_rollout(writing, item, index)
                finite = {name: value if math.isfinite(value) else None for name, value in logged.items()}
                write_json_atomic(writing / "metrics.json", finite)

        yield save
