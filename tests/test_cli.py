"""The command `rlhf`: recipes by name, several processes, list, copy, env, and what mistakes get."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from rlhf import cli, errors

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
NAMES = {file.stem for file in RECIPES.glob("*.py") if '__name__ == "__main__"' in file.read_text()}


def rlhf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, argv)])
    code: int | str | None = 0
    try:
        errors.run(cli.command)
    except SystemExit as end:
        code = end.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: rlhf(monkeypatch, capsys, *argv)


# ---------------------------------------------------------------- finding things


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_names_every_command_with_a_line(run, argv) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    for name in NAMES | {"list", "copy", "env"}:
        assert [line for line in out.splitlines() if line.startswith(f"  {name} ") and len(line.split()) > 2], name
    assert max(map(len, out.splitlines())) <= 80
    told = out.partition("Several processes:")[2]
    assert set(re.findall(r"--(\w+)", told)) == {*cli.LAUNCH, "accelerate_config"}


def test_list_names_everything_that_can_be_copied(run) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    shown = {words[0] for line in out.splitlines() if line.startswith("  ") and (words := line.split())}
    files = [*RECIPES.glob("configs/**/*.yaml"), *RECIPES.glob("notebooks/*.ipynb")]
    assert shown == NAMES | {file.name for file in files}
    assert "..." not in out, "a first line that is too long"
    assert max(len(line) for line in out.splitlines() if line.startswith("  ")) <= 80


def test_the_version_is_the_package_s(run) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version") == (0, f"rlhf-recipes {declared}\n", "")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_recipe_shows_its_help_in_80_columns(run, name) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: rlhf {name} ")
    assert f"\n    rlhf {name} " in out, "an example, on a line of its own"
    assert max(map(len, out.splitlines())) <= 80
    assert "default: )" not in out


def test_help_shows_the_defaults_that_hold(run) -> None:
    for name, told in (
        ("chain", "(default: <output_dir>/sft)"), ("chain", "(default: that of --seed)"),
        ("chain", "red_team (off unless named)"), ("process_reward", r'(default: "\n")'),
    ):  # fmt: skip
        assert told in " ".join(run(name, "--help")[1].split()), told


def test_help_takes_at_most_four_times_what_importing_numpy_takes() -> None:
    """In turn, so that a busy machine slows both alike; measured: 1.8 times."""
    commands = (["-m", "rlhf.cli", "ppo", "--help"], ["-c", "import numpy"])
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for command, seconds in zip(commands, spent, strict=True):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent[0]) < 4 * min(spent[1])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("pppo",), "rlhf: unknown command pppo; did you mean ppo?"),
        (("lits",), "rlhf: unknown command lits; did you mean list?"),
        (("--config", "toy.yaml"), "rlhf: unknown command --config; known: "),
        (("ppo", "--kl_coeff", "1"), "command line: unknown flag --kl_coeff; did you mean --kl_coef?"),
        (("ppo", "--config", "tox.yaml"), "tox.yaml: no such file in {here} nor in {recipes}; did you mean toy.yaml?"),
        (("ppo", "--num_processes"), "command line: --num_processes needs a value"),
        (("ppo", "--num_processes", "--config", "toy.yaml"), "command line: --num_processes needs a value"),
        (("ppo", "--num_processes", "two"), "num_processes=two must be a whole number from 1 up"),
        (("ppo", "--num_machines", "1"), "command line: --num_machines needs --num_processes too"),
        (("ppo", "--num_processes", "0"), "num_processes=0 must be a whole number from 1 up"),
        (
            ("ppo", "--accelerate_config", "fsdp.yaml"),
            "accelerate_config=fsdp.yaml: no such file in {here} nor in {recipes}; did you mean fsdp2.yaml?",
        ),
        (("list", "configs"), "rlhf list: unexpected 'configs'; it takes no arguments"),
        (("env", "--all"), "rlhf env: unexpected '--all'; it takes no arguments"),
        (("copy", "toy.yaml"), "rlhf copy NAME DIR: name one of `rlhf list` and a folder"),
        (("copy", "tox.yaml", "here"), "rlhf copy: unknown name tox.yaml; did you mean toy.yaml?"),
        (("inspect_rollout",), "name the run's folder first: rlhf inspect_rollout RUN"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(run, tmp_path, monkeypatch, argv, says) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says.format(here=tmp_path, recipes=RECIPES)}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("argv", [("list",), ("--help",), ("ppo", "--help"), ("copy", "toy.yaml", "here")])
def test_a_reader_that_is_gone_is_no_traceback(tmp_path, argv, buffered) -> None:
    """As in `rlhf list | head -0`: nobody reads what is printed, whether at once or at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *argv], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "" if buffered else "1"},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("argv", [("list",), ("--help",), ("sft", "--help")])
