"""Several processes: the main one acts, all get its result or its error."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from reference import forked

from rlhf.run import owner
from rlhf.run.owner import by_main, is_main, processes

CODE = """
import functools, json, os, pathlib, sys, time
from rlhf.errors import InputError, RunStopped
from rlhf.run import lock
from rlhf.run.owner import by_main, is_main, processes, waited_for
from rlhf.run.sharing import share
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
assert processes() == 2 and is_main() == (rank == 0)
(folder / f"here-{rank}").touch() if time.sleep(rank * 0.5) is None else None
seen = [by_main(lambda: sorted(path.name for path in folder.glob("here-*")))]  # both are here before it acts
seen.append(by_main(lambda: by_main(lambda: rank)))  # a stage that only the main process runs
def fail(error):
    raise error
for error in (InputError("a b"), RunStopped("c"), OSError("d")):
    try:
        by_main(lambda: fail(error))
    except Exception as raised:
        seen.append([type(raised).__name__ if not isinstance(raised, OSError) else "InputError", str(raised)])
with lock.training_in(folder / "run"):
    seen.append(by_main(lambda: (folder / "run" / ".lock").exists()))
seen.append(by_main(lambda: (folder / "run" / ".lock").exists()))
def ranked(parts, wrong=None):
    by_main(lambda: None)  # inside shared work nobody waits for anybody, and nothing is shared out
    assert not waited_for()
    if rank == 1 and wrong:
        fail(wrong)
    return [[part, rank] for part in parts]
def caught():
    try:
        return share(functools.partial(ranked, wrong=RunStopped("e")), range(3))
    except RunStopped as error:
        return str(error)
def unsent():
    try:
        share(lambda_of_one, range(2))
    except InputError as error:
        return "pickle" in str(error), len(share(lambda_of_main, range(2)))
def lambda_of_one(parts):
    return [(lambda: 0) if rank else 0 for _ in parts]
def lambda_of_main(parts):
    return [0 if rank else lambda: 0 for _ in parts]
seen += [by_main(lambda: share(ranked, range(3))), by_main(lambda: [caught(), share(ranked, range(2))])]
seen.append(share(ranked, range(2)))
try:
    by_main(lambda: share(functools.partial(ranked, wrong=KeyError("f")), range(3)))
except Exception as raised:
    seen.append([type(raised).__name__, str(raised)])
seen.append(by_main(unsent))
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
"""


def test_the_main_process_acts_once_all_are_there(tmp_path: Path) -> None:
    done = forked.shared().together(["-c", CODE, tmp_path])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert one[:4] == [["here-0", "here-1"], 0, ["InputError", "a b"], ["RunStopped", "c"]]
    assert two[:4] == one[:4]
    assert two[4] == ["InputError", "OSError: d"]
    assert one[5:7] == two[5:7] == [True, False]
    assert one[7:9] == two[7:9] == [[[0, 0], [1, 1], [2, 0]], ["e", [[0, 0], [1, 1]]]], "the work is shared out"
    assert [one[9], two[9]] == [[[0, 0], [1, 0]], [[0, 1], [1, 1]]], "where nobody waits, each does its own"
    assert [one[10], two[10]] == [["InputError", "KeyError: 'f'"], ["KeyError", "'f'"]]
    assert one[11] == two[11] == [True, 2], "the main process need not send its own; others tell that they cannot"


def test_one_process_just_acts() -> None:
    assert processes() == 1
    assert is_main()
    assert by_main(lambda: 3) == 3


def test_nccl_waits_longer_than_ten_minutes(monkeypatch) -> None:
    """In the group that it makes where nobody has made one: what a process does alone may take longer."""
    given: dict[str, object] = {}

    def state(**settings: object) -> None:
        given.update(settings)

    monkeypatch.setattr("accelerate.PartialState", state)
    with pytest.raises(ValueError, match="has not been initialized"):
        owner._group()
    assert given["timeout"] == timedelta(hours=2)
