"""recipes/inspect_rollout.py: the right number in the right cell, terminal and page; replays; what bad input gets."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import recipe
from reference.saved_run import make
from reference.tiny_chain import chain
from rich.console import Console

from rlhf import chat
from rlhf.ppo.rollout import ReadyRollout
from rlhf.ppo.saved import load_rollout, save_rollout, update_folder
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.ppo.view import NUMBERS, number, response_lines, response_page, response_view, rows_table, token_text
from rlhf.rows.records import Prompt

ATTACK = "<script>alert('x')</script> & <b>bold</b> [red]markup[/red]"
RESPONSES = [" two\n\tlines", ATTACK, "plain"]
FIELDS = [source for source, _ in NUMBERS.values()]
BASE = {name: 10.0 * (place + 1) for place, name in enumerate(FIELDS)}


def inspect(*flags: object) -> recipe.Result:
    return recipe.run("inspect_rollout", *flags)


def hand_made(tokenizer) -> ReadyRollout:
    """Number c of token t in row k is 10 * (c + 1) + t / 10 + k / 1000, so that no cell can be taken for another."""
    ids = [tokenizer(text)["input_ids"] for text in RESPONSES]
    stop = chat.stop_ids(tokenizer)[0]
    ids = [row + [stop] * (k != 1) for k, row in enumerate(ids)]
    width = max(map(len, ids))
    mask = torch.arange(width)[None] < torch.tensor([len(row) for row in ids])[:, None]
    grid = torch.arange(width)[None] / 10 + torch.arange(3)[:, None] / 1000
    columns = {name: torch.where(mask, base + grid, 0.0) for name, base in BASE.items()}
    columns["logprobs"] = torch.where(mask, columns["reference_logprobs"] + columns.pop("kl"), 0.0)
    return ReadyRollout(
        prompts=[Prompt([{"role": "user", "content": f"{ATTACK} {k}"}]) for k in range(3)],
        prompt_ids=[[1]] * 3, response_ids=ids, texts=RESPONSES, stopped=torch.tensor([True, False, True]),
        mask=mask, plan=[[[0, 1, 2]]], update=6, raw_scores=torch.tensor([0.5, 3.25, -2.0]),
        scores=torch.tensor([0.125, -1.0, 2.5]), own_scores={}, used=torch.ones(3, dtype=torch.bool), **columns,
    )  # fmt: skip


@pytest.fixture
def run_folder(tmp_path, tiny_tokenizer) -> Path:
    """A run of which only what viewing needs is there."""
    chat.prepare_tokenizer(tiny_tokenizer)
    folder = update_folder(tmp_path / "my" / "ppo", 7)
    folder.mkdir(parents=True)
    save_rollout(folder, hand_made(tiny_tokenizer), 0)
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "metrics.json").write_text(json.dumps({"step": 7, "score": 0.583, "kl_nats": 1.5}))
    return tmp_path / "my"


def expected(rollout: ReadyRollout, row: int, place: int) -> list[str]:
    """The numbers of one token, from the definition."""
    values = [BASE[name] + place / 10 + row / 1000 for name in FIELDS]
    values[0] = BASE["reference_logprobs"] + BASE["kl"] + 2 * (place / 10 + row / 1000)
    return [f"{value:.4f}" for value in values]


def near(cells: list[str], numbers: list[str]) -> bool:
    """Equal up to float32."""
    return len(cells) == len(numbers) and all(
        abs(float(a) - float(b)) < 2e-4 for a, b in zip(cells, numbers, strict=True)
    )


# -- the terminal ------------------------------------------------------------------------------------------


def test_which_updates_were_kept(run_folder):
    for name in (run_folder, run_folder / "ppo"):
        result = inspect(name)
        assert result.code == 0
        (line,) = [line.split() for line in result.out.splitlines() if re.match(r" +7 ", line)]
        assert line[:3] == ["7", "0.5830", "1.5000"]


@pytest.mark.parametrize(
    ("sort", "order"), [(None, [0, 1, 2]), ("score", [2, 0, 1]), ("kl", [1, 0, 2]), ("tokens", [1, 0, 2])]
)
def test_the_rows_of_an_update(run_folder, sort, order):
    result = inspect(run_folder, "--update", 7, *(("--sort", sort) if sort else ()))
    assert result.code == 0
    rows = [line for line in result.out.splitlines() if re.match(r" +[0-2] ", line)]
    assert [int(row.split()[0]) for row in rows] == order
    rollout = load_rollout(update_folder(run_folder / "ppo", 7))
    for row, line in zip(order, rows, strict=True):
        kl = sum(BASE["kl"] + t / 10 + row / 1000 for t in range(len(rollout.response_ids[row])))
        score, raw, nats, tokens, stopped = line.split()[-5:]
        assert (score, raw) == [("0.1250", "0.5000"), ("-1.0000", "3.2500"), ("2.5000", "-2.0000")][row]
        assert abs(float(nats) - kl) < 1e-3 * kl
        assert (int(tokens), stopped) == (len(rollout.response_ids[row]), ["yes", "no", "yes"][row])
        assert "<script>" in line
        assert [" two⏎", "<script>", "plain"][row] in line


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_response_in_the_terminal(run_folder, row, tiny_tokenizer):
    result = inspect(run_folder, "--update", 7, "--row", row)
    assert result.code == 0
    rollout = load_rollout(update_folder(run_folder / "ppo", 7))
    assert f"update 7, row {row} (rows 0 to 2)" in result.out
    assert f"{ATTACK} {row}" in result.out
    facts = ["score 0.1250   raw score 0.5000", "score -1.0000   raw score 3.2500", "score 2.5000   raw score -2.0000"]
    assert facts[row] in result.out
    ids = rollout.response_ids[row]
    assert f"{len(ids)} tokens   {'did not stop' if row == 1 else 'stopped by itself'}" in result.out
    lines = [line for line in result.out.splitlines() if re.match(r" *\d+ ['\"]", line)]
    assert len(lines) == len(ids)
    for place, line in enumerate(lines):
        position, rest = line.split(maxsplit=1)
        assert int(position) == place
        text = tiny_tokenizer.decode([ids[place]])
        assert rest.startswith(repr(text)[:14])
        end = "" if place < len(ids) - 1 else "cut" if row == 1 else "stop"
        cells = rest[len(repr(text)) :].split()
        assert cells[8:] == ["1", end] if end else cells[8:] == ["1"]
        assert near(cells[:8], expected(rollout, row, place))
    (sums,) = [line.split() for line in result.out.splitlines() if re.match(r" +sum ", line)]
    totals = [sum(float(expected(rollout, row, t)[c]) for t in range(len(ids))) for c in (0, 1, 2, 5)]
    assert all(abs(float(a) - b) < 1e-3 * b + 0.01 for a, b in zip(sums[1:], totals, strict=True))
    padding = rollout.mask.shape[1] - len(ids)
    assert (f"{padding} padding tokens follow" in result.out) == (padding > 0)


@pytest.mark.parametrize("width", [100, 120])
def test_it_fits_the_terminal(tiny_tokenizer, width):
    """Long tokens shrink, numbers of ordinary size never do; control characters don't reach the terminal."""
    chat.prepare_tokenizer(tiny_tokenizer)
    plain = hand_made(tiny_tokenizer)
    rollout = dataclasses.replace(
        plain,
        texts=["\x1b[31mred", *plain.texts[1:]],
        **{name: -12.3456 * plain.mask for name in BASE if name not in ("kl", "logprobs")},
        logprobs=-10.0 * plain.mask,
    )
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    view = response_view(rollout, 0, tiny_tokenizer)
    assert [token.shown for token in view.tokens][-1] == "'<|im_end|>'"
    console.print(response_lines(view))
    console.print(rows_table(rollout))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines)
    (line,) = [line for line in lines if line.rstrip().endswith("1 stop")]
    assert line.split()[2:] == ["-10.0000", "-12.3456", "2.3456", *["-12.3456"] * 5, "1", "stop"]
    assert any(all(name in line for name in (*NUMBERS, "mask")) for line in lines)