def test_a_narrow_terminal_cuts_no_line(run, monkeypatch, columns, argv) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(*argv)
    assert code == 0
    as_written = ("usage", "    rlhf", "        --", "They are")
    lines = [line for line in out.splitlines() if not line.startswith(as_written) and not line.endswith(":")]
    assert len(lines) > 20
    assert not [line for line in lines if len(line) > columns and len(line.split()) > 1]


# ---------------------------------------------------------------- copy


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("toy.yaml", "configs/toy.yaml"),
        ("toy", "configs/toy.yaml"),
        ("configs/toy.yaml", "configs/toy.yaml"),
        ("fsdp2.yaml", "configs/accelerate/fsdp2.yaml"),
        ("rlhf_in_ten_minutes.ipynb", "notebooks/rlhf_in_ten_minutes.ipynb"),
        ("ppo", "ppo.py"),
        ("ppo.py", "ppo.py"),
    ],
)
def test_copy_makes_the_folder_and_overwrites_nothing(run, tmp_path, name, source) -> None:
    folder = tmp_path / "new" / "mine"
    copied = folder / Path(source).name
    assert run("copy", name, folder) == (0, f"wrote {copied}\n", "")
    assert copied.read_bytes() == (RECIPES / source).read_bytes()
    copied.write_text("changed")
    code, _, err = run("copy", name, folder)
    assert code == 2
    assert err == f"error: {copied}: is there already; choose another folder\n"
    assert copied.read_text() == "changed"


