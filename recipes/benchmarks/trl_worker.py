"""Run trl's PPOTrainer for some updates of a case: seconds by phase and peak memory.

Started by the benchmark, on a job file, with trl 1.12 before the installed trl on the path. train() is one method,
so its phases are taken from outside, by clocks around two functions that it calls:

* generate: `batch_generation` (with the [B, T, V] scores that it keeps);
* score: `get_reward` of the reward model;
* logprobs: the rest between the end of generation and the end of scoring: the policy's log-probs from those scores,
  the reference's forward, the values;
* update: from there to the end of the step: advantages and the inner epochs.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from cases import SPEED_SETTINGS, Case, trl_names  # noqa: E402
from datasets import Dataset  # noqa: E402
from jobs import Job, Result, memory, resident_bytes, serve, wait_for_turn  # noqa: E402
from peft import LoraConfig  # noqa: E402
from synthetic import make_prompts  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from rlhf.chat import encode_prompt  # noqa: E402

VERSION = "1.12.0"


class PhaseClock(TrainerCallback):
    """Record the seconds of every update, by phase."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._marks: dict[str, float] = {}

    def watch(self, module: Any) -> None:
        """Put clocks around the functions that train() calls by their names in its module."""
        module.batch_generation = self._timed(module.batch_generation, "generate", lambda *_: True)
        module.get_reward = self._timed(module.get_reward, "score", lambda model, *_: model is self.reward_model)

    def _timed(self, function: Callable[..., Any], name: str, counts: Callable[..., bool]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = _now()
            result = function(*args, **kwargs)
            if counts(*args):
                ended = _now()
                self._marks[name] = self._marks.get(name, 0.0) + ended - began
                self._marks[f"{name}_ended"] = ended
            return result

        return timed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended, marks = _now(), self._marks
        self.updates.append(
            {
                "generate": marks["generate"],
                "score": marks["score"],
                "logprobs": marks["score_ended"] - marks["generate_ended"] - marks["score"],
                "update": ended - marks["score_ended"],
                "step": ended - self._began,
            }
        )
        wait_for_turn()
        self._began, self._marks = _now(), {}


def work(job: Job) -> Result:
    """Compute `updates` updates; return each one's seconds by phase."""
    import trl
    from trl.experimental.ppo import ppo_trainer

    here = time.perf_counter()
    assert trl.__version__ == VERSION, f"trl {trl.__version__} was found before {VERSION}"
    transformers.logging.set_verbosity_error()
    imported = resident_bytes()
    case, settings = Case.of_job(job["case"]), job["settings"]
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    prompts = make_prompts(tokenizer, case.prompt_lengths)
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in prompts]
    clock = PhaseClock()
    models = load_models(job["model"], settings)
    clock.reward_model = models["reward_model"]
    clock.watch(ppo_trainer)
    args = ppo_trainer.PPOConfig(
        output_dir=job["folder"],
        num_mini_batches=case.minibatches,
        total_episodes=case.rollout_size * job["updates"],
        per_device_train_batch_size=case.rollout_size,  # cut into minibatches, one optimizer step each
        **fixed_arguments(),
        **trl_names({**SPEED_SETTINGS, "max_new_tokens": case.new_tokens, "inner_epochs": case.inner_epochs}),
    )
    trainer = ppo_trainer.PPOTrainer(
        args, tokenizer, train_dataset=Dataset.from_dict({"input_ids": ids}), callbacks=[clock], **models
    )
    precision = "bf16" if settings["autocast"] else "no"
    assert trainer.accelerator.mixed_precision == precision, f"{trainer.accelerator.mixed_precision}, not {precision}"
    start = {"imports": here - BEGAN, "trainer": time.perf_counter() - here}
    trainer.train()
    start |= {"first_step": clock.updates[0]["step"]}
    tokens = [case.rollout_size * case.new_tokens] * job["updates"]
    return {"updates": clock.updates, "response_tokens": tokens, "imported_bytes": imported, "start": start, **memory()}


def load_models(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return policy, reward and value model (full, with random heads), and the LoRA configuration or the reference."""
    frozen = getattr(torch, settings["frozen_dtype"])

    def scalar(dtype: torch.dtype, seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype)

    policy_dtype = frozen if settings["lora_rank"] else torch.float32
    lora = LoraConfig(
        r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    ) if settings["lora_rank"] else None  # fmt: skip
    return {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=policy_dtype),
        "ref_model": None,  # a copy of the policy, or the policy with its adapter off
        "reward_model": scalar(frozen, 1),
        "value_model": scalar(torch.float32, 1),
        "peft_config": lora,
    }


def fixed_arguments() -> dict[str, Any]:
    """Return trl's arguments that every run shares: nothing is saved, sampled for show or reported."""
    return {
        "gradient_accumulation_steps": 1, "num_sample_generations": 0, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "logging_steps": 10**9, "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # autocast comes from accelerate's environment variable: the trainer hands it nothing else
    }  # fmt: skip


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    serve(work)
