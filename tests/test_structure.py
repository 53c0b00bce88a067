"""The house rules: who imports whom, sizes, a light `import rlhf`, settings that are all read, gold that judges."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("rlhf", "reward_models", "recipes", "data") for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in SOURCES if p.parts[len(ROOT.parts)] in ("rlhf", "reward_models")]

FILE_LINES, FUNCTION_LINES = (
    350,
    66,
)  # "about 350" and "about 60", of code: without blank lines, comments and docstrings
LARGER = {"rlhf/records.py": 460, "rlhf/ppo/trainer.py": 441}  # may shrink, not grow


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    """recipes -> reward_models -> rlhf; nothing imports recipes, data or tests."""
    forbidden = {"tests", "recipes", "data"}
    if name_of(path).startswith("rlhf/"):
        forbidden |= {"reward_models"}
    if name_of(path).startswith("data/"):
        forbidden |= {"reward_models"}
    own_recipes = {p.stem for p in SOURCES if name_of(p).startswith("recipes/")}
    if not name_of(path).startswith("recipes/"):
        forbidden |= own_recipes - {"ppo", "sft", "reward_model"} | {"stage"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden


def reached(start: str) -> set[str]:
    """Modules of rlhf that a module of rlhf imports, directly or through others."""
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name not in found and path.is_file():
            found.add(name)
            todo += [other for other in imports(path) if other.startswith("rlhf.")]
    return found


def test_sft_and_ppo_do_not_import_each_other():
    assert "rlhf.sft.trainer" not in reached("rlhf.ppo.trainer")
    assert "rlhf.ppo.trainer" not in reached("rlhf.sft.trainer")
    assert {"rlhf.ppo.math", "rlhf.ppo.rollout", "rlhf.models.loading"} <= reached("rlhf.ppo.trainer")


def test_the_mathematics_knows_no_model_configuration_or_log():
    assert reached("rlhf.ppo.math") == {"rlhf.ppo.math"}
    assert not {name.split(".")[0] for name in imports(ROOT / "rlhf/ppo/math.py")} & {
        "transformers",
        "peft",
        "trl",
        "logging",
    }


def test_no_recipe_bears_the_name_of_a_package():
    for path in (ROOT / "recipes").glob("*.py"):
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)"
        assert subprocess.run([sys.executable, "-I", "-c", probe, path.stem], cwd="/", check=False).returncode == 0, (
            path.stem
        )


def code_lines(node: ast.AST, text: list[str]) -> int:
    strings = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str)
        for line in range(inner.lineno, int(inner.end_lineno or 0) + 1)
    }
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", None) or len(text)
    lines = [n for n in range(first, last + 1) if n not in strings]
    return sum(bool(text[n - 1].strip()) and not text[n - 1].strip().startswith("#") for n in lines)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text, tree = path.read_text(encoding="utf-8").splitlines(), tree_of(path)
    assert code_lines(tree, text) <= LARGER.get(name_of(path), FILE_LINES)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node, text) <= FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name}"


def test_names_that_say_nothing():
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "helpers", "common", "misc")]


HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib"}
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if '__name__ == "__main__"' in p.read_text("utf-8"))


def answers(code: str, *argv: str) -> tuple[str, set[str], float]:
    """What a fresh process printed, which heavy modules it had loaded by its end, and its seconds."""
    listing = "import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules, file=sys.stderr))\n"
    command = [sys.executable, "-c", listing + code, *argv]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    seconds = time.perf_counter() - began
    return done.stdout, HEAVY & set(done.stderr.rpartition("loaded:")[2].split()), seconds


def test_import_rlhf_is_light():
    probe = "import time; start = time.perf_counter(); import rlhf; print(time.perf_counter() - start)"
    seconds, heavy, _ = zip(*(answers(probe) for _ in range(3)), strict=True)
    assert heavy == (set(), set(), set())
    assert min(map(float, seconds)) < 0.3


def test_settings_are_made_without_torch():
    code = "from reward_models import RewardConfig as R; from rlhf import PPOConfig as P, SFTConfig as S"
    assert answers(f"{code}; print(P().seed, R().seed, S().seed)")[:2] == ("0 0 0\n", set())


AS_SCRIPT = """
import runpy, sys
recipe = sys.argv[1]
sys.path[0] = "recipes"
for flags in (["--help"], ["--no_such_flag", "1"]):
    sys.argv = [recipe, *flags]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        print("exit code", end.code)
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_and_a_wrong_flag_are_answered_without_torch(recipe):
    text, heavy, _ = answers(AS_SCRIPT, f"recipes/{recipe}.py")
    assert text.startswith("usage:")
    assert [line for line in text.splitlines() if line.startswith("exit code")] == ["exit code 0", "exit code 2"]
    assert heavy == set()


def test_help_is_quick():
    assert min(answers(AS_SCRIPT, "recipes/chain.py")[2] for _ in range(3)) < 1.5


@pytest.mark.parametrize("package", ["rlhf", "reward_models"])
def test_public_names_are_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        module.nothing_of_the_kind  # noqa: B018


# -- settings ----------------------------------------------------------------------------------------------


def configs() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in SOURCES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Recipe")):
                yield path, node


def names_read() -> set[str]:
    """Attributes read, and names listed for getattr, anywhere but in a config's own checks."""
    found: set[str] = set()
    for path in SOURCES:
        tree = tree_of(path)
        checks = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in checks:
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if (
                name_of(path) == "rlhf/run/functions.py"
                and isinstance(node, ast.Constant)
                and isinstance(node.value, str)
            ):
                found.add(node.value)  # _SAME_NAME: fields that training_arguments hands on
    return found


def test_every_setting_is_read_and_documented():
    read, seen = names_read(), 0
    for path, node in configs():
        for place, field in enumerate(node.body):
            if not isinstance(field, ast.AnnAssign):
                continue
            where = f"{name_of(path)}: {node.name}.{field.target.id}"
            assert field.target.id in read, f"{where} is read by nothing"
            section = "Config" in ast.unparse(field.annotation) or "Recipe" in ast.unparse(field.annotation)
            if not section:  # a section's help is its class's
                following = node.body[place + 1] if place + 1 < len(node.body) else None
                assert isinstance(following, ast.Expr), f"{where} has no help"
                assert isinstance(following.value, ast.Constant), f"{where} has no help"
            seen += 1
    assert seen > 100


def test_configs_are_frozen():
    for path, node in configs():
        assert any("frozen=True" in ast.unparse(d) for d in node.decorator_list), f"{name_of(path)}: {node.name}"


def strings(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, path)
    elif isinstance(value, str):
        yield path, value


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs").glob("*.yaml")), ids=lambda p: p.name)
def test_gold_judges_and_never_trains(path):
    for place, text in strings(yaml.safe_load(path.read_text(encoding="utf-8"))):
        where = f"{'.'.join(place)}: {text}"
        assert "gold" not in text or place[0] == "evaluation", where
        assert not text.endswith(":gold") or place == ("evaluation", "judge"), where


def test_ppo_never_sees_gold():
    for path in LIBRARY:
        assert not [name for name in imports(path) if "gold" in name]
