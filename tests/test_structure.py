"""The house rules: directions of imports, sizes, a light `import rlhf`, settings that are all read, gold that
judges."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("rlhf", "reward_models", "recipes", "data") for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("rlhf", "reward_models")]
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if '__name__ == "__main__"' in p.read_text("utf-8"))
PACKAGES = {"recipes": "rlhf_recipes"}  # folders whose package has another name

# What each room of rlhf may import from the other rooms. Every room may import the files that stand in rlhf/ itself.
TEXT = {"chat", "rows"}  # what every room above them may use
CORE = TEXT | {"ppo", "sft", "models", "sampling", "preflight", "run"}
ROOMS = {
    "rows": set(),
    "chat": {"rows"},
    "models": TEXT,
    "run": TEXT | {"cpu"},
    "cpu": {"models"},
    "sampling": TEXT | {"models", "cpu"},
    "preflight": TEXT | {"models", "sampling", "run"},
    "sft": TEXT | {"models", "preflight", "run"},
    "ppo": TEXT | {"models", "sampling", "preflight", "run", "cpu"},
    "collection": CORE,
    "serving": CORE | {"collection"},
    "evals": CORE | {"collection"},
    "safety": CORE | {"collection", "evals"},
}
DOORS_TO_CPU = {
    "rlhf.ppo.trainer",
    "rlhf.sampling.decode",
    "rlhf.sampling.draw",
    "rlhf.run.callbacks",
    "reward_models.scoring",
}

FILE_LINES, FUNCTION_LINES = (
    350,
    60,
)  # a file's as `wc -l` counts; a function's of code: no blank line, comment, docstring
LONGER: dict[str, str] = {}  # functions that may be longer, and why


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in (PACKAGES.get(folder, folder), *rest) if part != "__init__")


MODULES = {module_of(path): path for path in SOURCES}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Return every module that a file imports, also in functions and for typing. Ours are named in full, so
    `from rlhf import chat` gives rlhf.chat."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(found)


def room_of(module: str) -> str:
    """Return the room of a module: its folder, such as rlhf.ppo, or the file itself, such as rlhf.chat, in rlhf/."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "rlhf" else parts[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, each with an edge to the next, or none where the graph has no circle."""
    done: set[str] = set()

    def follow(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for following in sorted(graph.get(node, ())):
                if found := follow(following, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := follow(node, []))), [])


def test_circle_finds_the_shortest_and_a_longer_one():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"b"}}) == ["b", "b"]
    assert circle({"a": {"b", "c"}, "b": set(), "c": {"d"}, "d": {"a"}}) == ["a", "c", "d", "a"]


# -- who imports whom --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    """recipes -> reward_models -> rlhf; nothing imports recipes, data or tests."""
    forbidden = {"tests", "recipes", "data"}
    if not name_of(path).startswith("recipes/"):
        forbidden |= {"rlhf_recipes", *(p.stem for p in (ROOT / "recipes").rglob("*.py"))} - {"__init__"}
    if name_of(path).startswith(("rlhf/", "data/")):
        forbidden |= {"reward_models"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden


def test_no_circle_of_imports():
    graph = {name: {other for other in imports(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    assert not circle(graph), " -> ".join(circle(graph))


def test_no_circle_of_rooms():
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph.setdefault(room_of(name), set()).update(map(room_of, imports(path) & MODULES.keys()))
    graph = {room: others - {room} for room, others in graph.items() if room != "rlhf"}  # whose __init__ only names
    assert not circle(graph), " -> ".join(circle(graph))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.match("rlhf/*/*.py")], ids=name_of)
def test_a_room_imports_the_rooms_below_it(path):
    own = path.parent.name
    assert own in ROOMS, f"rlhf/{own}/ is a new room: say in ROOMS which others it may import"
    for name in imports(path):
        folder, _, rest = name.partition(".")
        room, _, module = rest.partition(".")
        if folder != "rlhf" or room not in ROOMS or room == own:
            continue
        assert room in ROOMS[own], f"rlhf/{own} must not import {name}"
        if room == "collection":
            assert module in ("store", "project", "personal"), f"{name}: not the store, nor what its rows mean"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_few_modules_open_the_door_to_cpu(path):
    if not name_of(path).startswith("rlhf/cpu/") and module_of(path) not in DOORS_TO_CPU:
        assert not [name for name in imports(path) if room_of(name) == "rlhf.cpu"]


def test_the_mathematics_knows_no_model_configuration_or_log():
    files = {name: imports(MODULES[name]) for name in ("rlhf.ppo.math", "rlhf.models.logprobs")}
    assert [name for name in files["rlhf.ppo.math"] if name in MODULES] == ["rlhf.models.logprobs"]
    assert not files["rlhf.models.logprobs"] & MODULES.keys()
    for name, found in files.items():
        assert not {other.split(".")[0] for other in found} & {"transformers", "peft", "trl", "logging"}, name


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=name_of)
def test_no_test_imports_another_one(path):
    """Code that several tests need is in tests/reference/."""
    assert not [name for name in imports(path) if name.split(".")[0] == "tests" or ".test_" in f".{name}"]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name == "__init__.py"], ids=name_of)
