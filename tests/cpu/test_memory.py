"""What is asked of glibc, in a process of its own: freed memory goes back, and large blocks stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from rlhf.cpu import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
held = [torch.ones(2**18) for _ in range(300)]  # 1 MiB each
torch.ones(2**22)  # a freed 16 MiB block raises glibc's threshold
held = [torch.ones(2**18) for _ in range(300)][::50]  # what is left keeps the heap's end in use
before = resident()
memory.release_freed_memory()
released = before - resident()
plain = faults()
memory.keep_large_blocks()
torch.ones(2**22)
print(released, plain, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back_and_large_blocks_stay():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    released, plain, kept = map(float, done.stdout.split())
    assert released > 100
    assert kept < 0.2 * plain + 200
