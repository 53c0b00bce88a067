"""The wheel: what is in it, and that it works where no clone is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"rlhf": "rlhf", "reward_models": "reward_models", "recipes": "rlhf_recipes", "data": "rlhf_recipes/data"}


def build(folder: Path) -> Path:
    """Build the wheel of a copy of the sources, so that nothing is written beside them, and without a network."""
    sources = folder / "sources"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_every_file_is_in_it_and_no_other(wheel: Path) -> None:
    expected = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected
    assert {"rlhf_recipes/configs/accelerate/fsdp2.yaml", "rlhf_recipes/data/toy/README.md"} <= inside
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "rlhf = rlhf.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """The command, a config and the toy's functions, with this environment's packages and nothing of the clone."""
    site, here = tmp_path / "site", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(site)
    here.mkdir()
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith(('_frozen', 'importl'))]\n"
        "from rlhf import cli, config; from rlhf.run.lookup import recipes\n"
        "cli.command(['list']); cli.command(['copy', 'toy', 'mine'])\n"
        "from rlhf_recipes.chain import ChainConfig\n"
        "ours = [config.load(ChainConfig, ['--config', f]) for f in ('toy.yaml', 'mine/toy.yaml')]\n"
        "make = config.import_function(ours[0].data.make)\n"
        "make('data', seed=0, prompts=20, demonstrations=4, pretraining_documents=4, evaluation_prompts=4)\n"
        "print(ours[0] == ours[1], make.__code__.co_filename, recipes())"
    )
    paths = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    options = {"cwd": here, "capture_output": True, "text": True, "env": paths}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    package = site / "rlhf_recipes"
    assert done.stdout.splitlines()[-1] == f"True {package / 'data/toy/toy_world.py'} {package}"
    assert {path.name for path in here.iterdir()} == {"mine", "data"}
    # and as the script that `rlhf --num_processes 2` starts twice: its folder is then first on sys.path
    done = subprocess.run([sys.executable, package / "ppo.py", "--config", "tox.yaml"], **options)
    assert done.returncode == 2
    assert done.stderr.endswith(f"tox.yaml: no such file in {here} nor in {package}; did you mean toy.yaml?\n")


WORKER = """
import jobs, rlhf_recipes, rlhf
jobs.serve(lambda job: {"files": [module.__file__ for module in (jobs, rlhf_recipes, rlhf)], "asked": job["asked"]})
"""


def test_the_benchmark_starts_its_workers_from_it(wheel: Path, tmp_path: Path) -> None:
    """Each run of a benchmark is a process of its own; there too every module is the wheel's."""
    site, here = tmp_path / "site", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(site)
    here.mkdir()
    benchmarks = site / "rlhf_recipes/benchmarks"
    (benchmarks / "stub.py").write_text(WORKER)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith(('_frozen', 'importl'))]\n"
        "from rlhf import cli\n"
        "try: cli.command(['benchmark', '--help'])\n"
        "except SystemExit: pass\n"
        "import jobs; from pathlib import Path\n"
        "print(jobs.run_job('stub.py', {'asked': 7}, Path('job').absolute()))"
    )
    paths = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    options = {"cwd": here, "capture_output": True, "text": True}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    files = [f"{benchmarks / 'jobs.py'}", f"{site / 'rlhf_recipes/__init__.py'}", f"{site / 'rlhf/__init__.py'}"]
    assert done.stdout.splitlines()[-1] == str({"files": files, "asked": 7})
    assert (benchmarks / "gpu.sh").read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.long
def test_a_fresh_environment_runs_the_chain(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip with its dependencies, from an empty folder: what a newcomer types, and three mistakes."""
    here = tmp_path / "here"
    here.mkdir()
    environment = {
        "PATH": f"{tmp_path / 'venv/bin'}:/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "OMP_", "SSL_", "REQUESTS_"))},
    }  # fmt: skip

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment)

    def fine(*command: str) -> str:
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(pip, check=True)
    out = fine("rlhf", "chain", "--config", "smoke.yaml")
    assert out.splitlines()[-1].split() == ["report", "runs/smoke/report.html"]
    assert json.loads((here / "runs/smoke/summary.json").read_text())["evaluation"]["ppo"]["prompts"] == 24
    assert fine("rlhf", "chain", "--config", "smoke.yaml").count("complete, skipped") == 7
    assert fine("rlhf", "ppo", "--help").startswith("usage: rlhf ppo ")
    assert "toy.yaml" in fine("rlhf", "list")
    assert "rlhf-recipes" in fine("rlhf", "env")
    assert fine("rlhf", "copy", "toy.yaml", "here") == "wrote here/toy.yaml\n"
    runs = ("--only", "speed", "--cases", "[tiny]", "--runs", "[ours_adapter]", "--updates", "1")
    assert "ours against the limit" in fine("rlhf", "benchmark", *runs, "--output_dir", "runs/benchmark")
    two = ("--num_processes", "2", "--config", "smoke.yaml", "--output_dir", "runs/two/sft", "--model")
    out = fine("rlhf", "sft", *two, "runs/smoke/base", "--train_data", "runs/smoke/data/demonstrations.jsonl")
    assert out.count("done in") == 1, "the first process speaks for all"
    manifest = json.loads((here / "runs/two/sft/manifest.json").read_text())
    assert manifest["outputs"]["demonstrations"] == 96
    for mistake in (["pppo"], ["ppo", "--kl_coeff", "1"], ["chain", "--config", "nothing.yaml"]):
        done = run("rlhf", *mistake)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
