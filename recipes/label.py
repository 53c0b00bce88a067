"""The labelling page: people and models rank responses.

    rlhf label --store labels.db --candidates candidates.jsonl \\
        --annotators '[anna, ben]' --overlap 2
    rlhf label --store labels.db --prompts prompts.jsonl \\
        --policies '[runs/my/sft, runs/my/ppo]' --annotators '[anna]'
    rlhf label --store labels.db    # go on with what is in the store

Each annotator gets a link with a token of their own; the store keeps its hash only. Candidates are rows of `prompt` and
`responses`, or are sampled on the spot. Models and simulated labelers judge over the same API. `rlhf collected` shows
how far it is and exports rankings. There is no TLS: across a network that others use, put a proxy in front and name its
address as --link_address.
"""

from __future__ import annotations

import hashlib
import math
import random
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.incoming import check_apart, read_candidates, read_gold
from rlhf.collection.project import Project, read_project
from rlhf.collection.records import KINDS, Item, Kind, Plan
from rlhf.collection.sample import Sampling, check_sampling, sample_items
from rlhf.collection.store import Store
from rlhf.errors import InputError
from rlhf.rows.records import read_prompts
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.fingerprint import canonical, data_fingerprint, of_path
from rlhf.run.http import HttpConfig, bind, server_token
from rlhf.urls import http_address, is_url
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class LabelRecipe(LabelConfig):
    """Collecting rankings from people."""

    store: str
    """The file that holds items and judgments; made where it is missing."""
    prompts: str | None = None
    """Prompts whose candidates are sampled from `policies`."""
    policies: list[str] = field(default_factory=list)
    """Model folders, or addresses of servers of OpenAI's HTTP, which give as many candidates each."""
    candidates_per_prompt: int = 4
    """Sampled responses that are ranked together, 2 to 9."""
    max_prompts: int | None = None
    """Prompts that are used, drawn with the seed; null: all."""
    max_new_tokens: int = 256
    """Longest sampled response."""
    temperature: float = 1.0
    """Of sampling."""
    generation_batch_size: int = 64
    """Responses sampled at once."""
    bf16: bool | None = None
    """Sample in bfloat16; null: where the hardware is fast at it."""
    candidates: str | None = None
    """Rows of `prompt` and `responses` to be ranked, instead of sampling."""
    gold: str | None = None
    """Rankings whose right order is known, mixed in to see how annotators do."""
    gold_share: float | None = None
    """Share of an annotator's items that are gold ones, while there are any; null: the store's, at first 0.1."""
    project: str | None = None
    """YAML file of title, guidelines, criteria and flags; null: the store's last one, or ranking alone."""
    annotators: list[str] = field(default_factory=list)
    """Who is let in; a name, or name:model or name:simulated for those who come over the API."""
    new_links: bool = False
    """Make new links for annotators that have one, whose old ones end."""
    link_address: str | None = None
    """Address that links begin with; null: this server's."""
    overlap: int = 1
    """Annotators that judge each item."""
    calibration: int = 0
    """Items, drawn with the seed, that every annotator judges first."""
    lease_minutes: float | None = None
    """Minutes after which an item that nobody submits goes to somebody else; null: the store's, at first 30."""
    seed: int = 0
    """Decides sampling, draws, and the order in which candidates are shown."""
    output_dir: str | None = None
    """Folder for label.json, written when the server ends; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("overlap", 1), ("calibration", 0), ("max_new_tokens", 1), ("generation_batch_size", 1), ("max_prompts", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lease_minutes", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be above 0, and finite")
        if self.allow_no_token:
            raise InputError("allow_no_token: every annotator has a token here; leave the flag out")
        if self.prompts is not None and self.candidates is not None:
            raise InputError("prompts and candidates: name one of them, sampled or given responses")
        if self.prompts is not None:
            check_sampling(self.policies, self.sampling)
        elif self.policies:
            raise InputError("policies: there are no prompts to sample for; name them, --prompts prompts.jsonl")
        if self.overlap > 1 and self.prompts is None and self.candidates is None:
            raise InputError(f"overlap={self.overlap}: it is for new items; name them, --candidates or --prompts")
        names = [named(text)[0] for text in self.annotators]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"annotators: {twice} is named twice; name each once")
        if self.link_address is not None:
            http_address(self.link_address, "link_address")
        self.plan(Plan())

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            candidates_per_prompt=self.candidates_per_prompt, max_new_tokens=self.max_new_tokens, seed=self.seed,
            temperature=self.temperature, batch_size=self.generation_batch_size, bf16=self.bf16,
        )  # fmt: skip

    def plan(self, kept: Plan) -> Plan:
        """Return the store's plan, with what is given here in place of its own."""
        lease = kept.lease_seconds if self.lease_minutes is None else 60 * self.lease_minutes
        return replace(
            kept, lease_seconds=lease, gold_share=kept.gold_share if self.gold_share is None else self.gold_share
        )


