"""Micro-batches, padding, the order of rows, recomputation and processes change no gradient and no metric.

Policy and value model (PPO), reward, process and moderation model and SFT, each in full weights and in LoRA. A run's
result is the gradient of every optimizer step, as the optimizer gets it, and every line of metrics.jsonl. Tests of
single functions are elsewhere: `ppo/test_actor_critic.py`, `reward_models/test_scoring.py` and `ppo/test_rollout.py`
(left padding).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import flash, forked, tiny_chain, two_processes
from reference.two_processes import KINDS, STAGES, GivenResponses
from torch.nn.attention import varlen as torchs

from reward_models import RewardTrainer
from rlhf.cpu import attention
from rlhf.models import packing, torch_flash
from rlhf.models.loading import load_tokenizer
from rlhf.ppo import build, rollout
from rlhf.ppo import trainer as ppo_trainer
from rlhf.ppo.plan import plan_minibatches
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sft.trainer import SFTTrainer

ROOT = Path(__file__).resolve().parent.parent
SPLIT = {
    "ppo": "tokens_per_microbatch", "sft": "microbatch_size", "reward_model": "microbatch_size",
    "process_reward": "microbatch_size", "moderation": "microbatch_size",
}  # fmt: skip
LAUNCHERS = ("torchrun", "accelerate")
LONG = pytest.mark.long
EVERY = [
    ("ppo", "full", ()), ("ppo", "lora", LONG), ("ppo", "lora shared_trunk", ()), ("ppo", "full shared_trunk", LONG),
    ("ppo", "lora separate", LONG), ("reward_model", "full", ()), ("reward_model", "lora", LONG), ("sft", "lora", ()),
    ("sft", "full", LONG), ("process_reward", "full", LONG), ("process_reward", "lora", LONG),
    ("moderation", "encoder", ()), ("moderation", "full", LONG), ("moderation", "lora", LONG),
]  # fmt: skip
every_stage_and_kind = pytest.mark.parametrize(
    ("stage", "kind"), [pytest.param(stage, kind, marks=marks) for stage, kind, marks in EVERY]
)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_kind_of_ppo = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=marks) for stage, kind, marks in EVERY if stage == "ppo"]
)


class Runs:
    """A cache of the results of this test session: launches in two processes and plain runs are needed often."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.alone: dict[tuple[str, str], dict] = {}
        self.together: dict[str, dict] = {}

    def plain(self, stage: str, kind: str) -> dict:
        """Run in this process, with all rows in one micro-batch."""
        if (stage, kind) not in self.alone:
            self.alone[stage, kind] = self.run(stage, kind)
        return self.alone[stage, kind]

    def run(self, stage: str, kind: str, **changes) -> dict:
        out = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        changes = two_processes.mode(stage, kind) | changes
        return STAGES[stage](*two_processes.folders(self.folder, kind), str(out), **changes)

    def launched(self, launcher: str, stage: str, kind: str) -> dict:
        """In two processes: forked, with micro-batches of 1; or all runs at once by a real launcher, with 2."""
        wanted, forks = f"{stage}, {kind}", launcher == "forked"
        if wanted not in self.together.get(launcher, {}):
            output = self.folder / f"{launcher}.pt"
            runs = [wanted] if forks else [f"{stage}, {kind}" for stage, kind, _ in EVERY]
            script: list[object] = [two_processes.__file__, self.folder, 1 if forks else 2, output, *runs]
            done = forked.shared().together(script) if forks else self.launch(launcher, script)
            assert done.returncode == 0, done.stderr[-3000:]
            self.together.setdefault(launcher, {}).update(torch.load(output, weights_only=True))
        return self.together[launcher][wanted]

    def launch(self, launcher: str, script: list[object]) -> subprocess.CompletedProcess:
        command = {
            "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                           "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        }[launcher]  # fmt: skip
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                                    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", *command, *map(str, script)],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip


RUNS: list[Runs] = []


