"""Run forwards on tensors that say they are on a GPU and hold no numbers: a tensor left on the CPU, or one of the wrong
precision, shows without a card. Prints a JSON object: what was run -> "fine", or what went wrong.

    python tests/reference/fake_cuda.py FOLDER      # a folder with base/, sft/ (an adapter) and reward_model/

Under torch's FakeTensorMode a product of tensors on two devices raises. Whole numbers and masks keep their values on
the side (`KnownIntegers`), so that packing runs. What depends on other numbers (sampling, whether a log-probability is
finite) is replaced by what it would say; backward needs a card, and all of it a CUDA build of torch.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15]]
RESPONSES = [[30, 31, 32, 33], [40, 41]]


aten = torch.ops.aten
FREE = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)


class KnownIntegers(FakeTensorMode):
    """A FakeTensorMode in which tensors of whole numbers and masks hold, on the side, their real values (`known`).

    read: what any other number is when it is read off the card, for what only logs it; None: that raises."""

    read: float | None = None

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):  # their count decides the shape
            indices: list[Any] = []
            for index in args[1]:
                parts = index.known.nonzero(as_tuple=True) if _is_mask(index) else [index]
                indices += [self.with_values(part, args[0].device) if _is_mask(index) else part for part in parts]
            return self.dispatch(func, types, (args[0], indices), {})
        real = self.real_result(func, args, kwargs)
        if func is aten._local_scalar_dense.default and (real is not None or self.read is not None):
            return self.read if real is None else real
        if func is aten.nonzero.default and real is not None:
            return self.with_values(real, args[0].device)
        out = super().dispatch(func, types, args, kwargs)
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=False):
            if isinstance(fake, FakeTensor) and _whole(value):
                fake.known = value
        return out

    def real_result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute an operation on the CPU where all of its tensors are known; None where they aren't."""
        flat, spec = tree_flatten((args, kwargs))
        given = [getattr(x, "known", None) if isinstance(x, FakeTensor) else x for x in flat]
        unknown = any(isinstance(x, FakeTensor) and y is None for x, y in zip(flat, given, strict=True))
        if unknown or func in FREE or any(isinstance(x, torch.Generator) for x in flat):
            return None
        given = [torch.device("cpu") if isinstance(x, torch.device) else x for x in given]
        real_args, real_kwargs = tree_unflatten(given, spec)
        return func(*real_args, **real_kwargs)

    def with_values(self, real: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Make a fake tensor that knows these values."""
        with self:
            fake: Any = torch.empty(real.shape, dtype=real.dtype, device=device)
        fake.known = real
        return fake


def _whole(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def _is_mask(index: Any) -> bool:
    return isinstance(index, FakeTensor) and index.dtype == torch.bool and hasattr(index, "known")


@contextmanager
def bfloat16(on: bool) -> Iterator[None]:
    """Switch autocast on for "cuda", which torch.autocast refuses where there is no card."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", on)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def to_cuda(module: nn.Module) -> nn.Module:
    """Replace every parameter and buffer by an empty one on "cuda", of its shape, precision and trainability."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                    moved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


def listed(batch: dict[str, torch.Tensor]) -> list[tuple[str, Any, torch.dtype]]:
    """Return a real batch's tensors as lists, to be made anew on "cuda"."""
    return [(name, tensor.tolist(), tensor.dtype) for name, tensor in batch.items()]


def expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: str = "cuda") -> None:
    assert tensor.device.type == device, f"{name} is on {tensor.device}"
    assert tensor.dtype == dtype, f"{name} is {tensor.dtype}"


# -- what is run -------------------------------------------------------------------------------------------


def actor_critic(folder: Path, kind: str, half: bool) -> Any:
    from rlhf.ppo.build import build_actor_critic

    model = folder / ("base" if kind == "full" else "sft")
    frozen = torch.bfloat16 if half and kind != "full" else torch.float32
    return build_actor_critic(model, value_kind="shared_trunk" if kind == "shared_trunk" else None, dtype=frozen)


