"""Several processes: numbers combined over all of them, and the handling of models that FSDP2 shards.

A sharded parameter is a DTensor: each process holds a part of it, and the whole exists only while its module runs.
So a forward is a collective: all processes must run the same number of forwards in the same order. The functions for
sharded modules do nothing for other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from rlhf.errors import InputError
from rlhf.run.owner import is_main

T = TypeVar("T")
R = TypeVar("R")

# ---------------------------------------------------------------- numbers over all processes


def total(accelerator: Accelerator, value: float | Tensor) -> float:
    """Sum a value over all processes, in float64."""
    if accelerator.num_processes == 1:
        return float(value)
    tensor = torch.as_tensor(float(value), dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(tensor, "sum"))


def mean_and_variance(accelerator: Accelerator, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and population variance over all processes' real tokens, in float64; return float32 scalars."""
    count = total(accelerator, mask.sum())
    mean = torch.tensor(total(accelerator, torch.where(mask, x, 0.0).double().sum()) / count)
    spread = torch.where(mask, (x.double() - mean).square(), 0.0).sum()
    return mean.float(), torch.tensor(total(accelerator, spread) / count).float()


def shared(accelerator: Accelerator, rows: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """Let each process do `work` on its share of the rows; return the results of all rows, in order, on every process.

    `work` returns one result per row of its share, which may be empty."""
    first, step = accelerator.process_index, accelerator.num_processes
    results: list[Any] = [None] * len(rows)
    for process, part in enumerate(gather_object([work(rows[first::step])])):
        results[process::step] = part
    return results


def joined(accelerator: Accelerator, shares: dict[str, Tensor], largest: Collection[str]) -> dict[str, float]:
    """Combine scalars over all processes in one exchange: the maximum of the names in `largest`, the sum of others."""
    gathered = accelerator.gather(torch.stack([share.float() for share in shares.values()])[None]).cpu()
    maxima, sums = gathered.amax(0).tolist(), gathered.sum(0).tolist()
    return {name: maxima[i] if name in largest else sums[i] for i, name in enumerate(shares)}


def real_rows(accelerator: Accelerator, rows: int) -> int:
    """Count this process's ``rows`` of the current batch that are not repetitions.

    With several processes accelerate fills the last batch of an epoch with rows from its beginning, so that all
    processes have the same number. Trained on, they would count twice, and their number depends on that of processes.
    (accelerate's own `remainder` is not known in an epoch that a resumed run begins in its middle.)
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes == 1 or not state.end_of_dataloader:
        return rows
    real = len(state.active_dataloader.dataset) % (rows * processes)  # of the last batch; 0: all are real
    return min(max(real - accelerator.process_index * rows, 0), rows) if real else rows


# ---------------------------------------------------------------- sharded modules


Tree = TypeVar("Tree")


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 shards a module."""
    return isinstance(module, FSDPModule)


def no_sync(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[None]:
    """Return a context whose backward leaves the gradients with each process, to be added up with the last one's.

    Not for a module that FSDP2 shards: each process would then hold whole gradients, in float32."""
    context: AbstractContextManager[None] = nullcontext() if is_sharded(module) else accelerator.no_sync(module)
    return context


# ---------------------------------------------------------------- whole tensors


def full(tree: Tree) -> Tree:
    """Copy `tree` (dicts, lists) with its tensors on the CPU, and whole where they are sharded; a collective.

    Only the first process keeps the tensors (one copy per machine, not one per GPU); the others get None
    instead. A tensor that occurs twice (tied weights) stays one.
    """
    done: dict[int, Tensor | None] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            done[id(value)] = _full(value)
        return done[id(value)]

    whole: Tree = tree_map(gather, tree)
    return whole


def _full(tensor: Tensor) -> Tensor | None:
    whole = whole_tensor(tensor).detach()
    return whole.cpu() if is_main() else None


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from all processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_is_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether the sum of all entries of some tensors, all sharded or none, is finite, on all processes alike."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    total = torch.stack([tensor.detach().float().sum() for tensor in own]).sum()
    if isinstance(tensors[0], DTensor):
        distributed.all_reduce(total)
    return bool(total.isfinite())


def trained(root: nn.Module) -> dict[str, Tensor]:
    """Return every trained tensor of a module by name, on the CPU; a collective where it is sharded: see `full`."""
    reshard(root)
    return full({name: p for name, p in root.named_parameters() if p.requires_grad})


@torch.no_grad()
def load_trained(root: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into the parameters of these names; every process keeps its part of a sharded one."""
    reshard(root)
    own = dict(root.named_parameters())
    for name, tensor in state.items():
        own[name].copy_(like(tensor, own[name]))


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor if the parameter is sharded, else the tensor. No communication."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, as `full(optimizer.state_dict())` returned it on the first process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: like(value, parameters[index]) if getattr(value, "shape", None) == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


# ---------------------------------------------------------------- modules


def reshard(root: nn.Module) -> None:
    """Shard every parameter that is still whole again, so that `named_parameters` returns the optimizer's tensors.

    FSDP2 keeps the root's own parameters whole after a forward without gradients; a value copied into such a parameter
    would be silently lost at the next step.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(root: nn.Module, part: nn.Module) -> Iterator[None]:
    """Make all parameters of `part` (and the root's own) whole on every process; no communication inside the context.

    So a process whose responses are finished may stop while others still sample. `part`, in the precision of its
    forward, must fit on one device. `root` must have run a forward before (an empty one is enough), else FSDP2 takes
    the first layer that runs for the root.
    """
    if not is_sharded(root):
        yield
        return
    units: list[Any] = [module for module in part.modules() if isinstance(module, FSDPModule)]
    reshards = [_reshards_after_forward(unit) for unit in units]
    for unit in [root, *units]:
        unit.unshard()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit, setting in zip(units, reshards, strict=True):
            unit.set_reshard_after_forward(setting, recurse=False)
        reshard(root)


@contextmanager
def in_parts(root: nn.Module) -> Iterator[None]:
    """Make the root's own parameters whole (embeddings, norm, head), so that a part of it can run forwards inside the
    context, which gather its layers one by one. All processes must run the same forwards. `root` must have run one
    before: see `whole`.
    """
    if not is_sharded(root):
        yield
        return
    unit: Any = root
    unit.unshard()
    try:
        yield
    finally:
        reshard(root)


def _reshards_after_forward(unit: Any) -> bool:
    """Return a unit's setting `reshard_after_forward`; torch has a public way to set it and none to read it.

    A unit of torch 2.11 and older has one group of parameters or None, a newer one a list."""
    state = unit._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


# ---------------------------------------------------------------- the same number of forwards on every process


def even_plan(plan: list[list[list[int]]], root: nn.Module) -> list[list[list[int]]]:
    """Cut micro-batches so that each minibatch has as many of them as on the process with the most.

    The processes' plans differ because their lengths do, and a process with fewer forwards would leave the others
    waiting for ever. Cutting a micro-batch changes no gradient. Does nothing for a module that is not sharded.
    """
    if not is_sharded(root):
        return plan
    counts = torch.tensor([len(minibatch) for minibatch in plan], device=next(root.parameters()).device)
    distributed.all_reduce(counts, distributed.ReduceOp.MAX)
    return [cut(minibatch, count) for minibatch, count in zip(plan, counts.tolist(), strict=True)]


def cut(minibatch: list[list[int]], count: int) -> list[list[int]]:
    """Divide a minibatch's rows into `count` micro-batches by halving the largest one until there are enough.

    Raises InputError if there are fewer rows than that."""
    minibatch, responses = list(minibatch), sum(map(len, minibatch))
    if responses < count:
        raise InputError(
            f"{responses} responses on this process, {count} micro-batches on another; raise tokens_per_microbatch"
        )
    while len(minibatch) < count:
        largest = max(range(len(minibatch)), key=lambda i: len(minibatch[i]))
        rows = minibatch[largest]
        minibatch[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return minibatch