def serve(config: LabelRecipe) -> None:
    """Fill the store, invite, answer until SIGTERM or Ctrl-C; what was taken on by then is still answered."""
    names = [named(text) for text in config.annotators]
    project = read_project(config.project) if config.project else None
    token = server_token(HttpConfig(token_file=config.token_file, allow_no_token=True))
    listening = bind(config.host, config.port)  # before anything is sampled: a port in use is told at once
    with Store(config.store) as store:
        if not names and not any(known.invited for known in store.annotators()) and token is None:
            raise InputError("annotators: nobody could enter; name who may, --annotators '[anna, ben]'")
        add_items(store, config)
        if project is not None:
            store.put_setting("label.project", project.to_json())
        project = Project.from_json(store.setting("label.project", Project().to_json()))
        address = config.link_address or _address(config.host, listening.getsockname()[1])
        app = create_app(store, project, behind_proxy(config), invitations=token)
        invite(store, names, address.rstrip("/"), config.new_links)
        from rlhf.run.connections import BACKLOG, run

        listening.listen(BACKLOG)  # who comes at the next line waits for the moment that the server takes to start
        console.stage_line("server", f"labels for {config.store} on {address}; Ctrl-C or SIGTERM ends it")
        run(app, config, listening)
        finish(store, config)


def behind_proxy(config: LabelRecipe) -> LabelRecipe:
    """Return the config of a server that also answers to the name in its links, where a proxy stands before it."""
    if config.link_address is None:
        return config
    host = http_address(config.link_address, "link_address").host
    return replace(config, allowed_hosts=[*(config.allowed_hosts or ()), *([] if ":" in host else [host])])


def named(text: str) -> tuple[str, Kind]:
    """Read an annotator's name, and kind where one is given: anna, grader:model."""
    name, _, kind = text.rpartition(":")
    return (name, kind) if name and kind in KINDS else (text, "person")  # type: ignore[return-value]


def add_items(store: Store, config: LabelRecipe) -> None:
    """Put into the store what the config names, unless it was put there before, and how it is handed out."""
    store.set_plan(config.plan(store.plan))
    if config.prompts is None and config.candidates is None and config.gold is None:
        if not store.items():
            seen = f"nothing is to be labelled in {config.store}: check the path, or name --candidates or --prompts"
            console.stage_line("warning", seen)
        return
    asked = hashlib.sha256(canonical(asked_for(config))).hexdigest()
    added = store.setting("label.added", [])
    gold = read_gold(config.gold) if config.gold is not None else []
    if asked in added:
        console.stage_line("items", f"{config.store} has them already")
        _add_gold(store, gold)  # which may have been corrected in between, and back
        return
    items: list[Item] = []
    if config.candidates is not None:
        items = _drawn(read_candidates(config.candidates), config)
    elif config.prompts is not None:
        prompts = _drawn(read_prompts(config.prompts), config)
        console.stage_line("items", f"{config.candidates_per_prompt} candidates for each of {len(prompts)} prompts")
        items = sample_items(prompts, config.policies, config.sampling, config.prompts)
    check_apart(items, gold)
    if config.calibration > len(items):
        raise InputError(f"calibration={config.calibration}: there are {len(items)} items; lower it")
    store.set_plan(replace(store.plan, seed=config.seed))
    first = set(random.Random(f"{config.seed}|calibration").sample(range(len(items)), config.calibration))
    store.add_items([items[n] for n in sorted(first)], line="calibration")
    store.add_items([item for n, item in enumerate(items) if n not in first], overlap=config.overlap)
    _add_gold(store, gold)
    store.put_setting("label.added", [*added, asked])
    console.stage_line("items", f"{len(items)} to label, {len(first)} of them for everybody first; {len(gold)} gold")


