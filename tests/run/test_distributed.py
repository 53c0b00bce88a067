"""PPO with its models sharded over two processes by accelerate's own FSDP2 code, against the same in one process.

For each kind of model, one launch of tests/reference/fsdp_worker.py does all the sharded work; the tests read what it
saved. No GPU: gloo.
"""

from __future__ import annotations

import copy
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from peft import AutoPeftModelForCausalLM, get_peft_model
from reference import forked
from reference import fsdp_worker as worker
from reference.tiny_chain import TARGETS, chain, save_base, save_reward_model, shake
from reference.two_processes import GivenResponses
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from reward_models import RewardModel
from rlhf.errors import InputError
from rlhf.models import packing
from rlhf.models.adapters import lora_config
from rlhf.models.heads import head_weight
from rlhf.models.loading import load_policy
from rlhf.ppo import run as ppo_run
from rlhf.ppo.build import compile_layers
from rlhf.ppo.preflight import check_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.run import distributed as sharding
from rlhf.run import strategy

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs" / "accelerate"
FILES = {"full": "model.safetensors", "tied": "model.safetensors", "lora": "adapter_model.safetensors"}

SECONDS = 120  # a launch takes about 10


def build(folder: Path, kind: str, model, tokenizer) -> tuple[str, str]:
    """Build (policy, reward model) with full weights, with tied embeddings, or as an adapter of a tied base that also
    trains two tokens."""
    folder.mkdir()
    if kind != "full":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    policy = save_base(folder, model, tokenizer)
    if kind == "lora":
        config = lora_config(4, 8.0, target_modules=TARGETS, trainable_tokens=[1, 2])
        adapter = get_peft_model(load_policy(policy), config)
        shake(adapter, 1, only="lora_")
        shake(adapter, 2, only="trainable_tokens")
        policy = folder / "sft"
        adapter.save_pretrained(str(policy))
        tokenizer.save_pretrained(policy)
    return str(policy), str(save_reward_model(folder, policy, tokenizer))


class Ran(dict[str, dict[str, Any]]):
    """By kind, what two sharded processes (`sharded`) and this one process (`alone`) made of the same folders; made
    when a test first asks for the kind."""

    def __init__(self, folder: Path, model, tokenizer):
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.failed: dict[str, str] = {}

    def __missing__(self, kind: str) -> dict[str, Any]:
        if kind not in self.failed:
            folder = self.folder / kind
            policy, reward = build(folder, kind, copy.deepcopy(self.model), self.tokenizer)
            command = [worker.__file__, CONFIGS / "fsdp2.yaml", self.folder, kind, policy, reward]
            self.failed[kind] = "before its end"
            done = forked.shared().together(command, limit=SECONDS)
            self.failed[kind] = f"exit code {done.returncode}; {done.stderr[-3000:]}"
            if done.returncode == 0:
                sharded = torch.load(self.folder / f"{kind}.pt", weights_only=True)
                one = alone(folder / "alone", policy, reward)
                self[kind] = {"sharded": sharded, "alone": one, "folder": folder, "policy": policy, "reward": reward}
                return self[kind]
        pytest.fail(f"the one launch failed: {self.failed[kind]}")


RAN: list[Ran] = []  # of this session


@pytest.fixture
def ran(tmp_path_factory, tiny_model, tiny_tokenizer) -> Ran:
    if not RAN:
        shake(tiny_model, 0, 0.05)
        RAN.append(Ran(tmp_path_factory.mktemp("fsdp"), tiny_model, tiny_tokenizer))
    return RAN[0]


def alone(folder: Path, policy: str, reward: str) -> dict:
    trainer = worker.make(folder, policy, reward)
    results = {"outputs": worker.outputs(trainer), "sampled": [worker.sample(trainer, process) for process in (0, 1)]}
    results["preflight"] = [(finding.check, finding.measured) for finding in check_ppo(trainer)]
    results["step"] = worker.first_step(worker.make(folder, policy, reward, GivenResponses(), inner_epochs=1))
    trainer.save_model(folder / "saved")
    results["start"] = trainer.actor_critic.trained_state()
    results["run"] = worker.run(worker.make(folder, policy, reward, GivenResponses(), eval_steps=1))
    return results


