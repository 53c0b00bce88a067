"""PPO in miniature through the vLLM engine; stand-ins for vLLM and NCCL where trl's client would call them.

    torchrun --nproc_per_node 2 tests/reference/vllm_over_http.py URL POLICY_FOLDER OUTPUT_DIR

trains a policy in two processes with the engine at URL (`fake_vllm.py`) and checks each one's responses.
"""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import requests
import torch

from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sampling.vllm import VLLMEngine

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
PROMPTS = [{"prompt": f"Count to {word}, please" + "!" * (i % 4)} for i, word in enumerate(WORDS)]


class OverHTTP:
    """The two functions of vLLM's by which trl's client sends weights: tensors go as POST /tensor."""

    url = ""

    @staticmethod
    def trainer_init(init_info):
        return SimpleNamespace(group=SimpleNamespace(), **init_info)

    @staticmethod
    def trainer_send_weights(iterator, trainer_args):
        assert trainer_args.group.world_size == 2  # the trainer and one worker
        for _, tensor in iterator:
            buffer = io.BytesIO()
            torch.save(tensor.cpu(), buffer)
            assert requests.post(f"{OverHTTP.url}/tensor", buffer.getvalue(), timeout=20).status_code == 200


STAND_INS = {
    "is_vllm_available": lambda *args, **kwargs: True,
    "get_ip": lambda: "127.0.0.1",
    "NCCLWeightTransferEngine": OverHTTP,
    "NCCLTrainerSendWeightsArgs": SimpleNamespace,
}
"""Names in trl.generation.vllm_client: what it needs of an installed vLLM (none is)."""


def length_share(prompts, completions, completion_ids, **columns):
    return [len(ids) / 10 + ids[0] / 400 for ids in completion_ids]


def make_trainer(policy: str, folder: str, engine: VLLMEngine | None, **changes) -> PPOTrainer:
    """Two updates with steps so large that old weights on the server would show."""
    config = PPOConfig(**{
        "output_dir": folder, "updates": 2, "rollout_size": 8, "minibatch_size": 4, "inner_epochs": 1,
        "max_new_tokens": 10, "learning_rate": 1e-2, "temperature": 0.7, "bf16": False, "missing_eos": "off",
        "preflight": False,
    } | changes)  # fmt: skip
    return PPOTrainer(policy, length_share, config, PROMPTS, engine=engine)


def main(url: str, policy: str, folder: str) -> None:
    trainer = make_trainer(policy, folder, VLLMEngine(url))
    rollouts, collect = [], trainer.collect
    trainer.collect = lambda prompts: rollouts.append(collect(prompts)) or rollouts[-1]
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    for rollout in rollouts:
        assert len(rollout) == 4
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
