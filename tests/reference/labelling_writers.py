"""Writers of one store that are killed at any moment, and what they were told.

    python tests/reference/labelling_writers.py STORE NOTES WRITERS KILLS SEED

Forks so many writers, each an annotator who leases and submits for ever; kills one at a random moment with SIGKILL and
forks it again, so many times; then lets them finish. A writer notes in a file of its own what it is about to send, and
what was acknowledged, as a client would: one that comes back sends what was not acknowledged once more.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import uuid
from pathlib import Path

from rlhf.collection.store import Answer, HandedOn, Store


def note(file: int, *line: object) -> None:
    os.write(file, (json.dumps(line) + "\n").encode())


def write(path: Path, notes: Path, name: str, stop: Path) -> None:
    """Judge until nothing is left or the file `stop` is there."""
    file = os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with Store(path, create=False) as store:
        lines = [json.loads(line) for line in (notes / name).read_text().splitlines()]
        acknowledged = {line[1] for line in lines if line[0] in ("stored", "refused")}
        pending = [line[2] for line in lines if line[0] == "send" and line[1] not in acknowledged]
        for content in pending:
            send(store, name, file, Answer.from_json(content))
        while not stop.exists() and (tasks := store.lease(name)):
            ranks = {shown.id: n for n, shown in enumerate(tasks[0].candidates)}
            answer = Answer(assignment=tasks[0].assignment, submission=uuid.uuid4().hex, ranks=ranks)
            note(file, "send", answer.submission, answer.to_json())
            send(store, name, file, answer)


def send(store: Store, name: str, file: int, answer: Answer) -> None:
    try:
        said = store.submit(name, answer)
    except HandedOn:
        note(file, "refused", answer.submission)
        return
    note(file, "stored", answer.submission, said.id)


def main(path: Path, notes: Path, writers: int, kills: int, seed: int) -> None:
    draw, stop, children = random.Random(seed), notes / "stop", dict[str, int]()

    def start(name: str) -> None:
        child = os.fork()
        if not child:
            try:
                write(path, notes, name, stop)
            except BaseException as error:
                print(f"{name}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children[name] = child

    for n in range(writers):
        start(f"writer {n}")
    codes = []
    for _ in range(kills):
        time.sleep(draw.uniform(0.001, 0.04))
        name = draw.choice(sorted(children))
        os.kill(children[name], signal.SIGKILL)
        codes.append(os.waitpid(children[name], 0)[1])
        start(name)
    time.sleep(0.1)
    stop.touch()
    for child in children.values():
        code = os.waitpid(child, 0)[1]
        assert code == 0, code
    print(json.dumps({"killed": codes.count(signal.SIGKILL), "ended by themselves": codes.count(0)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