def same(one, other, tolerance: float = 1e-5) -> None:
    """Return whether tensors are equal up to float32 rounding of sums, relative to each tensor's largest entry."""
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        scale = float(other[name].abs().max())
        np.testing.assert_allclose(tensor, other[name], rtol=0, atol=tolerance * scale + 1e-12, err_msg=name)


def same_weights(mine, expected, start) -> None:
    """Within 1e-5 of one process's, though training has moved them much further."""
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=0, atol=1e-5, err_msg=name)
    for model in ("policy", "value"):
        own = [
            name for name in expected if ("value" in name.split(".") or name.startswith("value")) == (model == "value")
        ]
        assert max(float((expected[name] - start[name]).abs().max()) for name in own) > 1e-3, model


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param("full", marks=pytest.mark.long), "lora", pytest.param("tied", marks=pytest.mark.long)]
)


@pytest.mark.slow
@each_kind
def test_each_process_holds_half(ran, kind):
    """True at first and after sampling. The policy is whole while it samples; a forward shards its layers again."""
    layers = 2 if kind == "lora" else 6  # of policy, reference and value model
    for process in ran[kind]["sharded"]["each"]:
        assert process["units"] == ["FSDPActorCritic", *["FSDPLlamaDecoderLayer"] * layers]
        first, sampling, after, forward, asked = process["shares"]
        assert sampling == 1.0
        for half in (first, after, forward, asked):
            assert 0.49 < half < 0.51


@pytest.mark.slow
@each_kind
def test_outputs_are_the_whole_models(ran, kind):
    same(ran[kind]["sharded"]["outputs"], ran[kind]["alone"]["outputs"])
    assert all((values != 0).any() for values in ran[kind]["alone"]["outputs"].values())


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("step", ["step", "step_checkpointed"])
def test_one_steps_gradient_and_norms(ran, kind, step):
    """Clipped by the norm of the whole gradient, and the norm that is logged is that one."""
    mine, expected = ran[kind]["sharded"][step], ran[kind]["alone"]["step"]
    same(mine["gradient"], expected["gradient"], 2e-5)
    for name, norm in expected["norms"].items():
        assert norm > 2 * worker.SETTINGS["max_grad_norm"], "clipping must act"
        np.testing.assert_allclose(mine["norms"][name], norm, rtol=1e-4)
    for value in (False, True):
        parts = [
            g
            for name, g in mine["gradient"].items()
            if (name.startswith("value") or "value" in name.split(".")) == value
        ]
        total = sum(float(g.double().square().sum()) for g in parts) ** 0.5
        np.testing.assert_allclose(total, worker.SETTINGS["max_grad_norm"], rtol=1e-4)


