"""What errors, log lines and the console show of texts that others wrote, and of secrets."""

from __future__ import annotations

import errno
import io
import logging
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference import recipe

from rlhf import errors
from rlhf.errors import InputError, RunStopped, hidden, short, visible
from rlhf.run import console, lock
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.stages import Manifest
from rlhf.urls import http_address, require_no_secret

HOSTILE = "a\x1b]0;title\x07b\x1b[2J\rc\x9bd\x7f\u202ee\u2066\ud800"
SHOWN = r"a\x1b]0;title\x07b\x1b[2J\rc\x9bd\x7f\u202ee\u2066\ud800"


def test_control_characters_are_shown_escaped():
    assert visible(HOSTILE) == SHOWN
    assert visible(visible(HOSTILE)) == SHOWN
    for text in ("tab\t and\nline", "naïve 你好 नमस्ते שלום \U0001f469\u200d\U0001f680 \u00a0", ""):
        assert visible(text) == text
    for kind in (InputError, RunStopped):
        error = kind(f"row 1: {HOSTILE}")
        assert str(error) == f"row 1: {SHOWN}"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert short(HOSTILE, 200) == SHOWN.replace(r"\r", " ")
    assert short("\x1b" * 100, 20) == r"\x1b\x1b\x1b\x1b\..."


def test_of_a_text_of_megabytes_only_the_beginning_is_looked_at():
    before = time.process_time()
    for text in (" " * 15_000_000, "\n" * 15_000_000, "a " * 7_500_000):
        assert len(short(text, 60)) <= 60
    assert time.process_time() - before < 1


def test_what_a_recipe_prints(monkeypatch, capsys):
    def fails(argv):
        raise InputError(f"{HOSTILE}: http://me:pw@h:1/x?api_key=pw is wrong")

    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit, match="2"):
        errors.run(fails)
    assert capsys.readouterr().err == f"error: {SHOWN}: http://***@h:1/x?api_key=*** is wrong\n"


@pytest.mark.parametrize("way", ["file/run", "read-only/run", "read-only/run/a.json"])
def test_a_folder_that_nothing_can_be_written_to_is_told_in_one_line(monkeypatch, capsys, tmp_path, way):
    (tmp_path / "file").touch()
    made = Path.mkdir

    def refuses(path, *given, **named):  # a superuser may write everywhere
        if path.name == "run" and path.parent.name == "read-only":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        made(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refuses)
    write = write_json_atomic if way.endswith("json") else lambda path, _: lock.hold(path)
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit, match="2"):
        errors.run(lambda argv: write(tmp_path / way, {}))
    seen = (
        f"{tmp_path}/file/run: Not a directory" if way == "file/run" else f"{tmp_path}/read-only/run: Permission denied"
    )
    assert capsys.readouterr().err == f"error: {seen}; check the path and its permissions\n"


@pytest.mark.parametrize(("rank", "terminal", "start"), [("0", True, ""), ("1", False, ""), ("1", True, "\n")])
def test_another_processs_line_begins_below_the_bar_of_the_first(monkeypatch, capsys, rank, terminal, start):
    def fails(argv):
        raise InputError("a b")

    monkeypatch.setattr(sys, "argv", ["recipe"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(SystemExit, match="2"):
        errors.run(fails)
    assert capsys.readouterr().err == f"{start}error: a b\n"


def test_a_file_that_torch_may_not_write_is_one_line(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit, match="2"):
        errors.run(lambda argv: torch.save({}, tmp_path))
    line = "error: a file cannot be written: Is a directory; check output_dir and its permissions\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("processes", "text", "explained"),
    [
        ("2", "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9", True),
        ("2", "NCCL error: remote process exited or there was a network error", True),
        ("2", "shape mismatch", False),
        ("1", "Connection reset by peer", False),
    ],
)
def test_a_process_whose_neighbour_is_gone_says_so_in_one_line(monkeypatch, capsys, processes, text, explained):
    def fails(argv):
        raise RuntimeError(text)

    monkeypatch.setattr(sys, "argv", ["recipe"])
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit if explained else RuntimeError):
        errors.run(fails)
    line = "stopped: another process of this run has ended; its own line says why\n"
    assert capsys.readouterr().err == (line if explained else "")


@pytest.mark.parametrize(("local_rank", "told"), [(None, True), ("0", True), ("1", False)])
def test_an_interrupt_is_told_once_on_a_machine(monkeypatch, capsys, local_rank, told):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["recipe"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit, match="130"):
        errors.run(interrupted)
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n" * told


