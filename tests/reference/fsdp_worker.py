"""PPO under FSDP2 as accelerate sets it up, on CPU: two gloo processes, one launch, everything that tests ask saved.

torchrun --nproc_per_node 2 tests/reference/fsdp_worker.py CONFIG.yaml FOLDER KIND|killed POLICY REWARD ...

accelerate leaves FSDP out on CPU: `AcceleratorState` looks for it where processes are MULTI_GPU or the like, but not
where they are MULTI_CPU. `sharded_accelerator` does what is done there, so that accelerate's own
`_prepare_fsdp2` cuts the module, under the settings of our own configuration file.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import rlhf.ppo
from reference.two_processes import PROMPTS, GivenResponses, odd_share
from rlhf.errors import RunStopped
from rlhf.models import packing
from rlhf.models.adapters import backbone
from rlhf.padding import Batch, make_batch
from rlhf.ppo.plan import plan_minibatches
from rlhf.ppo.preflight import check_ppo
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.run import distributed as sharding
from rlhf.sampling.vllm_weights import save_weights

SETTINGS: dict[str, Any] = {
    "updates": 2, "rollout_size": 8, "minibatch_size": 8, "inner_epochs": 2, "max_new_tokens": 9, "learning_rate": 0.1,
    "value_learning_rate": 0.3, "adam_epsilon": 0.1, "tokens_per_microbatch": 60, "max_grad_norm": 0.05, "bf16": False,
}  # fmt: skip
"""Adam is damped so that its steps follow the gradients: undamped, its steps are as large for mere rounding."""
LIMITS = (3, 12)  # new tokens that each process samples: one is done long before the other


def launch_environment(config: str, processes: int = 2) -> dict[str, str]:
    """The variables that `accelerate launch --config_file CONFIG` gives its processes."""
    args = launch_command_parser().parse_args(
        ["--config_file", config, "--num_processes", str(processes), "recipes/ppo.py"]
    )
    args, _, _ = _validate_launch_command(args)
    return prepare_multi_gpu_env(args)


def sharded_accelerator(*args: Any, **kwargs: Any) -> Accelerator:
    accelerator = Accelerator(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin()  # reads the FSDP_... variables
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    # As `AcceleratorState.__init__` ends: every later `AcceleratorState()` copies this one over its own.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def shard(config: str) -> None:
    """Let trainers in this process shard their models as `accelerate launch --config_file CONFIG` does on GPUs."""
    environment = launch_environment(config).items()
    os.environ |= {key: value for key, value in environment if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    rlhf.ppo.trainer.Accelerator = transformers.trainer.Accelerator = sharded_accelerator


class StopAfterOne(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
        return control


class KillOne(TrainerCallback):
    """The last process is killed at the end of the second step, as for want of memory; the other waits for it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def make(folder: Path, policy: str, reward: str, engine: Any = None, callbacks: Any = None, **changes: Any):
    config = PPOConfig(**{"output_dir": str(folder)} | SETTINGS | changes)
    return PPOTrainer(
        policy, odd_share, config, PROMPTS[:8], PROMPTS[8:11], value_model=reward, engine=engine, callbacks=callbacks
    )


def fixed_batch() -> Batch:
    """Prompts and responses of several lengths."""
    prompts = [[5 + (7 * i * j) % 300 for j in range(3 + 2 * i)] for i in range(4)]
    responses = [[9 + (11 * i * j + j) % 300 for j in range(1 + 3 * i)] for i in range(4)]
    return make_batch(prompts, responses, 0, "cpu")


def outputs(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = trainer.module(fixed_batch(), 0.7, ("policy", "reference", "value"))
    return {name: value.clone() for name, value in result._asdict().items()}


def sample(trainer: PPOTrainer, process: int) -> list[list[int]]:
    """What this process's engine writes on its own prompts, with as many steps as it likes."""
    prompts = trainer.prompt_ids[process::2]
    with trainer.actor_critic.sampling():
        return trainer.engine.generate(prompts, LIMITS[process], 1.0, torch.Generator().manual_seed(process)).ids


def share(module: torch.nn.Module) -> float:
    """How much of a module's parameters this process holds at this moment."""
    parameters = list(module.parameters())
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return local / sum(p.numel() for p in parameters)


def first_step(trainer: PPOTrainer) -> dict[str, Any]:
    """Of the only step on the first rollout: the clipped gradient that Adam gets, and the norms before."""
    seen: dict[str, Any] = {}

    def watched(*args: Any, **kwargs: Any) -> None:
        gradients = {name: p.grad for name, p in trainer.actor_critic.named_parameters() if p.grad is not None}
        seen.update(sharding.full(gradients))

    rollout = trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))
    trainer.optimizer.step = watched
    trainer.args = dataclasses.replace(trainer.args, inner_epochs=1)
    stats = trainer.update(dataclasses.replace(rollout, plan=rollout.plan[:1]))
    norms = {name: value for name, value in stats.items() if name.endswith("_norm")}
    return {"gradient": seen, "norms": norms, "microbatches": [len(minibatch) for minibatch in rollout.plan]}


