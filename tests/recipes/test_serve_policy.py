"""`rlhf serve_policy` as a process: up, answering, an orderly end; mistakes in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import recipe
from reference.policy_server import wait_for
from reference.tiny_chain import save_adapter, save_base

from rlhf.client import Client
from rlhf.collection.store import Store

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def started(*flags: object) -> Iterator[tuple[str, subprocess.Popen]]:
    command = [sys.executable, "recipes/serve_policy.py", "--port", "0", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert " on http://" in line, line + process.stderr.read()
        url = line.split(" on ")[1].split(",")[0]
        wait_for(lambda: is_up(url), 30)
        yield url, process
    finally:
        process.kill()
        process.communicate()


def is_up(url: str) -> bool:
    with contextlib.suppress(Exception):
        return Client(url, retries=0).caller.ask("/health", None, 9999).status == 200
    return False


@pytest.mark.long
def test_a_run_is_served_until_sigterm(tmp_path, tiny_model, tiny_tokenizer):
    save_adapter(tmp_path, save_base(tmp_path, tiny_model, tiny_tokenizer), tiny_tokenizer)
    (tmp_path / "token").write_text("s3cret\n")
    flags = ("--run", tmp_path, "--token_file", tmp_path / "token", "--store", tmp_path / "s.db", "--log")
    with started(*flags, "--output_dir", tmp_path / "out", "--bf16", "false") as (url, process):
        client = Client(url, "s3cret", model="sft")
        assert client.models() == ["base", "sft"]
        asked = [{"role": "user", "content": "a secretive question"}]
        text = client.chat(asked, seed=1, max_tokens=8)[0].text
        assert "".join(client.stream(asked, seed=1, max_tokens=8)) == text
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ended; 2 requests were answered" in out
    assert err == ""
    assert "secretive" not in out
    assert "s3cret" not in out
    assert json.loads((tmp_path / "out" / "serve_policy.json").read_text())["metrics"]["requests"]["value"] == 2
    with Store(tmp_path / "s.db") as store:
        logged = store.conversations(usable=False)
    assert [(kept.policy, kept.seed) for kept in logged] == [("sft", 1)] * 2


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_SERVER_TOKEN", raising=False)
    for flags, line in [
        ((), "run, model, policies or upstream: none is given; name one of them"),
        (("--run", "x", "--model", "y"), "run and model are given; name one of them"),
        (("--run", tmp_path), "no complete base, sft or ppo stage in it"),
        (("--model", tmp_path / "none"), "no such model folder"),
        (("--model", "x", "--host", "0.0.0.0"), "open to other machines, and there is no token"),
        (("--model", "x", "--log"), "name the --store in which conversations are kept"),
        (("--model", "x", "--compare_share", "2"), "compare_share=2.0 must be a share from 0 to 1"),
        (("--upstream", "ftp://x"), "write http://host:port"),
        (("--model", "x", "--scrub", "nothing.py:f"), "nothing.py"),
        (("--modle", "x"), "did you mean --model?"),
    ]:
        result = recipe.run("serve_policy", *flags, "--port", 0)
        assert result.code == 2, (flags, result.out)
        assert line in result.err, (flags, result.err)
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("written", ["{a: x, b: y}", '{"a": "x", "b": "y"}'])
def test_policies_by_name(written):
    from rlhf import config as configs

    found = configs.load(recipe.load("serve_policy").ServePolicyRecipe, ["--policies", written])
    assert found.policies == {"a": "x", "b": "y"}
