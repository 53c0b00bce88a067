"""`rlhf run_evals` on a tiny model: results, a kill in the middle, likelihood, an adapter, a judge, a server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from reference.tiny_chain import save_adapter, save_base

from rlhf import chat, cli
from rlhf.errors import InputError
from rlhf.evals.targets import Local, Server
from rlhf.evals.targets import Prompt as Asked
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.sampling.decode import TransformersEngine

ROWS = [
    {"prompt": f"What is {n} + 1?", "ideal": [str(n + 1)], "choices": [str(n + 1), str(n + 2), "none of them"]}
    for n in range(6)
]


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    return save_base(tmp_path, tiny_model, tiny_tokenizer)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(tmp_path: Path, name: str, *flags: object) -> dict:
    folder = tmp_path / "runs" / name
    common = ["--output_dir", str(folder), "--max_new_tokens", "6", "--bf16", "false", "--generation_batch_size", "4"]
    cli.command(["run_evals", *common, *map(str, flags)])
    return json.loads((folder / "run_evals.json").read_text())


def test_a_file_of_prompts_becomes_numbers_items_and_a_page(tmp_path, base, rows, capsys):
    flags = ["--model", base, "--eval_data", rows, "--eval_class", "Includes"]
    content = run(tmp_path, "one", *flags)
    folder = tmp_path / "runs/one"
    metric = content["metrics"]["sums/accuracy"]
    assert metric["n"] == 6
    assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert [item["where"] for item in items] == [f"{rows}:{n}" for n in range(1, 7)]
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "run_evals.json", "run_evals.html", "items.jsonl", "manifest.json", "inputs.json",
    }  # fmt: skip
    assert (folder / ".eval_results/sums.yaml").is_file()
    assert "6 answers asked for, 0 known before" in capsys.readouterr().out
    run(tmp_path, "one", *flags)
    assert "complete, skipped" in capsys.readouterr().out
    again = run(tmp_path, "two", *flags, "--eval_class", "FuzzyMatch")
    assert "0 answers asked for, 6 known before" in capsys.readouterr().out
    assert "sums/f1_score" in again["metrics"]


def test_greedy_answers_are_the_models_own(base):
    """Against transformers' generate, a row at a time."""
    target = Local(str(base), torch.float32, 4, 1024)
    prompts = [target.prompt([{"role": "user", "content": row["prompt"]}]) for row in ROWS]
    found = target.sample(prompts, [0] * 6, 6, 0.0)
    model, tokenizer = load_policy(base).eval(), load_tokenizer(base)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.ids])
        stops = list(target.engine.stop_ids)
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=stops, attention_mask=ids * 0 + 1)
        assert answer.text == chat.decode_response(tokenizer, whole[0, ids.shape[1] :].tolist(), stops)


def test_an_answer_does_not_depend_on_its_neighbours(base):
    target = Local(str(base), torch.float32, 4, 1024)
    prompts = [target.prompt([{"role": "user", "content": row["prompt"]}]) for row in ROWS]
    together = target.sample(prompts, list(range(6)), 6, 1.0)
    assert [target.sample([p], [n], 6, 1.0)[0] for n, p in enumerate(prompts)] == together


def test_log_probabilities_of_choices(base):
    """Against a plain log-softmax over prompt + answer, its end of turn included."""
    target = Local(str(base), torch.float32, 4, 1024)
    asked, texts = [{"role": "user", "content": "What is 1 + 1?"}], ["2", "three", "none of them"]
    found = target.logprobs(target.prompt(asked), texts)
    model, tokenizer = load_policy(base).eval(), load_tokenizer(base)
    for text, value in zip(texts, found, strict=True):
        before = chat.encode_prompt(tokenizer, asked)
        own = chat.encode_response(tokenizer, text)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + own])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(before) - 1 + n, token]) for n, token in enumerate(own))
        assert abs(value - expected) < 1e-4


