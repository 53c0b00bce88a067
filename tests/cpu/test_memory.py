"""What is asked of glibc, in a process of its own: freed memory goes back, and large blocks stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf.cpu import memory

PROBE = """
import resource, torch
from rlhf import memory

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back_and_large_blocks_stay():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    released, plain, kept = map(float, done.stdout.split())
    assert released > 100
    assert kept < 0.2 * plain + 200


THREADS = """
import ctypes, re, sys, tempfile, threading
from rlhf import memory

def heaps():
    libc = ctypes.CDLL(None)
    libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.fclose.argtypes = (ctypes.c_void_p,)
    with tempfile.NamedTemporaryFile() as file:
        stream = libc.fopen(file.name.encode(), b"w")
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return file.read().count(b"<heap nr=")

if sys.argv[1] == "ours":
    memory.keep_large_blocks()
before, barrier = heaps(), threading.Barrier(3)

def work():
    held = [bytes(5000) for _ in range(100)]
    barrier.wait()  # all hold memory at once
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
barrier.wait()
print(heaps() - before)
barrier.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_share_one_heap():
    def new_heaps(kind: str) -> int:
        run = [sys.executable, "-c", THREADS, kind]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    assert new_heaps("ours") == 0
    assert new_heaps("glibc's own") == 2


@pytest.mark.parametrize("function", [memory.release_freed_memory, memory.keep_large_blocks])
def test_elsewhere_nothing_is_done(function, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert function() is None
