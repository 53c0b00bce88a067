"""The weights whose responses a reward model scores highest: how InstructGPT chose its fine-tuned model (Ouyang et al.
2022, section 3.5), since the held-out loss rises long before the responses get worse."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from reward_models.best import KeepBest
from rlhf import chat, evaluate
from rlhf.models import packing
from rlhf.rows.records import Prompt
from rlhf.run import distributed
from rlhf.run.owner import wait_for_all
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import RowGenerator, model_stop_ids, row_seeds

if TYPE_CHECKING:
    from rlhf.scores import RewardFunction
    from rlhf.sft.trainer import SFTTrainer


class BestByScore(KeepBest):
    """A callback that samples responses after every evaluation and keeps the weights of the highest mean score.

    The same seed draws every time, so that two evaluations differ by their weights alone, and a resumed run measures
    what one that was never interrupted did. The score is logged as `eval_score`."""

    def __init__(
        self, trainer: SFTTrainer, scorer: RewardFunction, prompts: Sequence[Prompt], tokens: int, seed: int
    ) -> None:
        super().__init__(trainer.config.output_dir)
        self.trainer, self.scorer, self.prompts, self.tokens, self.seed = trainer, scorer, prompts, tokens, seed

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        score = self.score()
        self.trainer.log({"eval_score": score})
        self.keep(cast(nn.Module, self.trainer.model), state, -score)

    def score(self) -> float:
        """Compute the mean score of one sampled response per prompt.

        The processes share the prompts. Each prompt has a seed of its own: how they are shared changes no response, but
        where transformers' `generate` samples."""
        accelerator = self.trainer.accelerator
        seeds = row_seeds(torch.Generator(accelerator.device).manual_seed(self.seed), len(self.prompts))

        def scores(share: Sequence[tuple[Prompt, int]]) -> Sequence[float]:
            found = self._scores([prompt for prompt, _ in share], [seed for _, seed in share]) if share else ()
            wait_for_all()  # the scorer may take long, and what comes next waits for ten minutes at most
            return found

        return fmean(distributed.shared(accelerator, list(zip(self.prompts, seeds, strict=True)), scores))

    def _scores(self, prompts: Sequence[Prompt], seeds: list[int]) -> Sequence[float]:
        """Sample a response to each prompt, and score it."""
        tokenizer, accelerator = cast(Any, self.trainer.processing_class), self.trainer.accelerator
        with self.trainer.own_forward() as model, accelerator.autocast(), packing.decoding(model):
            was_training = model.training
            model.eval()
            generator = RowGenerator.of(seeds, self.seed, accelerator.device)
            engine = TransformersEngine(cast(Any, model), model_stop_ids(model, tokenizer), chat.pad_id(tokenizer), 64)
            samples = evaluate.sample_policy(
                prompts, tokenizer, engine, max_new_tokens=self.tokens, generator=generator
            )
            model.train(was_training)
        return evaluate.judge_samples(samples, self.scorer)

    def take_best(self) -> dict[str, Any]:
        """Load the best weights into the trainer's model, after measuring those of the last step too; their step and
        score."""
        history, step = self.trainer.state.log_history, self.trainer.state.global_step
        if not any(line["step"] == step and "eval_score" in line for line in history):
            self.trainer.evaluate()
        self.trainer.accelerator.wait_for_everyone()  # the main process may still be writing
        best = self.read()
        assert best is not None
        self.load_into(cast(nn.Module, self.trainer.model))
        self.trainer.remove_callback(self)
        return {"best_step": best.step, "best_score": -best.eval_loss}
