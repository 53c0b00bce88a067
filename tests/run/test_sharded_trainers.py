"""SFT and the reward model in two gloo processes against one: by DDP, and cut by accelerate's own FSDP2 code."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from reference import forked
from reference import sharded_trainers as worker
from reference.sharded_trainers import FILES, build
from reference.two_processes import DEMONSTRATIONS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import InputError
from rlhf.run import strategy
from rlhf.sft.trainer import SFTConfig, SFTTrainer

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "accelerate"
STRATEGIES = {"fsdp2": CONFIGS / "fsdp2.yaml", "ddp": "ddp"}
TOLERANCE = 1e-5
IN_CI = {("fsdp2", "lora", "sft"), ("fsdp2", "full", "reward_model")}  # the other cases: make test-long
case = pytest.mark.parametrize(
    ("strategy", "kind", "stage"),
    [
        pytest.param(*each, marks=() if each in IN_CI else pytest.mark.long)
        for each in product(STRATEGIES, FILES, worker.STAGES)
        if each[:2] != ("ddp", "tied")
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MADE: dict[tuple[str, str, str], Any] = {}  # of this session


@pytest.fixture
def made(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return what a strategy (or "alone") made of a kind and stage, and its folder; made when a test first asks."""

    def make(strategy: str, kind: str, stage: str) -> tuple[dict[str, Any], Path]:
        if (strategy, kind, stage) not in MADE:
            folder = tmp_path_factory.mktemp(f"{strategy}-{kind}-{stage}")
            policy = build(folder / "models", kind, copy.deepcopy(tiny_model), tiny_tokenizer)
            if strategy == "alone":
                result: Any = worker.run(stage, policy, folder / stage)
            else:
                command = [worker.__file__, STRATEGIES[strategy], folder / "out.pt", folder, policy, stage]
                done = forked.shared().together(command)
                result = done.stderr[-4000:]
                if done.returncode == 0:
                    result = torch.load(folder / "out.pt", weights_only=True)
            MADE[strategy, kind, stage] = result, folder
        result, folder = MADE[strategy, kind, stage]
        if isinstance(result, str):
            pytest.fail(f"the launch failed: {result}")
        return result, folder

    return make