@pytest.mark.slow
@each_kind
def test_a_run_is_the_one_process_run(ran, kind):
    mine, expected = ran[kind]["sharded"]["run"], ran[kind]["alone"]["run"]
    same_weights(mine["state"], expected["state"], ran[kind]["alone"]["start"])
    for name, value in expected["metrics"].items():
        np.testing.assert_allclose(mine["metrics"][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@each_kind
def test_sampling_while_the_other_process_is_done(ran, kind):
    """Process 0 stops after 3 tokens, process 1 after 12; both before the first and after another forward."""
    each = ran[kind]["sharded"]["each"]
    assert [max(map(len, process["sampled"])) for process in each] == list(worker.LIMITS)
    for process, expected in zip(each, ran[kind]["alone"]["sampled"], strict=True):
        assert process["sampled"] == expected
        assert process["sampled_again"] == expected


@pytest.mark.slow
@each_kind
def test_packed_rows_are_found_the_same_once_the_models_are_cut(ran, kind):
    for process in ran[kind]["sharded"]["each"]:
        assert process["packable"] == [True] * (1 if kind == "lora" else 3)


@pytest.mark.slow
@each_kind
def test_preflight_looks_at_the_same(ran, kind):
    """At gradients too, which sharded weights get from a backward only; and it leaves none behind."""
    for process in ran[kind]["sharded"]["each"]:
        found, expected = (dict(findings) for findings in (process["preflight"], ran[kind]["alone"]["preflight"]))
        assert list(found) == list(expected)
        for check in ("gradients", "optimizer", "frozen reference", "step-0 ratio", "stop token"):
            assert found[check] == expected[check]


@pytest.mark.slow
@each_kind
def test_resume_is_exact(ran, kind):
    mine, expected = ran[kind]["sharded"]["resumed"], ran[kind]["sharded"]["whole"]
    assert mine["metrics"] == expected["metrics"]
    for name, tensor in expected["state"].items():
        assert torch.equal(mine["state"][name], tensor), name
    assert mine["optimizer"].keys() == expected["optimizer"].keys()
    for index, moments in expected["optimizer"].items():
        for name, tensor in moments.items():
            assert torch.equal(mine["optimizer"][index][name], tensor), (index, name)


@pytest.mark.slow
@each_kind
def test_one_process_resumes_what_two_sharded_ones_began(ran, kind, tmp_path):
    case = ran[kind]
    trainer = worker.make(tmp_path, case["policy"], case["reward"], GivenResponses(), eval_steps=1)
    ppo_run.load_checkpoint(trainer, case["folder"] / "run" / "checkpoint-1")
    assert trainer.update_index == 1
    same_weights(worker.run(trainer)["state"], case["alone"]["run"]["state"], case["alone"]["start"])


@pytest.mark.slow
def test_one_of_its_processes_is_killed_and_it_goes_on_exactly(ran, tmp_path):
    """By SIGKILL in its second update; then the same command again."""
    case = ran["lora"]
    command = [worker.__file__, CONFIGS / "fsdp2.yaml", tmp_path, "killed", case["policy"], case["reward"]]
    assert forked.shared().together(command, limit=SECONDS).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
    done = forked.shared().together(command, limit=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, expected = torch.load(tmp_path / "killed.pt", weights_only=True), case["sharded"]["whole"]
    assert mine["metrics"] == expected["metrics"]
    for name, tensor in expected["state"].items():
        assert torch.equal(mine["state"][name], tensor), name
    for index, moments in expected["optimizer"].items():
        for name, tensor in moments.items():
            assert torch.equal(mine["optimizer"][index][name], tensor), (index, name)


@pytest.mark.slow
@each_kind
def test_the_saved_model_is_the_policy(ran, kind):
    """The files hold what one process would write, with the trained values; plain transformers or peft load them."""
    case = ran[kind]
    plain, saved = (load_file(case["folder"] / name / FILES[kind]) for name in ("alone/saved", "saved"))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in plain.items()}
    assert any(not torch.equal(saved[name], plain[name]) for name in saved)
    trained = case["sharded"]["whole"]["state"]
    plain_class = AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM
    policy = plain_class.from_pretrained(case["folder"] / "saved")
    own = {f"policy.{name}": tensor for name, tensor in policy.named_parameters() if f"policy.{name}" in trained}
    assert own.keys() == {n for n in trained if n.startswith("policy.") and "value" not in n.split(".")}
    for name, tensor in own.items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.slow
@each_kind
def test_the_saved_model_is_float32_though_it_computes_in_bf16(ran, kind):
    """Saved after a forward, while the root's own parameters are whole, in bf16."""
    case = ran[kind]
    saved, start = load_file(case["folder"] / "bf16_saved" / FILES[kind]), load_file(Path(case["policy"]) / FILES[kind])
    for name, tensor in saved.items():
        assert torch.equal(tensor, start[name]), name


@pytest.mark.slow
@each_kind
def test_a_server_is_sent_what_the_policy_computes_with(ran, kind):
    """In bf16 half of the bytes: FSDP2 rounds each float32 weight so for a forward. Against the same adapter merged."""
    folder = ran[kind]["folder"]
    sent = load_file(folder / "bf16_sent" / "model.safetensors")
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    if kind == "lora":
        plain = AutoPeftModelForCausalLM.from_pretrained(folder / "bf16_saved").merge_and_unload()
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / "bf16_saved", dtype=torch.float32)
    expected = dict(plain.named_parameters(remove_duplicate=False))
    assert sent.keys() == expected.keys()
    for name, tensor in expected.items():
        if kind == "lora":  # the base is rounded before the adapter is added
            torch.testing.assert_close(sent[name].float(), tensor.float(), rtol=0.02, atol=2e-3)
        else:
            assert torch.equal(sent[name], tensor.bfloat16()), name


@pytest.mark.long
@pytest.mark.slow
def test_a_process_says_which_weights_are_not_finite_while_the_other_samples_on(ran):
    """One token's embedding is NaN, which only the second process's prompts hold."""
    told = [process["told"] for process in ran["full"]["sharded"]["each"]]
    assert told[0] == ""
    assert "the policy's weights model.embed_tokens.weight are not finite" in told[1]


@pytest.mark.slow
def test_processes_run_as_many_micro_batches(ran):
    """One has four long responses (a micro-batch each), the other four short ones (one micro-batch)."""
    plans = [process["plans"] for process in ran["full"]["sharded"]["each"]]
    assert [len(before[0]) for before, _ in plans] == [4, 1]
    assert [len(after[0]) for _, after in plans] == [4, 4]
    for before, after in plans:
        assert sorted(row for rows in after[0] for row in rows) == sorted(row for rows in before[0] for row in rows)


def test_cutting_micro_batches():
    assert sharding.cut([[0, 1, 2], [3]], 2) == [[0, 1, 2], [3]]
    assert sharding.cut([[0, 1, 2], [3]], 3) == [[0], [1, 2], [3]]
    assert sharding.cut([[0, 1, 2], [3]], 4) == [[0], [1], [2], [3]]
    with pytest.raises(InputError, match="4 responses on this process, 5 micro-batches"):
        sharding.cut([[0, 1, 2], [3]], 5)


@pytest.mark.slow
@each_kind
def test_bf16_does_not_round_log_probabilities_and_values(ran, kind):
    for name, values in ran[kind]["sharded"]["bf16"].items():
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values, ran[kind]["alone"]["outputs"][name], atol=0.25)
    for name in ("logprobs", "reference_logprobs", "values"):
        values = ran[kind]["sharded"]["bf16"][name]
        assert (values.bfloat16().float() != values).float().mean() > 0.3