def test_likelihood_scoring(tmp_path, base, rows):
    content = run(tmp_path, "likely", "--model", base, "--eval_data", rows, "--scoring", "likelihood")
    assert set(content["metrics"]) == {
        "sums/accuracy", "sums/accuracy_per_byte", "sums/confidence", "sums/calibration_error",
    }  # fmt: skip
    item = json.loads((tmp_path / "runs/likely/items.jsonl").read_text().splitlines()[0])
    assert item["trials"][0]["reply"].startswith("log-probabilities in nats: '1' -")


def test_a_killed_run_goes_on(tmp_path, base, rows, monkeypatch, capsys):
    """The second batch of 4 dies; the same command then asks for 2 answers, and ends as a run that was not killed."""
    flags = ["--model", base, "--eval_data", rows, "--temperature", "1", "--seed", "7"]
    generate, calls = TransformersEngine.generate, []

    def dying(self, *arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "killed", *flags)
    killed = run(tmp_path, "killed", *flags)
    assert calls == [4, 2, 2]
    assert "2 answers asked for, 4 known before" in capsys.readouterr().out
    whole = run(tmp_path, "whole", *flags, "--answers", tmp_path / "other.sqlite")
    assert killed["metrics"] == whole["metrics"]
    lines = [(tmp_path / "runs" / name / "items.jsonl").read_text() for name in ("killed", "whole")]
    assert lines[0] == lines[1]


def test_an_adapter_is_asked_and_compared_with_its_base(tmp_path, base, rows, tiny_tokenizer):
    adapter = save_adapter(tmp_path, base, tiny_tokenizer)
    flags = ["--eval_data", rows, "--eval_class", "FuzzyMatch", "--samples_per_item", "2", "--temperature", "1"]
    before = run(tmp_path, "base", "--model", base, *flags)
    assert set(before["metrics"]) == {"sums/accuracy", "sums/f1_score", "sums/pass@1", "sums/pass@2"}
    other = tmp_path / "runs/base/run_evals.json"
    after = run(tmp_path, "adapter", "--model", adapter, *flags, "--compare", other)
    assert after["comparison"]["with"] == str(other)
    (one,) = after["comparison"]["evals"]
    assert one["difference"]["n"] == 6
    gap = after["metrics"]["sums/accuracy"]["value"] - before["metrics"]["sums/accuracy"]["value"]
    assert abs(after["metrics"]["sums/accuracy_difference"]["value"] - gap) < 1e-12
    answers = [(tmp_path / "runs" / name / "items.jsonl").read_text() for name in ("base", "adapter")]
    assert answers[0] != answers[1]


def test_a_judge_reads_answers(tmp_path, base):
    spec = "prompt: 'Is it good? {input} {completion}'\nchoice_strings: 'YN'\ninput_outputs: {input: completion}\n"
    (tmp_path / "good.spec.yaml").write_text(spec + "choice_scores: {Y: 1, N: 0}\n")
    (tmp_path / "good.jsonl").write_text('{"prompt": "Say hello."}\n{"prompt": "Say no."}\n')
    for kind in ("classify", "cot_classify"):
        text = f"class: ModelBasedClassify\nmodelgraded_spec: good.spec.yaml\neval_type: {kind}\n"
        (tmp_path / "good.yaml").write_text(text)
        flags = ["--model", base, "--eval_data", tmp_path / "good.yaml", "--judge", base, "--judge_tokens", "8"]
        content = run(tmp_path, kind, *flags)
        assert {"good/score", "good/choice_Y", "good/choice_N", "good/invalid"} == set(content["metrics"])
        assert sum(content["metrics"][f"good/{name}"]["value"] for name in ("choice_Y", "choice_N", "invalid")) == 1.0


