"""configs/customer.yaml: from a file in a shape of its own to an adapter, by the guide's commands."""

from __future__ import annotations

import json

from peft import PeftModel
from reference import recipe, tiny_chain

from rlhf.models.loading import load_policy
from rlhf.run.stages import Manifest


def test_a_file_becomes_an_adapter(tmp_path, tiny_model, tiny_tokenizer):
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    file = tmp_path / "tickets.jsonl"
    tickets = [{"ticket": f"Mend invoice {n}.", "reply": {"text": "yes, we do"}} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in tickets))
    columns = "{prompt: ticket, completion: reply.text}"
    given = ["--config", "customer.yaml", "--output_dir", tmp_path / "run"]
    section = {"model": base, "train_data": file, "columns": columns, "epochs": 1, "max_length": 256}
    checked = recipe.run(
        "preflight", *given, "--stage", "sft", *(w for k, v in section.items() for w in (f"--sft.{k}", v))
    )
    assert (checked.code, checked.err) == (0, ""), checked.out
    given[-1] = tmp_path / "run" / "sft"
    flags = [word for key, value in section.items() for word in (f"--{key}", value)]
    result = recipe.run("sft", *given, *flags, "--best_by", scorer, "--best_by_tokens", 4)
    assert (result.code, result.err) == (0, ""), result.out
    # a tenth of the prompts is set aside to choose by
    assert Manifest.read(tmp_path / "run" / "sft").outputs["demonstrations"] == 18
    policy = load_policy(tmp_path / "run" / "sft")
    assert isinstance(policy, PeftModel)
    assert policy.peft_config["default"].r == 16