def test_a_room_says_what_it_is_for(path):
    text = ast.get_docstring(tree_of(path)) or ""
    assert len(text.split()) >= 20
    here = {p.stem for p in path.parent.iterdir()}
    for name in re.findall(r"`(\w+)`", text):
        assert name in here, f"{name_of(path)} speaks of {name}, which is not there"


def test_no_recipe_bears_the_name_of_a_package():
    probe = "import importlib.util as i, sys; print(*[name for name in sys.argv[1:] if i.find_spec(name)])"
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", "rlhf_recipes"}  # the package itself
    done = subprocess.run([sys.executable, "-I", "-c", probe, "json", *names], cwd="/", capture_output=True, text=True)
    assert done.stdout.split() == ["json"], done.stderr


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
    text = path.read_text(encoding="utf-8").splitlines()
    assert len(text) <= FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = code_lines(node, text) > FUNCTION_LINES
            name = f"{name_of(path)}: {node.name}"
            assert long == (name in LONGER), f"{name}: {'too long' if long else 'LONGER need not name it any more'}"


def test_names_that_say_nothing():
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "helpers", "common", "misc")]


HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib"}


def answers(code: str, *argv: str) -> tuple[str, set[str]]:
    """What a fresh process printed, and which heavy modules it had loaded by its end."""
    listing = "import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules, file=sys.stderr))\n"
    command = [sys.executable, "-c", listing + code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout, HEAVY & set(done.stderr.rpartition("loaded:")[2].split())


def test_import_rlhf_is_light():
    probe = "import time; start = time.perf_counter(); import rlhf; print(time.perf_counter() - start)"
    assert answers(probe)[1] == set()
    assert any(float(answers(probe)[0]) < 0.3 for _ in range(3))


def test_settings_are_made_without_torch():
    code = "from reward_models import RewardConfig as R; from rlhf import PPOConfig as P, SFTConfig as S"
    assert answers(f"{code}; print(P().seed, R().seed, S().seed)") == ("0 0 0\n", set())


def test_ppo_is_imported_without_what_only_other_trainers_and_pictures_need():
    """datasets brings pandas: 80 MiB of a process that may have none to spare."""
    code = "import rlhf.ppo.trainer, reward_models.scoring"
    assert answers(code)[1] == {"torch", "transformers", "peft", "accelerate"}


AS_SCRIPTS = """
import contextlib, io, json, runpy, sys
sys.path[0] = "recipes"
for recipe in sys.argv[1:]:
    for flags in (["--help"], ["--no_such_flag", "1"]):
        sys.argv, out, code = [recipe, *flags], io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(recipe, run_name="__main__")
        except SystemExit as end:
            code = end.code
        print(json.dumps([recipe, code, out.getvalue()[:6]]))
"""


def test_help_and_a_wrong_flag_are_answered_without_torch():
    recipes = [f"recipes/{name}.py" for name in RECIPES]
    text, heavy = answers(AS_SCRIPTS, *recipes)
    expected = [found for recipe in recipes for found in ([recipe, 0, "usage:"], [recipe, 2, ""])]
    assert [json.loads(line) for line in text.splitlines()] == expected
    assert heavy == set()


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
    """Return the attributes read, and names listed for getattr, anywhere but in a config's own checks."""
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
            if module_of(path) == "rlhf.run.trl_arguments" and isinstance(node, ast.Constant):
                found.add(str(node.value))  # _SAME_NAME: fields that training_arguments hands on
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