def require_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest entry, where that is more than 1."""
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        scale = max(1.0, float(tensor.abs().max()))
        np.testing.assert_allclose(one[name], tensor, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.slow
@case
def test_weights_gradients_and_numbers_are_one_processs(made, strategy, kind, stage):
    (mine, folder), (alone, other) = made(strategy, kind, stage), made("alone", kind, stage)
    for step, expected in zip(mine["gradients"], alone["gradients"], strict=True):
        largest = max(float(grad.abs().max()) for grad in expected.values())
        assert largest > 0.01
        require_close(step, expected, TOLERANCE * largest)
    start = load_file(next((other / "models").glob("sft" if kind == "lora" else "base")) / FILES[kind])
    saved, expected = (load_file(place / stage / "whole" / FILES[kind]) for place in (folder, other))
    if "lm_head.weight" in saved.keys() - expected.keys():  # accelerate gathers a tied head once more
        assert kind == "tied"
        assert torch.equal(saved.pop("lm_head.weight"), saved["model.embed_tokens.weight"])
    require_close(saved, expected, TOLERANCE)
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected.keys() & start.keys())
    assert moved > 5 * TOLERANCE, "training must do something"
    for line, alike in zip(mine["logs"][0], alone["logs"][0], strict=True):
        assert line == pytest.approx(alike, rel=1e-4, abs=1e-5)
    assert mine["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-4, abs=1e-5)
    assert mine["preflight"] == alone["preflight"] > 5
    if stage == "reward_model":
        assert mine["normalizers"][0] == pytest.approx(alone["normalizers"][0], rel=1e-4)
        assert mine["normalizers"][0]["count"] == 21
        assert mine["best"] == pytest.approx(alone["best"], rel=1e-4)


@pytest.mark.slow
@case
def test_packed_rows_train_to_the_same_weights(made, strategy, kind, stage):
    """SFT as on GPUs, where attention is told the rows' ends; a reward model by SDPA under a mask where its weights are
    cut, by `short_rows` elsewhere."""
    (mine, folder), other = made(strategy, kind, stage), made("alone", kind, stage)[1]
    assert mine["packed"] >= 4, "of 6 steps, some with rows of one length"
    saved, expected = (
        load_file(place / stage / name / FILES[kind]) for place, name in ((folder, "packed"), (other, "whole"))
    )
    require_close({name: saved[name] for name in expected}, expected, TOLERANCE)


@pytest.mark.slow
@case
def test_killed_and_resumed_it_ends_alike(made, strategy, kind, stage):
    mine, folder = made(strategy, kind, stage)
    whole, resumed = (load_file(folder / stage / name / FILES[kind]) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    lines, after = mine["logs"]
    assert lines[:-1] == after  # the last is of the evaluation after training
    assert mine["normalizers"][:1] == mine["normalizers"][1:]


@pytest.mark.slow
@case
def test_plain_transformers_and_peft_load_the_folder(made, strategy, kind, stage):
    ids = torch.tensor([[5, 9, 13, 17, 21, 8]])
    outputs = []
    for place in (made(strategy, kind, stage)[1], made("alone", kind, stage)[1]):
        folder = place / stage / "whole"
        if kind == "lora":
            plain = AutoPeftModelForCausalLM if stage == "sft" else AutoPeftModelForSequenceClassification
            model = plain.from_pretrained(folder, **({} if stage == "sft" else {"num_labels": 1}))
        else:
            plain = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
            model, info = plain.from_pretrained(folder, output_loading_info=True)
            assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert not type(model).__name__.startswith("FSDP")
        with torch.no_grad():
            outputs.append(model.eval()(ids).logits)
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)


@pytest.mark.slow
@case
def test_each_process_holds_half(made, strategy, kind, stage):
    mine = made(strategy, kind, stage)[0]
    if strategy == "ddp":
        assert mine["units"] == []
        assert mine["share"] == 1.0
        return
    assert "FSDPLlamaDecoderLayer" in mine["units"]
    assert len(mine["units"]) > 2
    assert 0.4 < mine["share"] < 0.6


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def under_fsdp2(monkeypatch):
    """Any accelerator says that it shards."""
    plugin = SimpleNamespace(
        cpu_ram_efficient_loading=False, mixed_precision_policy=None, state_dict_type="StateDictType.FULL_STATE_DICT",
        activation_checkpointing=False, transformer_cls_names_to_wrap=None,
    )  # fmt: skip
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    return plugin


def test_what_cannot_be_sharded_is_refused_in_one_line(tmp_path, tiny_model, tiny_tokenizer, under_fsdp2):
    policy = build(tmp_path / "models", "full", tiny_model, tiny_tokenizer)

    def make(**changes):
        config = SFTConfig(output_dir=str(tmp_path / "out"), batch_size=4, microbatch_size=4, bf16=False, **changes)
        return SFTTrainer(policy, config, DEMONSTRATIONS[:11])

    with pytest.raises(InputError, match=r"adapter that trains embeddings .*; use DDP, or train all weights"):
        make(lora_rank=2)  # its base has no chat template, so ChatML's tokens are trained
    for changes, message in (
        ({"optimizer": "adamw_8bit"}, "optimizer=adamw_8bit: bitsandbytes needs whole tensors"),
        ({"load_in_4bit": True}, "load_in_4bit: FSDP2 leaves weights in 4 bits whole"),
    ):
        with pytest.raises(InputError, match=message):
            strategy.configure(Accelerator(), SimpleNamespace(**{"optimizer": "adamw"} | changes))
    trainer = make()
    assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"]  # else whole gradients on each GPU
    with pytest.raises(InputError, match="evaluate: under FSDP2 the model is cut in train"):
        trainer.evaluate(DEMONSTRATIONS[11:])
    with pytest.raises(InputError, match="made without FSDP2, and this run is;"):
        strategy.check_kind(tmp_path, trainer.accelerator)
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    strategy.check_kind(tmp_path, trainer.accelerator)
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(InputError, match="made under DeepSpeed, and this run is not;"):
        strategy.check_kind(tmp_path, trainer.accelerator)
    under_fsdp2.state_dict_type = "StateDictType.SHARDED_STATE_DICT"
    with pytest.raises(InputError, match="set FULL_STATE_DICT"):
        make()


def test_packed_rows_under_deepspeed_are_refused_in_one_line(tiny_model):
    deepspeed: Any = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=None), distributed_type=DistributedType.DEEPSPEED
    )
    for setting in ("auto", "off"):
        strategy.configure_trainer(deepspeed, tiny_model, config=SimpleNamespace(packing=setting))
    with pytest.raises(InputError, match=r"packing=on: under DeepSpeed rows are padded; leave it out, or use FSDP2"):
        strategy.configure_trainer(deepspeed, tiny_model, config=SimpleNamespace(packing="on"))


def test_what_zero_3_would_lose_is_refused_in_one_line(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    policy = build(tmp_path / "models", "full", tiny_model, tiny_tokenizer)
    plugin = SimpleNamespace(zero_stage=3, zero3_save_16bit_model=False)
    deepspeed: Any = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=DistributedType.DEEPSPEED
    )
    with pytest.raises(InputError, match="zero3_save_16bit_model: a saved folder would lack the model"):
        strategy.configure_trainer(deepspeed, tiny_model)
    plugin.zero3_save_16bit_model = True
    strategy.configure_trainer(deepspeed, tiny_model)
    assert strategy.partitions(deepspeed)
    plugin.zero_stage = 2
    assert not strategy.partitions(deepspeed)
    plugin.zero_stage = 3
    strategy.configure_trainer(deepspeed, tiny_model, keeps_best=False)
    with pytest.raises(InputError, match="keep_best: not under DeepSpeed's ZeRO-3; leave it out, or use ZeRO-2"):
        strategy.configure_trainer(deepspeed, tiny_model, keeps_best=True)
    told: list[bool] = []
    monkeypatch.setattr(strategy, "configure_trainer", lambda *given: told.append(given[2]))
    for keep_best in (True, False):
        worker.make("reward_model", policy, tmp_path / "out", worker.Watch(), keep_best)
    assert told == [True, False]


def test_weights_that_accelerate_leaves_whole_on_cpus_are_told(monkeypatch, caplog, tiny_model):
    accelerator = Accelerator()
    strategy.configure_trainer(accelerator, tiny_model)
    assert not caplog.records
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP2"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            strategy.configure_trainer(accelerator, tiny_model)
            strategy.configure(accelerator)
        told = [record.getMessage() for record in caplog.records if record.name.startswith("rlhf")]
        assert [message.startswith(f"accelerate leaves {name} out here") for message in told] == [True, True]
