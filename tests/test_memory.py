"""keep_memory: large results lie on pages that the process has already."""

import platform

import pytest
from processes import python

import quant_ops as qo

SCRIPT = """
import resource, sys, torch, quant_ops as qo
if sys.argv[1] == "keep":
    qo.keep_memory()
x, scale = torch.randn(48 << 18), torch.tensor(0.05)  # 48 MiB: more than glibc ever keeps by itself
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    qo.quant_tensor_forward(x, scale, None, -128, 127)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
counts = [faults() for _ in range(16)]
print(max(counts[8:]), min(counts[8:]))  # the first calls make the holes that later results fall into
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_large_results_need_no_new_pages():
    faults = {}
    for mode in ("keep", "plain"):
        done = python("-c", SCRIPT, mode)
        assert done.returncode == 0, done.stderr
        faults[mode] = [int(count) for count in done.stdout.split()]
    assert faults["keep"][0] < 10
    assert faults["plain"][1] >= 24  # of 2 MiB at most


def test_other_libraries_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(RuntimeError, match=r"^quant_ops\.keep_memory: expected glibc, got another C library\.$"):
        qo.keep_memory()