def _add_gold(store: Store, gold: list[Item]) -> None:
    """Store gold items; those that are there get the ranks that the file has now."""
    before = {item.id: item.gold_ranks for item in store.items()}
    store.add_items(gold, line="gold")
    corrected = sum(item.id in before and before[item.id] != item.gold_ranks for item in store.items())
    if corrected:
        console.stage_line("items", f"{corrected} gold items corrected")


def asked_for(config: LabelRecipe) -> dict[str, Any]:
    """Return what decides the items that are added: the files' contents, the policies, the settings."""
    sources = {name: getattr(config, name) for name in ("prompts", "candidates", "gold")}
    files = {name: data_fingerprint(path) for name, path in sources.items() if path is not None}
    policies = [policy if is_url(policy) else of_path(policy) for policy in config.policies]
    sampling = configs.to_dict(config.sampling, without=("batch_size",)) if config.prompts else {}
    names = ("max_prompts", "overlap", "calibration", "seed")
    return {**files, "policies": policies, **sampling, **{name: getattr(config, name) for name in names}}


def _drawn(rows: list[Any], config: LabelRecipe) -> list[Any]:
    """Take `max_prompts` of the rows, drawn with the seed, in their order; the log counts what is left out."""
    if config.max_prompts is None or config.max_prompts >= len(rows):
        return rows
    console.stage_line("items", f"max_prompts={config.max_prompts:,} of {len(rows):,} drawn")
    chosen = sorted(random.Random(f"{config.seed}|prompts").sample(range(len(rows)), config.max_prompts))
    return [rows[n] for n in chosen]


def invite(store: Store, names: list[tuple[str, Kind]], address: str, renew: bool) -> None:
    """Print a link, or a token for those who come over the API, for everybody who has none yet."""
    invited = {known.name for known in store.annotators() if known.invited}
    for name, kind in names:
        if name in invited and not renew:
            console.stage_line("invite", f"{name} has a link already; --new_links true makes another")
            continue
        token = store.invite(name, kind)
        way = f"{address}/#invite={token}" if kind == "person" else f"a {kind} at {address} with the token {token}"
        console.stage_line("invite", f"{name}: {way}")


def finish(store: Store, config: LabelRecipe) -> None:
    """Say how much was judged, and write label.json."""
    judgments, items = len(store.judgments()), len(store.items())
    if config.output_dir is not None:
        metrics = {"judgments": {"value": judgments, "low": None, "high": None, "n": items}}
        people = {known.name: vars(store.progress(known.name)) for known in store.annotators()}
        write_json_atomic(Path(config.output_dir) / "label.json", {"metrics": metrics, "annotators": people})
    console.stage_line("server", f"ended; {judgments} judgments of {items} items are in {config.store}")
    console.stage_line("next", f"rlhf collected status --store {config.store}")


def _address(host: str, port: int) -> str:
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def main(argv: list[str]) -> None:
    serve(configs.load(LabelRecipe, argv, section="label", known_sections=SECTIONS, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