# -- the start ---------------------------------------------------------------------------------------------


class CutNow(Exception):
    pass


class MovedTo(TorchDispatchMode):
    """Counts the bytes that are copied from the CPU to a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.size = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type == self.device:
            self.size += out.nbytes
        return out


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("by", ["FSDP2", "DDP"])
def test_no_model_reaches_the_device_before_it_is_cut(tmp_path, monkeypatch, tiny_model, tiny_tokenizer, lora, by):
    """The device's part is played by "meta". Under FSDP2 the models wait on the CPU for `prepare`, with nothing of
    `rlhf.cpu` on them; else they are moved whole, as the same counter sees."""
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=lora)
    scorer = RewardModel.load(str(reward))
    seen: dict[str, Any] = {}

    def prepare(self, models, optimizer):
        seen["devices"] = {p.device.type for p in [*models.parameters(), *models.buffers()]}
        seen["attention"] = {packing.attention_of(part) for part in models.parts()}
        seen["bytes"] = sum(p.nbytes for p in [*models.parameters(), *models.buffers()])
        raise CutNow

    monkeypatch.setattr(Accelerator, "prepare", prepare)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr("rlhf.ppo.preflight.check_logits", lambda *given: None)  # "meta" has no numbers
    monkeypatch.setattr(strategy, "configure", lambda *given: None)
    if by == "FSDP2":
        monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with MovedTo("meta") as moved, pytest.raises(CutNow):
        PPOTrainer(policy, scorer, worker.PPOConfig(output_dir=str(tmp_path / "run"), bf16=False), worker.PROMPTS[:8])
    if by == "FSDP2":
        assert (seen["devices"], seen["attention"], moved.size) == ({"cpu"}, {"sdpa"}, 0)
    else:
        assert seen["devices"] == {"meta"}
        assert moved.size >= seen["bytes"] > 100_000


def test_layers_that_fsdp2_has_given_a_class_of_their_own_are_compiled(monkeypatch, tiny_model):
    layers = list(tiny_model.model.layers)
    layers[0].__class__ = type("FSDPLlamaDecoderLayer", (type(layers[0]),), {})
    models: Any = SimpleNamespace(_no_split_modules=["LlamaDecoderLayer"], modules=tiny_model.modules)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    compile_layers(models)
    assert compiled == layers


# -- configurations ----------------------------------------------------------------------------------------


def test_what_accelerate_reads_from_the_configurations():
    fsdp2 = worker.launch_environment(str(CONFIGS / "fsdp2.yaml"), processes=3)
    expected = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_OFFLOAD_PARAMS": "false",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}  # fmt: skip
    assert {name: fsdp2.get(name) for name in expected} == expected
    assert "ACCELERATE_USE_FSDP" not in worker.launch_environment(str(CONFIGS / "ddp.yaml"))
    assert load_config_from_file(str(CONFIGS / "ddp.yaml")).distributed_type == "MULTI_GPU"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("FSDP_VERSION", "1", "fsdp_version: 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set it to false")],
)
def test_settings_that_cannot_be_right_are_refused(monkeypatch, variable, value, message):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    Accelerator()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.NO)  # as it was, in the end
    for configure in (strategy.configure, partial(strategy.configure_trainer, model=nn.Linear(1, 1))):
        with pytest.raises(InputError, match=message):
            configure(worker.sharded_accelerator())


def test_ppo_under_deepspeed_is_refused(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    with pytest.raises(InputError, match=r"DeepSpeed: .* use DDP or FSDP2"):
        worker.make(tmp_path / "run", str(policy), str(reward))


def test_a_head_that_is_sharded_by_itself_is_refused(monkeypatch, tiny_model):
    """Outside the head's own forward, its weight would be a part of the vocabulary only."""
    monkeypatch.setattr("rlhf.models.heads.DTensor", nn.Parameter)
    with pytest.raises(InputError, match="TRANSFORMER_BASED_WRAP"):
        head_weight(tiny_model)


