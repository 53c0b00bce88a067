"""What is asked of glibc, in a process of its own: freed memory goes back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from rlhf.models import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

torch.set_num_threads(1)
held = [torch.ones(2**18) for _ in range(300)]  # 1 MiB each
torch.ones(2**22)  # a freed 16 MiB block raises glibc's threshold
held = [torch.ones(2**18) for _ in range(300)][::50]  # what is left keeps the heap's end in use
before = resident()
memory.release_freed_memory()
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 100
