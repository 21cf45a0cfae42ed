"""What the allocator keeps of freed memory, seen by the pages that the system has to bring in again."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from walt.heap import keep_freed_memory, return_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
def work():  # in megabytes; sizes change from round to round, as those of packs do
    for n in range(6):
        [torch.ones(40 + 3 * n, 2**18), torch.ones(37 - n, 2**18)]

for _ in range(4):  # where the heap cannot grow in one piece, one round may leave gaps that do not fit the next
    work()
before = faults()
work()
print(faults() - before)
return_freed_memory()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    again = {}
    for name in ("keep", "own way"):
        made = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True)
        again[name] = [int(line) for line in made.stdout.split()]
    pages = 77 * 2**20 // resource.getpagesize()  # of one round
    assert again["own way"][0] > pages
    assert again["keep"][0] < pages / 10
    assert again["keep"][1] > pages / 2