def run(trainer: PPOTrainer, resume: bool = False) -> dict[str, Any]:
    """A run to its end: weights, Adam's moments, metrics."""
    metrics = trainer.train(resume_from_checkpoint=resume)
    return {
        "state": trainer.actor_critic.trained_state(),
        "optimizer": sharding.full(trainer.optimizer.state_dict())["state"],
        "metrics": {name: value for name, value in metrics.items() if "second" not in name},
    }


def checks(folder: Path, policy: str, reward: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the processes agree on, and what each has of its own."""
    together, own = {}, {}
    trainer = make(folder / "sampling", policy, reward)
    process, layers = trainer.accelerator.process_index, backbone(trainer.actor_critic.policy).layers
    own["units"] = sorted(type(m).__name__ for m in trainer.actor_critic.modules() if sharding.is_sharded(m))
    own["shares"] = [share(trainer.actor_critic)]
    own["sampled"] = sample(trainer, process)  # before any other forward
    with trainer.actor_critic.sampling():
        own["shares"].append(share(trainer.actor_critic.policy))
    own["shares"].append(share(trainer.actor_critic))
    together["outputs"] = outputs(trainer)
    own["shares"].append(share(layers))
    own["sampled_again"] = sample(trainer, process)
    with trainer.actor_critic.in_parts():  # as on GPUs, where packed rows are chosen once the models are cut
        own["packable"] = [packing.can_pack(part) for part in trainer.actor_critic.parts()]
    own["shares"].append(share(trainer.actor_critic))
    own["preflight"] = [(finding.check, finding.measured) for finding in check_ppo(trainer)]
    lengths = [10 if process else 40] * 4
    plan = plan_minibatches(lengths, 4, 40, torch.Generator().manual_seed(0))
    own["plans"] = plan, sharding.even_plan(plan, trainer.module)
    for name, checkpointing in (("step", False), ("step_checkpointed", True)):
        trainer = make(
            folder / name, policy, reward, GivenResponses(), gradient_checkpointing=checkpointing, inner_epochs=1
        )
        together[name] = first_step(trainer)
    together["run"] = run(make(folder / "run", policy, reward, GivenResponses(), save_steps=1, eval_steps=1))
    trainer = make(folder / "whole", policy, reward, save_steps=1, eval_steps=1)
    together["whole"] = run(trainer)
    trainer.save_model(folder / "saved")
    make(folder / "resumed", policy, reward, save_steps=1, eval_steps=1, callbacks=[StopAfterOne()]).train()
    trainer = make(folder / "resumed", policy, reward, save_steps=1, eval_steps=1)
    outputs(trainer)  # leaves the root's own parameters whole, and what is loaded must not be lost in them
    together["resumed"] = run(trainer, resume=True)
    trainer = make(folder / "bf16", policy, reward, bf16=True)
    together["bf16"] = outputs(trainer)  # leaves the root's own parameters whole, in bf16
    trainer.save_model(folder / "bf16_saved")
    (folder / "bf16_sent").mkdir(exist_ok=True)
    with trainer.actor_critic.in_parts():  # as while a vLLM server samples
        save_weights(trainer.actor_critic.policy, None if process else folder / "bf16_sent")
    if not trainer.actor_critic.policy.config.tie_word_embeddings:
        own["told"] = told(trainer, process)
    return together, own


def told(trainer: PPOTrainer, process: int) -> str:
    """What sampling ends with where one token's embedding is NaN, which only the last process's prompts hold."""
    mine, other = ({token for ids in trainer.prompt_ids[first::2] for token in ids} for first in (1, 0))
    name, embeddings = next(trainer.actor_critic.named_parameters())
    planted = sharding.whole_tensor(embeddings).detach().clone()
    planted[min(mine - other)] = float("nan")
    sharding.load_trained(trainer.actor_critic, {name: planted})
    prompts = trainer.prompt_ids[process::2]
    try:
        trainer.generate(prompts, trainer.draws.sampling(0, len(prompts), "cpu"))
    except RunStopped as error:
        return str(error)
    return ""


def killed(folder: Path, policy: str, reward: str) -> dict[str, Any]:
    """A run that is killed the first time it is launched, and goes on the second time."""
    callbacks = [] if any(folder.glob("checkpoint-*")) else [KillOne()]
    return run(make(folder, policy, reward, save_steps=1, eval_steps=1, callbacks=callbacks), resume=True)


def main(config: str, folder: str, *arguments: str) -> None:
    shard(config)
    if arguments[0] == "killed":
        result = killed(Path(folder), *arguments[1:])
        if distributed.get_rank() == 0:
            torch.save(result, Path(folder, "killed.pt"))
        distributed.destroy_process_group()
        return
    for kind, policy, reward in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        together, own = checks(Path(folder, kind), policy, reward)
        both: list[Any] = [None, None]
        distributed.all_gather_object(both, own)
        if distributed.get_rank() == 0:
            torch.save({**together, "each": both}, Path(folder, f"{kind}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