def test_a_token_is_what_it_adds_to_the_text(tiny_tokenizer):
    class Pieces:
        """SentencePiece's marked spaces, which `decode` drops."""

        def convert_ids_to_tokens(self, token):
            return ["\u2581the", "\u2581\u2581", "cat"][token]

        def decode(self, ids, **options):
            return ["the", "", "cat"][ids[0]]

    assert [token_text(Pieces(), i) for i in range(3)] == [" the", "  ", "cat"]
    ids = tiny_tokenizer("The fox ☃")["input_ids"]
    texts = [token_text(tiny_tokenizer, token) for token in ids]
    assert "".join(texts).startswith("The fox ")
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)  # parts of the snowman, by the vocabulary's names
    assert [number(x) for x in (None, float("nan"), float("inf"), -0.00001, 123456.0, -1.5)] == [
        "–", "nan", "inf", "0.0000", "1.235e+05", "-1.5000",
    ]  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Table cells, the response's tokens, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tokens: list[list[Any]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "a":
            self.tokens.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "a" in self.open:
            self.tokens[-1][1] += data


@pytest.mark.parametrize("row", [0, 1])
def test_a_response_as_a_page(run_folder, tmp_path, row, tiny_tokenizer):
    file = tmp_path / "row.html"
    result = inspect(run_folder, "--update", 7, "--row", row, "--html", file)
    assert (result.code, result.err) == (0, "")
    page = Page(file.read_text(encoding="utf-8"))
    assert page.open == []
    rollout = load_rollout(update_folder(run_folder / "ppo", 7))
    ids = rollout.response_ids[row]
    assert page.rows[0] == ["#", "token", *NUMBERS, "mask"]
    for place, cells in enumerate(page.rows[1 : len(ids) + 1]):
        text = tiny_tokenizer.decode([ids[place]])
        end = "" if place < len(ids) - 1 else "cut" if row == 1 else "stop"
        assert cells[:2] == [str(place), repr(text)]
        assert near(cells[2:10], expected(rollout, row, place))
        assert cells[10].split() == ["1", *end.split()]
        attributes, shown = page.tokens[place]
        assert attributes["href"] == f"#t{place}"
        tip = attributes["data-numbers"]
        assert tip.startswith(f"#{place} {text!r}")
        assert near(re.findall(r"[a-zA-Z]+ (-?\d+\.\d+)", tip.replace(repr(text), "")), expected(rollout, row, place))
        assert shown.replace("⏎\n", "\n").replace("\\t", "\t") == text
    assert page.rows[len(ids) + 1][1] == "sum"
    assert {attributes["id"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes} == {
        f"t{place}" for place in range(len(ids))
    }
    assert f"{ATTACK} {row}" in page.text
    assert "score 0.1250" in page.text if row == 0 else "score -1.0000" in page.text


def addresses(file: Path) -> list[str]:
    """Every link of a page to another one, in its order."""
    found = [str(a["href"]) for tag, a in Page(file.read_text(encoding="utf-8")).tags if tag == "a"]
    return [address for address in found if not address.startswith("#")]


def test_an_update_as_pages_with_an_index(run_folder, tmp_path):
    pages = tmp_path / "pages"
    (run_folder / "report.html").write_text("the report")
    result = inspect(run_folder, "--update", 7, "--sort", "score", "--html", pages)
    assert (result.code, result.err) == (0, "")
    assert addresses(pages / "index.html")[1:] == ["row-2.html", "row-0.html", "row-1.html"]
    assert addresses(pages / "row-2.html") == ["index.html", "row-0.html"]
    assert addresses(pages / "row-0.html") == ["row-2.html", "index.html", "row-1.html"]
    assert addresses(pages / "row-1.html") == ["row-0.html", "index.html"]
    for file in pages.iterdir():
        assert all((pages / address).exists() for address in addresses(file))
        assert "<script" not in file.read_text(encoding="utf-8")
    shown = Page((pages / "index.html").read_text(encoding="utf-8")).rows
    assert [row[:1] + row[3:] for row in shown[1:]] == [
        ["row 2", "2.5000", "-2.0000", *shown[1][5:]],
        ["row 0", "0.1250", "0.5000", *shown[2][5:]],
        ["row 1", "-1.0000", "3.2500", *shown[3][5:]],
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_it_fits_a_narrow_terminal(tiny_tokenizer, width):
    """Fewer numbers, none of them cut, and those left out are named."""
    chat.prepare_tokenizer(tiny_tokenizer)
    rollout = hand_made(tiny_tokenizer)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(response_lines(response_view(rollout, 0, tiny_tokenizer), width))
    console.print(rows_table(rollout, width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    (left_out,) = re.findall(r"too narrow for ([\w ,\n]+)\n", text)
    (line,) = [line for line in text.splitlines() if line.rstrip().endswith("1 stop")]
    place = len(rollout.response_ids[0]) - 1
    named = [name for name in NUMBERS if name not in re.split(r"[,\s]+", left_out)]
    assert "KL" in named
    wanted = [number for name, number in zip(NUMBERS, expected(rollout, 0, place), strict=True) if name in named]
    assert near(line.split()[2:-2], wanted)


def test_the_page_runs_nothing_and_loads_nothing(run_folder, tmp_path):
    file = tmp_path / "row.html"
    inspect(run_folder, "--update", 7, "--row", 1, "--html", file)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b>", "img", "link", "iframe", "red"})
    assert "<script" not in text
    assert not any(name.startswith("on") or name == "src" for _, attributes in page.tags for name in attributes)
    assert all(a["href"].startswith("#") for _, a in page.tags if a.get("href"))
    assert not re.search(r"https?:|url\(|@import", text)
    assert len(text) < 60_000


def test_a_token_that_is_a_tag_is_escaped(tiny_tokenizer):
    """Wherever it stands: in the response, in its hover text, in the table."""
    chat.prepare_tokenizer(tiny_tokenizer)
    view = response_view(hand_made(tiny_tokenizer), 0, tiny_tokenizer)
    attack = '"><script>alert(1)</script>'
    view = dataclasses.replace(view, tokens=[dataclasses.replace(token, text=attack) for token in view.tokens])
    text = response_page(view, attack)
    assert "<script" not in text
    page = Page(text)
    assert page.open == []
    assert page.tokens[0][1] == attack
    assert page.rows[1][1] == repr(attack)
    assert attack in str(page.tokens[0][0]["data-numbers"])


def test_colours_follow_the_numbers(tiny_tokenizer):
    """Blue above 0, orange below, twice the number twice the strength; radio buttons choose the number."""
    chat.prepare_tokenizer(tiny_tokenizer)
    rollout = hand_made(tiny_tokenizer)
    advantages = torch.zeros_like(rollout.advantages)
    advantages[0, :4] = torch.tensor([2.0, -1.0, 0.0, float("nan")])
    text = response_page(response_view(dataclasses.replace(rollout, advantages=advantages), 0, tiny_tokenizer), "x")
    page = Page(text)
    radios = {a["id"]: a for tag, a in page.tags if tag == "input"}
    assert len(radios) == len(NUMBERS)
    (chosen,) = [name for name, a in radios.items() if "checked" in a]
    place = list(NUMBERS).index("advantage")
    assert chosen == f"by{place}"
    assert f"#by{place}:checked ~ .response a {{ background: var(--n{place}); }}" in text
    colours = [dict(part.split(":") for part in a["style"].split(";"))[f"--n{place}"] for a, _ in page.tokens]
    assert colours[:4] == [
        "rgb(59 130 246 / 0.750)",
        "rgb(224 123 46 / 0.375)",
        "rgb(224 123 46 / 0.000)",
        "transparent",
    ]


# -- replay ------------------------------------------------------------------------------------------------


RUNS: dict[str, Path] = {}


@pytest.fixture(params=["full", "lora"])
def run(request, tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A PPO run of three updates, all of them kept; made once."""
    if request.param not in RUNS:
        folder = tmp_path_factory.mktemp(request.param)
        policy, reward = chain(folder, tiny_model, tiny_tokenizer, request.param == "lora")
        changes = {"updates": 3, "save_rollouts": 1, "rescale_rewards": True, "clip_value": float("inf")}
        make(folder / "run", policy, reward, **changes).train()
        RUNS[request.param] = folder / "run"
    return RUNS[request.param]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def differing(result: recipe.Result) -> set[str]:
    """Metrics whose difference is not 0."""
    lines = [line.rsplit(maxsplit=3) for line in result.out.splitlines()]
    rows = [line for line in lines if len(line) == 4 and re.match(r"^[+-]?\d|^0$|^[+-]?nan", line[3])]
    assert len(rows) > 20
    return {row[0].strip() for row in rows if row[3] != "0"}


def test_a_replay_is_identical(run):
    for update in (1, 3):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        result = inspect(run, "--update", update, "--replay")
        assert result.code == 0, result.out + result.err
        assert differing(result) == set()
        assert "identical: every number is the logged one to the last bit" in result.out
        logged = json.loads((update_folder(run, update) / "metrics.json").read_text())
        for name, value in logged.items():
            if name != "step" and "second" not in name:
                assert re.search(
                    rf"^ +{name} +{re.escape(repr(value))} +{re.escape(repr(value))} +0 *$", result.out, re.M
                )
        assert "not run again: generate_seconds, score_seconds" in result.out
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_replay_of_another_state_is_not(copy):
    file = update_folder(copy, 2) / "state/ppo.pt"
    state = torch.load(file, weights_only=True)
    name = next(name for name in state["trained"] if not name.startswith("value") and ".value." not in name)
    state["trained"][name] += 1e-3
    torch.save(state, file)
    result = inspect(copy, "--update", 2, "--replay")
    assert result.code == 1
    assert "step0_ratio_error" in differing(result)
    assert "kl_nats" not in differing(result)  # that of the rollout, which is the same
    assert "not identical" in result.out
    assert result.err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("advantages", {"advantages, max difference", "policy_loss"}),
        ("rewards", {"rewards, max difference"}),
        ("entropy", {"entropy_nats"}),
        ("logprobs", {"kl_nats", "step0_ratio_error", "rewards, max difference"}),
    ],
)
def test_a_replay_of_another_rollout_is_not(copy, column, found):
    folder = update_folder(copy, 2)
    rollout = load_rollout(folder)
    getattr(rollout, column)[rollout.plan[0][0][0], 0] += 1e-3  # a row of the first optimizer step
    save_rollout(folder, rollout, 0)
    result = inspect(copy, "--update", 2, "--replay")
    assert result.code == 1
    assert found <= differing(result)


def test_a_replay_compares_to_the_last_bit(copy):
    file = update_folder(copy, 2) / "metrics.json"
    logged = json.loads(file.read_text())
    logged["policy_loss"] *= 1 + 2**-52
    logged["value_loss"] = None
    file.write_text(json.dumps(logged))
    origin = update_folder(copy, 2) / "run.json"
    content = json.loads(origin.read_text())
    content["machine"]["torch"] = "0.4"
    origin.write_text(json.dumps(content))
    result = inspect(copy, "--update", 2, "--replay")
    assert result.code == 1
    assert differing(result) == {"policy_loss", "value_loss"}
    assert "torch 0.4 then" in result.out


def test_a_run_from_objects_asks_for_folders(tmp_path, tiny_model, tiny_tokenizer):
    """And is replayed from them; the adapter that was an object is kept with the update."""
    from rlhf.models.adapters import lora_config

    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    config = PPOConfig(
        output_dir=str(tmp_path / "run"), updates=1, rollout_size=4, minibatch_size=2, max_new_tokens=5, bf16=False,
        learning_rate=1e-3, save_rollouts=1, reward_weights=[1.0, 0.5],
    )  # fmt: skip
    score = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    adapter = lora_config(3, 6.0, target_modules=["q_proj"])
    tiny_model.name_or_path = str(policy)
    rows = [{"prompt": f"Say {i}"} for i in range(4)]
    PPOTrainer(tiny_model, [score, score], config, rows, processing_class=tiny_tokenizer, peft_config=adapter).train()
    run = tmp_path / "run"
    result = inspect(run, "--update", 1, "--replay")
    assert result.code == 2
    assert "pass --model FOLDER" in result.err
    assert inspect(run, "--update", 1, "--row", 0).code == 0
    result = inspect(run, "--update", 1, "--replay", "--model", policy)
    assert result.code == 0, result.out + result.err
    assert "score/<lambda>" in result.out


@pytest.mark.long
def test_two_processes_replay_theirs(tmp_path, tiny_model, tiny_tokenizer):
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    root = Path(__file__).parents[2]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}  # fmt: skip
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys\nfrom reference import two_processes\ntwo_processes.ppo(*sys.argv[1:4], save_rollouts=1)\n"
    )  # fmt: skip
    run = tmp_path / "run"
    options: dict[str, Any] = {"env": environment, "cwd": root, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*two, str(probe), str(policy), str(reward), str(run)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(load_rollout(update_folder(run, 2))) == 8
    alone = inspect(run, "--update", 2, "--replay", "--value_model", reward)
    assert alone.code == 2
    assert f"start it with rlhf inspect_rollout {run} --update 2 --replay --num_processes 2" in alone.err
    command = ["recipes/inspect_rollout.py", str(run), "--update", "2", "--replay", "--value_model", str(reward)]
    done = subprocess.run([*two, *command], **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("identical: every number") == 1


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((), "name the run's folder first: rlhf inspect_rollout RUN"),
        (("--update", 7), "name the run's folder first"),
        (("nowhere",), "nowhere: no such folder"),
        (("recipes",), "recipes: no rollouts were kept; train with --save_rollouts N"),
        (("RUN", "--update", 3), "--update 3: {run}/ppo kept no such update; it has 7"),
        (("RUN", "--update", "x"), "--update: expected a whole number or null, got 'x'"),
        (("RUN", "--updat", 7), "unknown flag --updat; did you mean --update?"),
        (("RUN", "--row", 1), "--row needs --update N"),
        (("RUN", "--replay"), "--replay needs --update N"),
        (("RUN", "--update", 7, "--row", 3), "--row 3: update 7 has rows 0 to 2"),
        (("RUN", "--update", 7, "--row", -1), "--row -1: update 7 has rows 0 to 2"),
        (("RUN", "--update", 7, "--sort", "size"), "--sort: expected one of score, kl, tokens or null, got 'size'"),
        (("RUN", "--update", 7, "--row", 0, "--sort", "kl"), "--row shows one response; leave out --sort"),
        (("RUN", "--update", 7, "--sort", "kl", "--replay"), "leave it out with --replay"),
        (("RUN", "--update", 7, "--html", "x.html"), "--html needs --update N and --row K"),
        (("RUN", "--html", "pages"), "--html needs --update N"),
        (("RUN", "--update", 7, "--replay", "--html", "pages"), "--html shows responses; leave it out with --replay"),
        (("RUN", "--update", 7, "--row", 0, "--html", "nowhere/x.html"), "--html nowhere/x.html: cannot be written"),
        (("RUN", "--update", 7, "--model", "x"), "--model is for --replay"),
        (("RUN", "--update", 7, "--replay"), "run.json: no such file"),
    ],
)
def test_bad_input_gets_one_line(run_folder, flags, line):
    result = inspect(*(run_folder if flag == "RUN" else flag for flag in flags))
    assert result.code == 2, result.out
    (told,) = result.err.splitlines()
    assert told.startswith("error: ")
    assert line.format(run=run_folder) in told
    assert result.out == ""


def test_broken_files_get_one_line(copy):
    def told(*flags: object) -> str:
        result = inspect(copy, "--update", 2, *flags)
        assert result.code == 2, result.out
        (line,) = result.err.splitlines()
        return line

    folder = update_folder(copy, 2)
    state = folder / "state/ppo.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    assert "state" in told("--replay")
    state.unlink()
    assert "no ppo.pt" in told("--replay")
    origin = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(origin | {"model": "/gone/model"}))
    assert "/gone/model: the run began from it and it is gone; pass --model FOLDER" in told("--replay")
    (folder / "metrics.json").write_text("{")
    assert "metrics.json: cannot be read" in told("--replay")
    shutil.rmtree(folder / "tokenizer")
    assert "tokenizer: holds no tokenizer that loads" in told("--row", 0)
    rollout = folder / "rollout-0.pt"
    rollout.write_bytes(rollout.read_bytes()[:-100])
    assert "rollout-0.pt: cut short or no saved rollout" in told()