def packs(kind: str) -> bool:
    return kind.endswith(("packed", "flash"))


@contextmanager
def attention_of(kind: str, half: bool, *models: Any) -> Iterator[None]:
    """Let the models of a kind with "flash" in its name compute torch's own; a long row in half precision has to come
    to its kernel, and nothing else may."""
    from torch.nn.attention import varlen

    from rlhf.models import packing, torch_flash

    attend, works, calls = varlen.varlen_attn, torch_flash.works, list[Any]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(attend(*args, **kwargs))
        expect("attention", calls[-1], torch.bfloat16)
        return calls[-1]

    for model in models if "flash" in kind else ():
        packing.set_attention(model, packing.VARLEN)
    varlen.varlen_attn, torch_flash.works = watched, lambda *given: True
    try:
        yield
    finally:
        varlen.varlen_attn, torch_flash.works = attend, works
    assert bool(calls) == (half and kind.endswith("flash")), f"{len(calls)} calls of the kernel"


def forward(folder: Path, kind: str, half: bool) -> None:
    """PPO's three roles on a batch."""
    from rlhf.padding import make_batch

    models = actor_critic(folder, kind.partition(",")[0], half)
    models.packs = packs(kind)
    with attention_of(kind, half, *models.parts()), KnownIntegers(allow_non_fake_inputs=False), bfloat16(half):
        batch = make_batch(PROMPTS, RESPONSES, 0, "cuda")
        outputs = to_cuda(models)(batch, 0.7, ("policy", "value", "reference"))
        for name, tensor in outputs._asdict().items():
            expect(name, tensor, torch.float32)


def collect(folder: Path, kind: str, half: bool) -> None:
    """PPOTrainer.collect from the responses on: the columns of a rollout are float32, on the CPU."""
    from rlhf.models.loading import load_tokenizer
    from rlhf.ppo import finite, trainer
    from rlhf.ppo.logged import Clock
    from rlhf.rows.records import Prompt
    from rlhf.sampling.engine import Responses

    models = actor_critic(folder, kind.partition(",")[0], half)
    models.packs = packs(kind)
    finite.broken_number = lambda *given: None  # it looks at numbers
    tokenizer = load_tokenizer(folder / "base")
    one = object.__new__(trainer.PPOTrainer)
    drawn = Responses(RESPONSES, [True, False])
    one.__dict__ |= {
        "processing_class": tokenizer, "clock": Clock(), "device": torch.device("cuda"), "update_index": 0, "pad_id": 0,
        "args": SimpleNamespace(temperature=1.0), "stop_ids": (1,),
        "draws": SimpleNamespace(sampling=lambda *given: None), "generate": lambda *given: drawn,
        "plan": lambda lengths: [[[0, 1]]], "module": models,
        "ahead": SimpleNamespace(responses=lambda ids: (drawn, None)),
    }  # fmt: skip
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ("Hi", "Count to ten")]
    with KnownIntegers(allow_non_fake_inputs=False), torch.no_grad(), bfloat16(half):
        to_cuda(models)
        rollout = one.collect(prompts)
        for name in ("logprobs", "reference_logprobs", "entropy", "values"):
            expect(name, getattr(rollout, name), torch.float32, "cpu")


def losses(folder: Path, kind: str, half: bool) -> None:
    """The two losses on a micro-batch's columns."""
    from rlhf.ppo import math as ppo_math

    with KnownIntegers(allow_non_fake_inputs=False):
        columns = [torch.empty(2, 4, device="cuda") for _ in range(5)]
        mask, count = torch.ones(2, 4, dtype=torch.bool, device="cuda"), torch.tensor(8.0, device="cuda")
        logprobs, old, advantages, values, returns = columns
        for loss, _ in (
            ppo_math.policy_loss(logprobs, old, advantages, mask, 0.2, count),
            ppo_math.value_loss(values, old, returns, mask, 0.2, count),
        ):
            expect("loss", loss, torch.float32)


