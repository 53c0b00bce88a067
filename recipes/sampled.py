"""What an evaluation samples: each policy's responses to the same prompts, their KL to the baseline, and what the
policy had cost. `config` is an EvaluationConfig of `evaluate_policy`, which imports this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import chat
from rlhf.errors import InputError
from rlhf.rows.records import Prompt
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES, Manifest
from rlhf_recipes.stage import check_model

if TYPE_CHECKING:
    import torch

    from rlhf.evaluate import PolicySamples


def load(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a policy and its tokenizer."""
    from rlhf import policies
    from rlhf.models import loading as models

    return policies.load(path, dtype), models.load_tokenizer(path)


def sample(config: Any, prompts: Sequence[Prompt], model: Any, tokenizer: Any, seed: int, n: int = 1) -> PolicySamples:
    """Sample n responses to every prompt."""
    import torch

    from rlhf import evaluate
    from rlhf.policies import SharedEngine
    from rlhf.sampling.engine import model_stop_ids

    stops, rows = model_stop_ids(model, tokenizer), config.generation_batch_size
    engine = SharedEngine(model, stops, chat.pad_id(tokenizer), rows)
    generator = torch.Generator(model.device).manual_seed(seed)
    return evaluate.sample_policy(
        prompts, tokenizer, engine, max_new_tokens=config.max_new_tokens, generator=generator,
        temperature=config.temperature, n=n,
    )  # fmt: skip


def sequence_kl(policy: Any, baseline: Any, samples: PolicySamples, tokenizer: Any, config: Any) -> tuple[float, ...]:
    """Per response of the policy, the summed log-probability difference to the baseline, in nats.

    InputError at temperature 0, where the policy writes one answer with certainty and nearly every other policy never:
    no number says how far apart the two are."""
    if config.temperature == 0:
        raise InputError("temperature=0: greedy answers have no KL; sample, or leave the KL out")
    from rlhf.ppo.plan import split_by_tokens
    from rlhf.run import sharing

    prompt_ids = [chat.encode_prompt(tokenizer, prompt.messages, prompt.columns) for prompt in samples.repeated_prompts]
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, samples.ids, strict=True)]
    kl = [0.0] * len(lengths)
    plan = split_by_tokens(range(len(lengths)), lengths, config.tokens_per_microbatch)
    parts = [([prompt_ids[i] for i in rows], [list(samples.ids[i]) for i in rows]) for rows in plan]
    found = sharing.share(partial(_apart, config.temperature), parts, policy, baseline)
    for row, value in zip(chain(*plan), chain(*found), strict=True):
        kl[row] = value
    return tuple(kl)


def _apart(
    temperature: float, parts: Sequence[tuple[list[list[int]], list[list[int]]]], policy: Any, baseline: Any
) -> list[list[float]]:
    """Per part, which is a micro-batch of prompts and responses, the responses' summed log-probability differences."""
    import torch

    from rlhf.models.forward import response_logprobs
    from rlhf.padding import make_batch

    found = []
    for prompts, responses in parts:
        batch = make_batch(prompts, responses, 0, policy.device)
        with torch.no_grad():
            mine = response_logprobs(policy, batch, temperature)[0]
            base = response_logprobs(baseline, batch, temperature)[0]
        found.append((mine - base).sum(-1).tolist())
    return found


# --- further policies -----------------------------------------------------------------------------------------------


def named(config: Any, run: Path) -> list[str] | None:
    """Return the folders of `policies`, which may be names of the run's stages. Raises InputError where two have one
    name in the table, or one holds no policy."""
    if not config.policies:
        return None
    folders = [str(run / name) if (run / name).is_dir() else name for name in config.policies]
    names = [Path(folder).name for folder in folders]
    if len({*names, "sft", "ppo", "judge", "best_of_n"}) < len(names) + 4:
        raise InputError(f"policies: {', '.join(names)}: name different folders, none of them sft, ppo or judge")
    for folder in folders:
        check_model(folder, POLICIES)
    return folders


def further(config: Any, prompts: Sequence[Prompt], baseline: Any, tokenizer: Any) -> dict[str, PolicySamples]:
    """Sample the further policies as the first one was, by their names in the table, with each one's KL."""
    from rlhf.models.positions import check_responses
    from rlhf.ppo.inputs import same_tokenizer

    found: dict[str, PolicySamples] = {}
    for folder in config.policies or ():
        lm, its = load(folder, compute_dtype(config.bf16))
        encoded = [chat.encode_prompt(its, prompt.messages, prompt.columns) for prompt in prompts]
        check_responses(lm, encoded, config.max_new_tokens)
        samples = sample(config, prompts, lm, its, seed=config.seed + 1)
        if same_tokenizer(tokenizer, its) and config.temperature:
            samples = replace(samples, kl_nats=sequence_kl(lm, baseline, samples, tokenizer, config))
        found[Path(folder).name] = samples
    return found


def add_costs(result: dict[str, Any], config: Any) -> None:
    """Add to the entries of a table with further policies what each cost: the seconds of its stage, and the responses
    that were scored in it. Of a folder that no stage made nothing is known."""
    folders = {Path(folder).name: folder for folder in config.policies or ()}
    for name, folder in ({"ppo": config.policy} | folders).items() if folders else ():
        if not (Path(folder) / "manifest.json").is_file():
            continue
        made = Manifest.read(folder)
        size = made.inputs.get("config", {}).get("rollout_size", 0)  # PPO's: its manifest counts updates
        calls = made.outputs.get("score_calls", made.outputs.get("updates", 0) * size)
        result[name] |= {"train_seconds": round(made.seconds, 1), "score_calls": int(calls)}