def test_copy_does_not_take_a_file_for_a_folder(run, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run("copy", "toy.yaml", tmp_path / "file")
    assert code == 2
    assert "is there already" in err
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- env


def test_env_names_versions_and_devices_and_no_secret(run, monkeypatch) -> None:
    for name in ("RLHF_SERVER_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, out, _ = run("env")
    assert code == 0
    lines = {line[:24].strip(): line[24:] for line in out.splitlines()}
    assert lines["Python"].startswith(sys.version.split()[0])
    for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate"):
        assert lines[name] == metadata.version(name)
    assert f"of {os.cpu_count()} cores usable" in lines["CPU"]
    assert lines["OMP_NUM_THREADS"] == "3"
    assert "s3cret" not in out


def test_env_works_where_packages_are_missing() -> None:
    """As without torch, rich, yaml and jsonargparse."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'rich', 'yaml', 'jsonargparse', 'numpy']))\n"
        "from importlib import metadata; known = metadata.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'trl'): raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "from rlhf import cli; cli.command(['env'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = {line[:24].strip(): line[24:] for line in done.stdout.splitlines()}
    assert lines["torch"] == lines["trl"] == "not installed"
    assert lines["transformers"] == metadata.version("transformers")
    assert "torch cannot be imported" in lines["devices"]


# ---------------------------------------------------------------- several processes


def test_accelerates_flags_are_told_from_the_recipes() -> None:
    argv = [
        "--num_processes",
        "8",
        "--config",
        "my.yaml",
        "--accelerate_config=fsdp2.yaml",
        "--lora",
        "--kl_coef",
        "-1",
    ]
    flags, rest = cli.split_launch_flags(argv)
    assert flags == {"num_processes": "8", "accelerate_config": "fsdp2.yaml"}
    assert rest == ["--config", "my.yaml", "--lora", "--kl_coef", "-1"]
    assert cli.split_launch_flags(["--num-processes", "2", "--kl-coef", "1"]) == (
        {"num_processes": "2"}, ["--kl-coef", "1"],
    )  # fmt: skip


def test_accelerate_knows_every_flag_that_is_handed_on() -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert [name for name in cli.LAUNCH if f"--{name}" not in known] == []


def test_no_recipe_has_a_flag_that_accelerate_would_take() -> None:
    from rlhf.flags import all_flags
    from rlhf_recipes.chain import ChainConfig

    recipes = {name.rpartition(".")[2] for name in dict(all_flags(ChainConfig))}
    assert len(recipes) > 80
    assert not recipes & {*cli.LAUNCH, "accelerate_config"}


PROBE = """
import json, os, sys
import torch.distributed as d
from accelerate import Accelerator
accelerator = Accelerator()
folder, code, *rest = sys.argv[1:]
with open(f"{folder}/{accelerator.process_index}.json", "w") as file:
    json.dump([accelerator.num_processes, d.get_backend(), rest], file)
accelerator.wait_for_everyone()
d.destroy_process_group()
sys.exit(int(code))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        pytest.param({"num_processes": "2"}, 0, id="flags", marks=pytest.mark.long),
        pytest.param({"num_processes": "2"}, 2, id="a mistake"),
        pytest.param({"accelerate_config": "ddp.yaml"}, 0, id="a config", marks=pytest.mark.long),
    ],
)
def test_two_processes_start_without_a_gpu_and_their_exit_code_is_ours(tmp_path, flags, code) -> None:
    """With gloo; `accelerate launch --cpu --num_processes 2` would start one."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    start = f"from pathlib import Path; from rlhf.cli import launch; launch(Path({str(probe)!r}), {flags}, "
    argv = [str(tmp_path), str(code), "--config", "x.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", f"{start}{argv})"], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for process in (0, 1):
        told = json.loads((tmp_path / f"{process}.json").read_text())
        assert told == [2, "gloo", ["--config", "x.yaml"]]


ONE_STOPS = """
import os, signal, threading, time
from accelerate import Accelerator
from rlhf.errors import InputError, RunStopped, run
from rlhf.run.resume import Termination
def main(argv):
    accelerator = Accelerator()
    with Termination(accelerator):
        accelerator.wait_for_everyone()
        if accelerator.process_index == 1:
            {ends}
        accelerator.wait_for_everyone()
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        ("raise RunStopped('step 3: loss is nan')", 1, "stopped: step 3: loss is nan"),
        ("threading.Thread(target=time.sleep, args=[600]).start(); raise InputError('a b')", 2, "error: a b"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, cli.ended_by_signal(1, "SIGKILL")),
    ],
    ids=["by itself", "with a thread at work", "killed"],
)
def test_a_process_that_stops_ends_the_others_with_its_one_line(tmp_path, ends, code, line) -> None:
    """Neither torchrun's table nor the traceback of the process that waits for it; one that is killed has no line of
    its own. Threads, as torch has them, hold up none."""
    probe = tmp_path / "probe.py"
    probe.write_text(ONE_STOPS.format(ends=ends))
    start = f"from pathlib import Path; from rlhf.cli import launch; launch(Path({str(probe)!r}), "
    done = subprocess.run(
        [sys.executable, "-c", f"{start}{{'num_processes': '2'}}, [])"], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr == f"{line}\n"


SAVES = """
import os, sys, time
from accelerate import Accelerator
from rlhf.errors import run
from rlhf.run import console
from rlhf.run.resume import Termination
def main(argv):
    console.quiet()
    accelerator = Accelerator()
    termination = Termination(accelerator)
    with termination:
        accelerator.wait_for_everyone()
        os.write(1, b"at work\\n")
        while not termination.agreed():
            time.sleep(0.01)
    os.write(1, b"saved\\n")
    termination.leave()
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "last"), [
    (signal.SIGTERM, ""), (signal.SIGINT, "interrupted; the same command goes on from the last checkpoint\n"),
])  # fmt: skip
def test_a_signal_to_the_launcher_is_told_once(tmp_path, number, last) -> None:
    """By the first process, though all get it; nothing of torchrun's own."""
    probe = tmp_path / "probe.py"
    probe.write_text(SAVES)
    start = f"from pathlib import Path; from rlhf.cli import launch; launch(Path({str(probe)!r}), "
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"{start}{{'num_processes': '2'}}, [])"], text=True, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
    )  # fmt: skip
    try:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=60)
    finally:
        if launcher.poll() is None:
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()
    name = number.name
    told = f"WARNING  {name}: finishing this step and saving a checkpoint; a second {name} stops at once"
    assert (launcher.returncode, err) == (128 + number, last)
    assert sorted(line.rstrip() for line in out.splitlines()) == [told, "saved", "saved"]