def test_only_the_first_process_keeps_whole_tensors(monkeypatch):
    tree = {"a": [torch.ones(2)], "step": 3}
    assert torch.equal(sharding.full(tree)["a"][0], torch.ones(2))
    monkeypatch.setattr(sharding, "is_main", lambda: False)
    assert sharding.full(tree) == {"a": [None], "step": 3}


def test_what_fsdp2_shards_adds_its_gradients_up_in_parts(monkeypatch):
    asked: list[nn.Module] = []
    accelerator: Any = SimpleNamespace(no_sync=lambda module: asked.append(module) or nullcontext())
    module = nn.Linear(1, 1)
    for sharded, seen in ((True, []), (False, [module])):
        monkeypatch.setattr(sharding, "is_sharded", lambda module, sharded=sharded: sharded)
        with sharding.no_sync(accelerator, module):
            assert asked == seen


@pytest.mark.parametrize("several", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_what_a_unit_does_after_its_forward_is_put_back(monkeypatch, several):
    """A unit's state as torch keeps it: a list of groups of parameters, and before that one group or None."""

    def state_of(*meshes: str | None) -> Any:
        groups = [SimpleNamespace(post_forward_mesh_info=mesh) for mesh in meshes]
        one = groups[0] if groups else None
        return SimpleNamespace(**({"_fsdp_param_groups": groups} if several else {"_fsdp_param_group": one}))

    class Unit(nn.Module):
        def __init__(self, *meshes: str | None) -> None:
            super().__init__()
            self.state, self.done = state_of(*meshes), list[Any]()

        def _get_fsdp_state(self) -> Any:
            return self.state

        def unshard(self) -> None:
            self.done.append("whole")

        def reshard(self) -> None:
            self.done.append("cut")

        def set_reshard_after_forward(self, setting: bool, recurse: bool) -> None:
            self.done.append(setting)

    monkeypatch.setattr(sharding, "FSDPModule", Unit)
    cut, stays, empty = Unit("mesh"), Unit(None), Unit()
    root = Unit("mesh")
    root.part = nn.Sequential(cut, stays, empty)
    with sharding.whole(root, root.part):
        assert all(unit.done == ["whole", False] for unit in (cut, stays, empty))
    assert [unit.done[2:] for unit in (cut, stays, empty)] == [[True, "cut"], [False, "cut"], [False, "cut"]]
    assert root.done == ["whole", "cut"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel doesn't tell which files are mapped")
@pytest.mark.parametrize("sharded", [True, False])
def test_a_process_that_keeps_a_part_reads_no_more_of_a_checkpoint(tmp_path, monkeypatch, sharded):
    """Else every process of a machine would hold all of it; a file that is mapped is in memory once, or not at all."""
    mapped: list[bool] = []
    torch.save({"trained": {"weight": torch.ones(1000)}, "random": []}, tmp_path / "ppo.pt")
    monkeypatch.setattr(sharding, "is_sharded", lambda module: sharded)
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, process_index=0),
        module=None,
        load_state_dict=lambda state: mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text()),
        loop=SimpleNamespace(load_state=lambda path: None),
    )
    ppo_run.load_checkpoint(trainer, tmp_path)
    assert mapped == [sharded]