@pytest.fixture
def runs(tmp_path_factory, tiny_model, tiny_tokenizer) -> Runs:
    if not RUNS:
        folder = tmp_path_factory.mktemp("invariance")
        for kind in KINDS:
            (folder / kind).mkdir()
            tiny_chain.chain(folder / kind, tiny_model, tiny_tokenizer, kind == "lora")
        tiny_chain.save_encoder(folder / "encoder" / "base", two_processes.ANIMALS)
        for adapter in folder.glob("*/*/adapter_config.json"):  # dropout is random, and not what is asked here
            adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"lora_dropout": 0.0}))
        RUNS.append(Runs(folder))
    return RUNS[0]


def same(one: dict, other: dict, tolerance: float = 1e-5) -> None:
    """Assert equal gradients up to float32 rounding of sums (relative to each tensor's largest entry), equal numbers,
    and PPO's final weights, of which each is as close.

    PPO's steps are large here, so that clipping happens: after the first step, the weights contain its rounding.
    """
    assert len(one["gradients"]) == len(other["gradients"]) > 0
    for step, (mine, theirs) in enumerate(zip(one["gradients"], other["gradients"], strict=True)):
        allowed = 20 * tolerance if "prompts" in one and step > 0 else tolerance
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            largest = float(theirs[name].abs().max())
            worst = float((gradient - theirs[name]).abs().max())
            assert worst <= allowed * largest + 1e-8, f"step {step}, {name}: {worst / largest:.1e} of the largest"
        assert max(float(gradient.abs().max()) for gradient in mine.values()) > 1e-3
    assert [row.keys() for row in one["logs"]] == [row.keys() for row in other["logs"]]
    for mine, theirs in zip(one["logs"], other["logs"], strict=True):
        for name, value in mine.items():
            near_zero = 0.0 if name == "learning_rate" else 3 * tolerance
            assert value == pytest.approx(theirs[name], rel=tolerance, abs=near_zero), (name, mine["step"])
    assert one.keys() == other.keys()
    for name, weights in one.get("weights", {}).items():
        np.testing.assert_allclose(weights, other["weights"][name], rtol=0, atol=tolerance, err_msg=name)
    for name in one.keys() - {"gradients", "logs", "processes", "weights"}:
        np.testing.assert_allclose(numbers(one[name]), numbers(other[name]), rtol=tolerance, err_msg=name)


def numbers(value) -> np.ndarray:
    return np.array(list(value.values()) if isinstance(value, dict) else value, dtype=np.float64)


# -- one process ---------------------------------------------------------------------------------------------


@every_stage_and_kind
@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=LONG)])
def test_micro_batches(runs, stage, kind, rows):
    """One row at a time; two, and one at an epoch's end (11 rows); the plain run has four, and three at the end."""
    changes = {SPLIT[stage]: rows * 30 if stage == "ppo" else rows}
    same(runs.run(stage, kind, **changes), runs.plain(stage, kind))


def test_micro_batches_without_importance_weights(runs):
    """The other runs have an engine that reports the log-probabilities that it sampled with; most engines don't."""
    plain = runs.run("ppo", "full", engine=GivenResponses())
    same(runs.run("ppo", "full", engine=GivenResponses(), tokens_per_microbatch=60), plain)
    assert all("importance_weight" not in row for row in plain["logs"])
    weighted = runs.plain("ppo", "full")
    assert plain["logs"][0]["policy_loss"] != pytest.approx(weighted["logs"][0]["policy_loss"], rel=1e-2)