ABORTS = """
import atexit, os, sys, types
from rlhf import errors
class Library:  # gloo, whose threads abort when the interpreter takes it down
    def __del__(self, abort=os.abort):
        abort()
held = Library()
sys.modules["torch.distributed"] = types.SimpleNamespace(
    is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: {world}
)
atexit.register(print, "put in order")
def main(argv):
    raise {error}
errors.run(main)
"""
WRITES = """
import sys, threading, time
def later():
    time.sleep(0.5)
    print("by a thread", file=open("thread", "w"))
log = open("log", "w")  # as of a module with a score function
def main(argv):
    log.write("kept")
    threading.Thread(target=later).start()
    {end}
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("errors.InputError('lr=0')", 2, "error: lr=0"),
        ("OSError(28, 'No space left on device', 'runs/x')", 1, "stopped: no space left on the disk of runs/x"),
        ("OSError(5, 'Input/output error', 'runs/x')", 1, "Traceback"),
        ("SystemExit('no')", 1, "no"),
        ("BaseExceptionGroup('two', [KeyboardInterrupt()])", 1, "  + Exception Group Traceback"),
    ],
    ids=["a mistake", "a full disk", "another error", "a text", "no usual error"],
)
def test_one_process_of_several_ends_with_its_own_line_though_its_libraries_abort(error, code, line):
    """Else Python aborted one at its end in 4 of 10 pairs whose work was done. A process alone is left to that."""
    for world, ends in ((2, code), (1, -signal.SIGABRT)):
        text = ABORTS.format(world=world, error=error)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (ends, "put in order\n")
        assert done.stderr.startswith(line)
        assert done.stderr.count("Traceback") == line.count("Traceback")


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise SystemExit(143)", 143), ("raise OSError(28, '')", 1)])
def test_one_process_of_several_leaves_nothing_unwritten(tmp_path, end, code):
    text = ABORTS.format(world=2, error="None").replace("errors.run(main)", WRITES.format(end=end) + "errors.run(main)")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "put in order\n"), done.stderr
    assert [(tmp_path / name).read_text() for name in ("log", "thread")] == ["kept", "by a thread\n"]


@pytest.mark.parametrize("sleeps", [0, 1000])
def test_one_process_of_several_that_failed_keeps_the_others_waiting_for_seconds_at_most(tmp_path, sleeps):
    end = f"threading.Thread(target=time.sleep, args=({sleeps},)).start(); raise errors.RunStopped('no')"
    text = ABORTS.format(world=2, error="None").replace("errors.run(main)", WRITES.format(end=end) + "errors.run(main)")
    text = f"import threading\ntimer, threading.Timer = threading.Timer, lambda s, *a: timer(s / 10, *a)\n{text}"
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "put in order\n", "stopped: no\n")
    assert (tmp_path / "log").read_text() == "kept"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_console_prints(monkeypatch, terminal):
    from rich.table import Table

    out = io.StringIO()
    made = console._make_console()
    made.file, made._force_terminal = out, terminal
    monkeypatch.setattr(console, "console", lambda: made)
    console.stage_line("sft", f"{HOSTILE} http://me:pw@h")
    table = Table("a")
    table.add_row(HOSTILE)
    made.print(table)
    printed = out.getvalue()
    for hostile in ("\x1b]", "\x1b[2J", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\ud800", "pw"):
        assert hostile not in printed
    assert r"a\x1b]0;title" in printed


def test_what_the_log_prints():
    shown = console._WithoutSecrets("%(message)s")
    record = logging.LogRecord("rlhf", logging.WARNING, "", 0, "%s", ("http://me:pw@h/x",), None)
    assert shown.format(record) == "http://***@h/x"
    result = recipe.run("ppo", "--train_data", "x", "--output_dir", f"/no/such{HOSTILE[:20]}")
    assert "\x1b" not in result.out + result.err


# -- secrets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@h:80/x", "http://***@h:80/x"),
        ("at https://me:p@w@h, and s3://pw@b/c", "at https://***@h, and s3://***@b/c"),
        ("http://h/?a=1&api_key=pw&b=2#c", "http://h/?a=1&api_key=***&b=2#c"),
        ("http://h/?X-Amz-Signature=pw", "http://h/?X-Amz-Signature=***"),
        ("http://h/?key=pw", "http://h/?key=***"),
        ("run.py --hf_token pw --data d", "run.py --hf_token *** --data d"),
        ("run.py --api-key=pw", "run.py --api-key=***"),
        ("run.py --max_new_tokens 24 --token_file t --tokenizer x", None),
        ("http://h/a@b?monkey=1 me@example.org", None),
    ],
)
def test_secrets_are_hidden(text, shown):
    assert hidden(text) == (text if shown is None else shown)


@pytest.mark.parametrize(
    "value",
    [
        "http://me:pw@h:8000", "https://pw@h/x", "s3://key:pw@bucket/data", "http://h/?access_token=pw",
        "HTTP://me:pw@h", " http://me:pw@h", "http://me:p/pw@h", ["ok", "http://me:pw@h"], {"a": [{"b": "hf://pw@h"}]},
    ],
)  # fmt: skip
def test_settings_hold_no_secrets(value):
    with pytest.raises(InputError, match=r"^url.*the address holds a .*set an environment variable") as told:
        require_no_secret(value, "url")
    assert "pw" not in str(told.value)


def test_what_is_no_secret():
    for value in ("http://h:8000/a@b", "hf://datasets/x@main/y", "me@example.org", "file.py:f", "see http://a:b@c", 3):
        require_no_secret(value, "url")
    assert http_address("https://[::1]:8/a/", "url") == (True, "::1", 8, "/a")


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("ppo", "vllm_server", "http://me:pw@h:8000"),
        ("ppo", "reward_functions", "[http://me:pw@h:8000]"),
        ("ppo", "train_data", "https://me:pw@h/prompts.jsonl"),
        ("ppo", "model", "https://hub.example/?token=pw"),
        ("sft", "train_data", "https://pw@h/rows.jsonl"),
        ("reward_model", "train_data", "s3://me:pw@h/rows.jsonl"),
    ],
)
def test_recipes_refuse_settings_with_secrets_before_anything_is_written(tmp_path, name, flag, value):
    (tmp_path / "my.yaml").write_text(f"{flag}: {value}\n")
    for given in ((f"--{flag}", value), ("--config", tmp_path / "my.yaml")):
        result = recipe.run(name, *given, "--output_dir", tmp_path / "out")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert "environment variable" in result.err
        assert "pw" not in result.out + result.err
        assert not (tmp_path / "out").exists()


def test_a_manifest_hides_secrets_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my.py", "--hf_token", "pw", "--url", "http://me:pw@h", "--max_new_tokens", "24"])
    Manifest(stage="ppo", inputs={}, seed=0).write(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "pw" not in text
    assert "--max_new_tokens 24" in text
