"""PPO under FSDP2 whose responses a vLLM server samples: two gloo processes, one launch for all cases.

torchrun --nproc_per_node 2 tests/reference/vllm_sharded.py CONFIG.yaml FOLDER CASE TRANSPORT URL POLICY ...

Each process compares its log-probabilities with the server's, and looks at its share of the policy's layers while they
are sent and compared. What the first one saves in FOLDER/CASE is the policy whose weights the server was sent last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from reference.fsdp_worker import shard, share
from reference.vllm_over_http import make_trainer
from rlhf.models.adapters import backbone
from rlhf.sampling import vllm_weights
from rlhf.sampling.vllm import VLLMEngine

GATHER = vllm_weights.whole


class Watched(VLLMEngine):
    """An engine that notes, for each tensor that it gathers, how much of all layers this process holds, and how many
    layers are whole in the middle of each that runs."""

    def send_weights(self, *args):
        self.shares, self.running = [], []
        layers = backbone(self.policy).layers

        def gather(tensor):
            found = GATHER(tensor)
            self.shares.append(share(layers))
            return found

        def runs(*_):
            self.running.append(sum(share(layer) > 0.9 for layer in layers))

        hooks = [layer.mlp.register_forward_hook(runs) for layer in layers]
        vllm_weights.whole = gather
        super().send_weights(*args)
        vllm_weights.whole = GATHER
        for hook in hooks:
            hook.remove()
        assert len(self.shares) >= 4 * len(layers)
        assert max(self.shares) < 0.51
        assert len(self.running) >= 2 * len(layers)  # of each of both texts
        assert set(self.running) == {1}


def train(folder: Path, transport: str, url: str, policy: str) -> None:
    trainer = make_trainer(policy, str(folder), Watched(url, transport, folder / "weights"), preflight=True)
    rollouts, collect = [], trainer.collect
    trainer.collect = lambda prompts: rollouts.append(collect(prompts)) or rollouts[-1]
    trainer.train()
    trainer.collect(trainer.next_prompts())
    assert len(rollouts) == 3
    for rollout in rollouts:
        assert len(rollout) == 4
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    assert (rollouts[2].logprobs - rollouts[2].reference_logprobs).abs().max() > 0.01
    trainer.save_model(folder)


def main(config: str, folder: str, *arguments: str) -> None:
    shard(config)
    for case, transport, url, policy in zip(*(arguments[i::4] for i in range(4)), strict=True):
        train(Path(folder, case), transport, url, policy)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