@pytest.mark.slow
@every_stage_and_kind
def test_gradient_checkpointing(runs, stage, kind):
    same(runs.run(stage, kind, gradient_checkpointing=True), runs.plain(stage, kind))


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        pytest.param(s, k, marks=() if (s, k) == ("sft", "lora") else pytest.mark.slow)
        for s, k, _ in EVERY
        if k != "encoder"
    ],
)
def test_packed_rows(runs, stage, kind, monkeypatch):
    """The plain run's rows are computed as one long row; here each has its padding."""
    packed: list[tuple[int, ...]] = []
    forward = packing.as_one_row
    with monkeypatch.context() as patch:
        patch.setattr(packing, "as_one_row", lambda *given: packed.append(given[1].shape) or forward(*given))
        plain = runs.run(stage, kind)
    assert sum(shape[0] > 2 for shape in packed) >= len(plain["gradients"])
    monkeypatch.setattr(packing, "as_one_row", None)
    same(runs.run(stage, kind, packing="off"), plain)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("sft", "lora"), ("reward_model", "full"), ("ppo", "full"),
        *(pytest.param(s, k, marks=pytest.mark.slow) for s, k in (
            ("sft", "full"), ("reward_model", "lora"), ("process_reward", "full"), ("ppo", "lora"),
            ("ppo", "lora shared_trunk"),
        )),
    ],
)  # fmt: skip
def test_rows_packed_for_torchs_flash_attention(runs, stage, kind, monkeypatch):
    """As on a GPU without flash-attn, with a stand-in for the kernel; against padded rows."""
    packed: list[tuple[int, ...]] = []
    choose = build.prepare

    def kernel(*given, **kwargs):
        packed.append(tuple(given[3].tolist()))
        return flash.varlen_attn(*given, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torchs, "varlen_attn", kernel)
        patch.setattr(torch_flash, "takes", lambda *given: True)
        patch.setattr(packing, "use_flash", lambda model, *given: packing.set_attention(model, packing.VARLEN))
        patch.setattr(attention, "use_short_rows", lambda model: None)
        patch.setattr(build, "prepare", lambda *given: choose(*given[:3], torch.device("cuda")))
        found = runs.run(stage, kind)
    assert sum(len(ends) > 3 for ends in packed) >= len(found["gradients"])
    same(found, runs.run(stage, kind, packing="off"))


@LONG
@every_kind
def test_compiled_layers(runs, kind):
    same(runs.run("ppo", kind, compile=True), runs.plain("ppo", kind), 3e-5)


def widened(batch: dict[str, torch.Tensor], places: int) -> dict[str, torch.Tensor]:
    """Pad a supervised batch further, with real tokens on the padding."""
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    wide = {name: torch.nn.functional.pad(batch[name], (0, places), value=fill[name]) for name in fill if name in batch}
    return batch | wide


