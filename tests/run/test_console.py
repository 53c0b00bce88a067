"""What a stage's line shows at which width: in text, and on a terminal as its screen would show it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from rlhf.run import console

NUMBERS = {"score": 0.513, "kl_nats": 1.932, "clip_fraction": 0.01234, "explained_variance": 0.334}
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def clock(monkeypatch):
    """Seconds as the test says."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    return Clock


def line(bar: console.StageBar, width: int) -> str:
    return "".join(bar.line(width))


def test_count_and_time_left_come_first_and_numbers_drop_from_the_right(clock) -> None:
    bar = console.StageBar("ppo", 28, 4)
    clock.now += 60.0
    bar.update(12)  # 8 steps in 60 s: 16 more take 120 s
    bar.show(NUMBERS)
    head = "ppo           12/28  2m00s left"
    assert line(bar, 200) == f"{head}  score 0.513  kl_nats 1.93  clip_fraction 0.0123  explained_variance 0.334"
    assert line(bar, 80) == f"{head}  score 0.513  kl_nats 1.93  clip_fraction 0.0123"
    assert line(bar, 78) == f"{head}  score 0.513  kl_nats 1.93"
    assert line(bar, 40) == "ppo  12/28  2m00s left  score 0.513"
    assert line(bar, 20) == "ppo  12/28  2m00s left"
    clock.now += 30.0  # of the step in hand
    assert line(bar, 20) == "ppo  12/28  1m30s left"
    bar.update(28)
    clock.now += 5.0
    assert line(bar, 20) == "ppo  28/28  1m35s"


def test_before_the_first_step_the_time_is_what_has_passed(clock) -> None:
    bar = console.StageBar("sft", 6, 2)
    clock.now += 7.0
    assert line(bar, 80) == "sft           2/6  7s"


def test_without_a_terminal_a_line_comes_now_and_then_with_every_number(clock, capsys) -> None:
    bar = console.StageBar("ppo", 4, every=15.0)
    for step in range(1, 5):
        clock.now += 10.0
        bar.show(NUMBERS)
        bar.update(step)
    bar.close()
    bar.close()
    shown = "score 0.513  kl_nats 1.93  clip_fraction 0.0123  explained_variance 0.334"
    assert capsys.readouterr().out.splitlines() == [
        f"ppo           2/4  20s left  {shown}",
        f"ppo           4/4  40s  {shown}",
    ]


SCRIPT = """
import logging, time
from rlhf.run import console
console.quiet()
bar = console.StageBar("ppo", 3)
for step in range(1, 4):
    time.sleep(0.3)
    bar.update(step)
    bar.show({"score": 0.513, "kl_nats": 1.932, "clip_fraction": 0.01234, "explained_variance": 0.334})
    if step == 2:
        logging.getLogger("rlhf").warning("look at this")
bar.close()
console.stage_line("ppo", "done")
"""


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_one_line_is_kept_up_to_date(columns: int) -> None:
    out = on_terminal([sys.executable, "-c", SCRIPT], columns)
    drawn = [line for line in re.split(r"[\r\n]+", CODES.sub("", out)) if re.match(r"ppo +\d/3", line)]
    assert len(drawn) >= 3
    for text in drawn:
        assert len(text) <= columns
        assert re.match(r"ppo +[0-3]/3  \d+s( left)?( |$)", text), text
        assert set(re.findall(r"([a-z_]+) [\d.]+(?:  |$)", text)) <= {"score", "kl_nats", "clip_fraction"}, "cut"
    assert drawn[-1].startswith("ppo           3/3" if columns == 80 else "ppo  3/3")
    assert "score 0.513" in drawn[-1]
    assert out.count("look at this") == 1
    assert re.sub(r"\s+", " ", CODES.sub("", out)).strip().endswith("ppo done")
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1, "the cursor is given back"


def on_terminal(command: list[str], columns: int) -> str:
    """What a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm-256color"}
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            piece = b""
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(60) == 0
    return written.decode()


def test_only_the_first_process_speaks(capfd) -> None:
    code = (
        "from rlhf.run import console; import logging; console.quiet(); console.stage_line('sft', 'done')\n"
        "logging.getLogger('rlhf').info('all well'); logging.getLogger('rlhf').warning('row 3 is odd')"
    )
    for rank, expected in (
        ("0", ["sft done", "INFO all well", "WARNING row 3 is odd"]),
        ("1", ["WARNING row 3 is odd"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"RANK": rank}
        )  # fmt: skip
        assert [" ".join(line.split()) for line in done.stdout.splitlines()] == expected, done.stderr