def test_no_process_outlives_a_launcher_that_a_signal_ends(monkeypatch) -> None:
    """As of a third Ctrl-C, at which torchrun gives up waiting for its processes to save."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    left = subprocess.Popen(["sleep", "600"])

    def launched(args):
        raise SignalException("got a signal", sigval=signal.SIGINT)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # put back afterwards, as launch sets it
    try:
        with pytest.raises(SystemExit, match="130"):
            cli.launch(ROOT / "recipes" / "sft.py", {"num_processes": "2"}, [])
        assert left.wait(10) == -signal.SIGKILL
    finally:
        left.kill()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("number", "names_memory"), [(9, True), (11, False)])
def test_a_process_that_a_signal_ended_is_named_with_what_to_do(
    monkeypatch, capsys, number, names_memory, terminal
) -> None:
    """On a terminal the line does not run into the bar that was left, and the cursor is back."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=77, exitcode=-number, error_file="none")

    def launched(args):
        raise ChildFailedError("sft.py", {5: failure})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # put back afterwards, as launch sets it
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(SystemExit) as end:
        cli.launch(ROOT / "recipes" / "sft.py", {"num_processes": "8"}, [])
    assert end.value.code == 128 + number
    before, line, after = re.fullmatch(r"(\n?)(.*)\n(.*)", capsys.readouterr().err).groups()
    assert (before, after) == (("\n", "\x1b[?25h") if terminal else ("", ""))
    assert line.startswith(f"stopped: process 5 was ended by {signal.Signals(number).name}")
    assert ("memory" in line and "lower microbatch_size or tokens_per_microbatch" in line) == names_memory
    assert line.endswith("The last checkpoint, if there is one, is good: the same command goes on from it")


def test_a_package_that_accelerates_configuration_needs_is_told_in_one_line(monkeypatch) -> None:
    def launched(args):
        raise ImportError("DeepSpeed is not installed")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # put back afterwards, as launch sets it
    with pytest.raises(errors.InputError, match="accelerate launch: DeepSpeed is not installed"):
        cli.launch(ROOT / "recipes" / "sft.py", {"accelerate_config": "zero2.yaml"}, [])


@pytest.mark.parametrize(("given", "seconds"), [(None, 3600), ("7", 7)])
def test_processes_have_time_to_save_after_a_signal(monkeypatch, given, seconds) -> None:
    from torch.distributed.launcher.api import LaunchConfig

    seen = []
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", given or "")  # put back afterwards, as launch sets it
    if given is None:
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command", lambda args: seen.append(LaunchConfig(1, 1, 2).shutdown_timeout)
    )
    cli.launch(ROOT / "recipes" / "sft.py", {"num_processes": "2"}, [])
    assert seen == [seconds]


# ---------------------------------------------------------------- a clone that nothing installed


UNINSTALLED = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith(('_frozen', 'importl'))]\n"
)


@pytest.mark.parametrize("way", ["command", "script"])
def test_a_clone_on_pythonpath_runs_from_any_folder(tmp_path, way) -> None:
    script = {
        "command": "from rlhf import cli; sys.argv = ['rlhf', *sys.argv[1:]]; cli.command(sys.argv[1:])",
        "script": f"import runpy; sys.path[0] = {str(RECIPES)!r}; sys.argv[:2] = [{str(RECIPES / 'ppo.py')!r}];"
        " runpy.run_path(sys.argv[0], run_name='__main__')",
    }[way]
    site = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))])
    command = [sys.executable, "-c", UNINSTALLED + script, "ppo", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": site}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--reward_model TEXT" in done.stdout