def wide_trainer(base: type) -> type:
    class Wide(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            collate = self.data_collator
            self.data_collator = lambda rows: widened(collate(rows), 5 + len(rows))

    return Wide


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize(("stage", "trainer"), [("sft", SFTTrainer), ("reward_model", RewardTrainer)])
def test_more_padding_and_a_tokenizer_that_pads_on_the_left(runs, stage, kind, trainer):
    tokenizer = load_tokenizer(two_processes.folders(runs.folder, kind)[0])
    tokenizer.padding_side = "left"
    wide = runs.run(stage, kind, trainer_class=wide_trainer(trainer), tokenizer=tokenizer, **{SPLIT[stage]: 2})
    same(wide, runs.plain(stage, kind))


@pytest.mark.slow
@every_kind_of_ppo
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_more_padding_of_a_rollout(runs, kind, side, packed, monkeypatch):
    """Every micro-batch is padded further and begins with padding, like an engine's batch, both where the models'
    forward leaves padding out (on CPUs) and where it does not."""
    plain, make_batch = runs.plain("ppo", kind), rollout.make_batch
    if not packed:
        monkeypatch.setattr(packing, "can_pack", lambda model: False)

    def wide(*args):
        batch = make_batch(*args)
        pad = (6, 0) if side == "left" else (0, 6)
        return dataclasses.replace(
            batch,
            input_ids=torch.nn.functional.pad(batch.input_ids, pad, value=7),
            attention_mask=torch.nn.functional.pad(batch.attention_mask, pad, value=False),
            prompt_tokens=batch.prompt_tokens + pad[0],
        )

    monkeypatch.setattr(rollout, "make_batch", wide)
    monkeypatch.setattr(ppo_trainer, "make_batch", wide)
    tokenizer = load_tokenizer(two_processes.folders(runs.folder, kind)[0])
    tokenizer.padding_side = side
    same(runs.run("ppo", kind, tokenizer=tokenizer, tokens_per_microbatch=60), plain)


class Backwards(PPOTrainer):
    def next_prompts(self):
        return super().next_prompts()[::-1]


@every_stage_and_kind
def test_order_of_rows(runs, stage, kind, monkeypatch):
    """One step has all rows, in another order."""
    monkeypatch.setattr("reward_models.head_fit.RIDGES", (1.0,))  # else chosen on the rows that stand in some places
    if stage == "ppo":
        step, other = {"minibatch_size": 8}, {"trainer_class": Backwards, "tokens_per_microbatch": 60}
    else:
        sizes = {"sft": "batch_size", "reward_model": "prompts_per_batch", "process_reward": "solutions_per_batch",
                 "moderation": "texts_per_batch"}  # fmt: skip
        size = sizes[stage]
        step, other = {size: 12, "microbatch_size": 12}, {"order": -1, "microbatch_size": 3}
        step |= {"normalizer_samples": 1000} if stage == "reward_model" else {}
    plain, reordered = runs.run(stage, kind, **step), runs.run(stage, kind, **(step | other))
    if stage == "ppo":
        assert reordered["prompts"] == [prompts[::-1] for prompts in plain["prompts"]]
        reordered["prompts"] = plain["prompts"]
    same(reordered, plain)


# -- two processes -------------------------------------------------------------------------------------------


@every_stage_and_kind
@pytest.mark.parametrize("launcher", ["forked", *(pytest.param(n, marks=LONG) for n in LAUNCHERS)])
def test_two_processes(runs, launcher, stage, kind):
    """All logged numbers are equal, with learning rates, steps, prompts, KL coefficient, running moments and
    normaliser."""
    two, one = runs.launched(launcher, stage, kind), runs.plain(stage, kind)
    assert (two["processes"], one["processes"]) == (2, 1)
    same(two, one)


def test_the_plain_runs_are_what_they_should_be(runs):
    """Steps and learning rates are those by hand, and the runs have clipping, KL and uneven last steps."""
    for stage in ("sft", "reward_model"):
        plain = runs.plain(stage, "full")
        assert plain["steps"] == len(plain["gradients"]) == 2 * 3  # epochs x ceil(11 / 4)
        logs = [row for row in plain["logs"] if "learning_rate" in row]
        assert [row["step"] for row in logs] == [1, 2, 4, 6]
    ppo = runs.plain("ppo", "full")
    assert len(ppo["gradients"]) == 2 * 2 * 2  # updates x inner epochs x minibatches
    np.testing.assert_allclose(ppo["rates"], [[0.1, 0.1]] * 8)
    assert all(0 < row["clip_fraction"] < 1 for row in ppo["logs"])
    weights = [(row["importance_weight"], row["importance_capped"], row["engine_kl_nats"]) for row in ppo["logs"]]
    assert all(0.1 < capped < 0.9 and weight < 2 for weight, capped, _ in weights), weights
    assert abs(ppo["logs"][1]["kl_nats"]) > 0.1
    assert ppo["kl_coef"] != 0.05
    assert ppo["moments"]["count"] == 16


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_minibatches_have_the_same_rows_for_any_number_of_processes(processes):
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    lengths = torch.randint(1, 60, (48,), generator=draw()).tolist()
    alone = plan_minibatches(lengths, 8, 100, draw())
    plans = [plan_minibatches(lengths[p::processes], 8, 100, draw(), p, processes) for p in range(processes)]
    for number, minibatch in enumerate(alone):
        together = [row * processes + p for p, plan in enumerate(plans) for rows in plan[number] for row in rows]
        assert sorted(together) == sorted(row for rows in minibatch for row in rows)
        assert {sum(map(len, plan[number])) for plan in plans} == {8 // processes}