def test_choices_without_scores_are_neither_right_nor_better(tmp_path, base):
    spec = "prompt: 'Is it good? {input} {completion}'\nchoice_strings: 'YN'\ninput_outputs: {input: completion}\n"
    (tmp_path / "good.spec.yaml").write_text(spec)
    (tmp_path / "good.jsonl").write_text('{"prompt": "Say hello."}\n{"prompt": "Say no."}\n')
    (tmp_path / "good.yaml").write_text(
        "class: ModelBasedClassify\nmodelgraded_spec: good.spec.yaml\neval_type: classify\n"
    )
    flags = ["--model", base, "--eval_data", tmp_path / "good.yaml", "--judge", base, "--judge_tokens", "8"]
    first = run(tmp_path, "first", *flags)
    assert {"good/choice_Y", "good/choice_N", "good/invalid"} == set(first["metrics"])
    assert first["evals"]["good"]["metric"] is None
    again = run(tmp_path, "again", *flags, "--compare", tmp_path / "runs/first/run_evals.json")
    assert again["comparison"]["evals"] == []
    page = (tmp_path / "runs/again/run_evals.html").read_text()
    assert "· partly" in page
    assert "· right" not in page
    assert "· wrong" not in page


def test_what_must_not_be_said_is_not_shown_as_ideal(tmp_path, base):
    (tmp_path / "keep.yaml").write_text("class: Excludes\n")
    (tmp_path / "keep.jsonl").write_text('{"prompt": "What is it?", "forbidden": ["555-0134", "{email}"]}\n')
    run(tmp_path, "kept", "--model", base, "--eval_data", tmp_path / "keep.yaml")
    page = (tmp_path / "runs/kept/run_evals.html").read_text()
    assert "forbidden: 555-0134 | {email}" in page
    assert "ideal: 555" not in page
    (tmp_path / "keep.jsonl").write_text('{"prompt": "What is it?", "forbidden": ["55"]}\n')
    with pytest.raises(InputError, match=r"keep.jsonl:1: forbidden: got '55'; forbid 5 letters"):
        run(tmp_path, "short", "--model", base, "--eval_data", tmp_path / "keep.yaml")


def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, base, rows):
    with pytest.raises(InputError, match="samples_per_item=4 and temperature=0"):
        run(tmp_path, "x", "--model", base, "--eval_data", rows, "--samples_per_item", "4")
    with pytest.raises(InputError, match="nothing to run"):
        run(tmp_path, "x", "--model", base)
    rows.write_text(rows.read_text() + '{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"sums\.jsonl:7: ideal: got None"):
        run(tmp_path, "x", "--model", base, "--eval_data", rows)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 600, "ideal": "a"}) + "\n")
    with pytest.raises(InputError, match=r"none of 1 evals could be run; the first: long: the longest prompt"):
        run(tmp_path, "x", "--model", base, "--eval_data", long)
    assert not (tmp_path / "runs/x").exists()


class Wire(BaseHTTPRequestHandler):
    """OpenAI's HTTP, as far as answers and letters need it."""

    asked: list[dict] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        said = body["messages"][-1]["content"].split()[-1]
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        self._send({"object": "chat.completion", "model": "tiny", "choices": [choice]})

    def _send(self, content: dict) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def test_a_server_is_asked(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wire)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "echo.jsonl").write_text(
            '{"prompt": "Say yes", "ideal": "yes"}\n{"prompt": "Say no", "ideal": "yes"}\n'
        )
        content = run(
            tmp_path, "served", "--model", url, "--eval_data", tmp_path / "echo.jsonl", "--temperature", "0.5"
        )
        assert content["metrics"]["echo/accuracy"]["value"] == 0.5
        assert sorted(body["messages"][0]["content"] for body in Wire.asked) == ["Say no", "Say yes"]
        assert all((body["temperature"], body["max_tokens"], body["model"]) == (0.5, 6, "tiny") for body in Wire.asked)
        assert all(isinstance(body["seed"], int) for body in Wire.asked)
        with pytest.raises(InputError, match="likelihood scoring needs the model's folder"):
            Server(url).logprobs(Asked([], ()), ["a"])
    finally:
        server.shutdown()
        server.server_close()
