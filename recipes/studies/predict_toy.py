"""Predict a toy base model of ten times the compute from five smaller ones, then train it and compare.

    python recipes/studies/predict_toy.py --output_dir runs/predict_toy

Both quantities of the GPT-4 report's section 3: the loss on held-out documents (nats per character) and the mean log
pass rate of held-out prompts, where an answer passes with a gold score of 6 or more. Compute is 6 x parameters outside
the embeddings x tokens. Predictions are registered before the large model is trained; run it again to go on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import import_function
from rlhf.errors import InputError
from rlhf.evals import prediction as laws
from rlhf.run.checkpoint import write_json_atomic
from rlhf_recipes.studies import measured
from rlhf_recipes.studies.measured import Table

TOY = "data/toy/"
DOCUMENTS = 60_000
HELD_OUT = 1_000
SAMPLES = 20
PASSES = 6.0
QUANTITIES: tuple[laws.Quantity, ...] = ("loss", "mean_log_pass_rate")


@dataclass(frozen=True)
class Size:
    """A model's shape and the share of the documents that it is trained on."""

    hidden: int
    layers: int
    share: float


SMALL = (Size(32, 2, 0.06), Size(48, 2, 0.10), Size(64, 3, 0.14), Size(80, 3, 0.20), Size(96, 4, 0.28))
LARGE = Size(192, 4, 0.70)


def train(size: Size, data: Path, folder: Path, seed: int) -> dict[str, float]:
    """Train one size, unless it is there, and return its compute, loss and mean log pass rate."""
    done = folder / "measured.json"
    if done.exists():
        found: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
        return found
    rows = (data / "pretraining.jsonl").read_bytes().splitlines(keepends=True)
    training, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pretraining.jsonl").write_bytes(b"".join(training[: int(size.share * len(training))]))
    report = import_function(f"{TOY}toy_base.py:pretrain")(
        folder, folder, seed=seed, hidden_size=size.hidden, layers=size.layers
    )
    from rlhf.models.loading import load_policy, load_tokenizer

    model, tokenizer = load_policy(folder).eval(), load_tokenizer(folder)
    embedded = model.get_input_embeddings().weight.numel()
    measured = {
        "compute": 6.0 * (report["parameters"] - embedded) * report["tokens"],
        "loss": held_out_loss(model, tokenizer, [json.loads(row) for row in held_out]),
        "mean_log_pass_rate": pass_rate(model, tokenizer, data, seed),
        "seconds": report["seconds"],
    }
    write_json_atomic(done, measured)
    return measured


def held_out_loss(model: Any, tokenizer: Any, documents: Sequence[dict[str, Any]]) -> float:
    """Return nats per character of what the documents' authors and assistants write: sizes may differ in vocabulary."""
    import torch

    encode = import_function(f"{TOY}toy_base.py:encode_document")
    nats, characters = 0.0, 0
    for document in documents:
        ids, learnt = encode(tokenizer, document)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        own = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        nats -= float(own[torch.tensor(learnt[1:])].sum())
        turns = [turn["content"] for turn in document.get("messages", ()) if turn["role"] == "assistant"]
        characters += sum(map(len, turns or [document.get("text", "")]))
    return nats / characters


def pass_rate(model: Any, tokenizer: Any, data: Path, seed: int) -> float:
    """Return the mean log pass rate over the held-out prompts, from `SAMPLES` answers to each."""
    import torch

    from rlhf import evaluate
    from rlhf.chat import pad_id
    from rlhf.rows.records import read_prompts
    from rlhf.sampling.decode import TransformersEngine
    from rlhf.sampling.engine import model_stop_ids

    prompts = read_prompts(data / "eval_prompts.jsonl")[:200]
    engine = TransformersEngine(model, model_stop_ids(model, tokenizer), pad_id(tokenizer), 256)
    generator = torch.Generator().manual_seed(seed)
    samples = evaluate.sample_policy(prompts, tokenizer, engine, max_new_tokens=48, generator=generator, n=SAMPLES)
    scores = samples.by_prompt(evaluate.judge_samples(samples, import_function(f"{TOY}toy_gold.py:gold")))
    return laws.mean_log_pass_rate([int(count) for count in (scores >= PASSES).sum(axis=1)], SAMPLES)


def compute_of(size: Size, like: Size, measured: dict[str, float]) -> float:
    """Return the compute of a size before it is trained, from a measured one: parameters of a layer grow with the
    hidden size squared, tokens with the share."""
    ratio = (size.hidden / like.hidden) ** 2 * (size.layers / like.layers) * (size.share / like.share)
    return measured["compute"] * ratio


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--output_dir", default="runs/predict_toy")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    home = Path(given.output_dir)
    run = home / f"seed-{given.seed}"  # nothing of another seed is taken for this one's
    data = run / "data"
    if not (data / "eval_prompts.jsonl").exists():
        import_function(f"{TOY}toy_world.py:make")(data, seed=given.seed, pretraining_documents=DOCUMENTS)
    small = [train(size, data, run / f"size_{size.hidden}x{size.layers}", given.seed) for size in SMALL]
    for size, found in zip(SMALL, small, strict=True):
        print(size, found, flush=True)
    compute = [found["compute"] for found in small]
    at = compute_of(LARGE, SMALL[-1], small[-1])
    for quantity in QUANTITIES:
        file = run / f"predicted_{quantity}.json"
        if file.exists():
            continue
        try:
            made = laws.prediction(quantity, compute, [found[quantity] for found in small], at, given.seed)
        except InputError as error:  # say, no small model ever passes: the other quantity is still predicted
            print(error, flush=True)
            continue
        print(made.sentence, laws.register(file, made), flush=True)
    large = train(LARGE, data, run / f"size_{LARGE.hidden}x{LARGE.layers}", given.seed)
    print(LARGE, large, f"predicted at {at:.3g}", flush=True)
    files = {quantity: run / f"predicted_{quantity}.json" for quantity in QUANTITIES}
    compared = {name: laws.compare(file, large[name]) for name, file in files.items() if file.exists()}
    for quantity, one in compared.items():
        where = "inside" if one.inside else "OUTSIDE"
        print(f"{quantity}: {one.observed:.4g} is {where} {one.value:.4g} [{one.low:.4g}, {one.high:.4g}]")
    write_json_atomic(home / "compared.json", {"small": small, "large": large, **compared})
    measured.keep(home, {"seed": given.seed}, tables(small, large, compared))


def tables(
    small: Sequence[Mapping[str, float]], large: Mapping[str, float], compared: Mapping[str, Any]
) -> list[Table]:
    """Make the table of all sizes, and that of what was predicted beside what came."""
    sizes = [
        [f"{size.hidden} x {size.layers}", *(f"{found[name]:.3g}" for name in ("compute", *QUANTITIES))]
        for size, found in zip((*SMALL, LARGE), (*small, large), strict=True)
    ]
    rows = [
        [name.replace("_", " "), f"{one.value:.3g}", f"[{one.low:.3g}, {one.high:.3g}]", f"{one.observed:.3g}",
         "yes" if one.inside else "no"]
        for name, one in compared.items()
    ]  # fmt: skip
    head = ["", "predicted", "95%", "came", "inside"]
    return [
        (
            "Models of the toy world: hidden size x layers",
            ["", "FLOPs", "loss, nats per character", "mean log pass rate"],
            sizes,
        ),
        ("The last size, predicted from the others before it was trained", head, rows),
    ]


if __name__ == "__main__":
    main()
