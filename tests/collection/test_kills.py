"""Writers killed by SIGKILL at any moment: no acknowledged judgment is lost, none is stored twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from reference.labelling import items

from rlhf.collection.store import Plan, Store

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("writers", "kills"), [pytest.param(4, 20, id="20"), pytest.param(8, 200, id="200", marks=pytest.mark.long)]
)
def test_no_acknowledged_judgment_is_lost_and_none_doubled(tmp_path, writers, kills):
    path, notes = tmp_path / "labels.db", tmp_path / "notes"
    notes.mkdir()
    with Store(path) as store:
        store.set_plan(Plan(lease_seconds=0.5, gold_share=0.0))  # the killed one's items go on to others
        store.add_items(items(100 * kills, 2), overlap=2)
        for n in range(writers):
            store.add_annotator(f"writer {n}")
    script = ROOT / "tests/reference/labelling_writers.py"
    done = subprocess.run(
        [sys.executable, script, path, notes, str(writers), str(kills), "0"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["killed"] == kills
    noted = [json.loads(line) for file in notes.glob("writer *") for line in file.read_text().splitlines()]
    acknowledged = {line[1]: line[2] for line in noted if line[0] == "stored"}
    assert len(acknowledged) > writers
    with Store(path, create=False) as store:  # checks the file's pages, too
        stored = store.judgments(superseded=True)
        assert acknowledged == {said.submission: said.id for said in stored}
        assert max(Counter((said.item, said.annotator) for said in stored).values()) == 1
        assert max(Counter(said.item for said in stored).values()) == 2
        with store.reading() as db:
            wrong = db.execute(
                "SELECT count(*) FROM items WHERE places != overlap - (SELECT count(*) FROM assignments"
                " WHERE item = items.id AND state IN ('leased', 'done'))"
            ).fetchone()[0]
    assert wrong == 0