def sft(folder: Path, kind: str, half: bool) -> None:
    """SFTTrainer's own forward and loss, as trl computes them, on a padded batch."""
    from rlhf import SFTConfig, SFTTrainer

    rows = [{"prompt": "Hi", "completion": "Hello there"}, {"prompt": "Count", "completion": "one"}]
    args = SFTConfig(output_dir=str(folder / "out"), preflight=False, save_steps=0, bf16=False)
    trainer = SFTTrainer(str(folder / ("base" if kind.startswith("full") else "sft")), args, rows)
    lists = listed(trainer.data_collator([trainer.train_dataset[row] for row in range(2)]))
    trainer.model.eval()
    trainer._packs = packs(kind)
    chosen = attention_of(kind, half, trainer.model)
    with chosen, KnownIntegers(allow_non_fake_inputs=False) as mode, bfloat16(half), trainer._trl_forward():
        mode.read = 0.0  # trl logs entropy and accuracy
        to_cuda(trainer.model)
        fake = {name: torch.tensor(rows, dtype=dtype, device="cuda") for name, rows, dtype in lists}
        expect("loss", trainer.compute_loss(trainer.model, fake), torch.float32)


def reward_model(folder: Path, kind: str, half: bool) -> None:
    """RewardTrainer's scores in training, and those that RewardModel gives."""
    from reward_models import RewardConfig, RewardTrainer
    from rlhf.models.scalar import last_token_scores

    rows = [{"prompt": "Hi", "responses": ["Hello", "Go away"], "ranks": [1, 2]}]
    args = RewardConfig(output_dir=str(folder / "out"), preflight=False, save_steps=0, bf16=False)
    trainer = RewardTrainer(str(folder / ("base" if kind.startswith("full") else "sft")), args, train_dataset=rows)
    lists = listed(trainer.data_collator([trainer.train_dataset[0]]))
    trainer._packs = packs(kind)
    with attention_of(kind, half, trainer.model), KnownIntegers(allow_non_fake_inputs=False), bfloat16(half):
        model = to_cuda(trainer.model)
        fake = {name: torch.tensor(rows, dtype=dtype, device="cuda") for name, rows, dtype in lists}
        expect("training scores", trainer.scores(model, fake), torch.float32)
        expect("scores", last_token_scores(model, fake["input_ids"], fake["attention_mask"]), torch.float32)


KINDS = ("full", "adapter", "full, packed", "adapter, packed")
FLASH = ("full, flash", "adapter, flash", "full, flash padded")
CASES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "forward": (forward, ("shared_trunk", *KINDS, *FLASH)),
    "collect": (collect, KINDS),
    "losses": (losses, ("ppo",)),
    "sft": (sft, KINDS + FLASH),
    "reward_model": (reward_model, KINDS + FLASH),
}


def planted(folder: Path) -> str:
    """Return what a head that stayed on the CPU leads to, so that it is seen that the other cases could fail."""
    from rlhf.padding import make_batch

    models = actor_critic(folder, "full", False)
    with KnownIntegers(allow_non_fake_inputs=False):
        to_cuda(models)
        models.policy.lm_head.weight = nn.Parameter(torch.empty(models.policy.lm_head.weight.shape))
        try:
            models(make_batch(PROMPTS, RESPONSES, 0, "cuda"), 1.0, ("policy",))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "it went unnoticed"


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    for name, (run, kinds) in CASES.items():
        for kind in kinds:
            for half in (False, True):
                title = f"{name}, {kind}, {'bfloat16' if half else 'float32'}"
                try:
                    run(folder, kind, half)
                    results[title] = "fine"
                except Exception as error:
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    lines = str(error).splitlines() or [""]
                    results[title] = f"{type(error).__name__}: {lines[0]} ({frame.filename}:{frame.lineno})"
    results["planted"] = planted(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
