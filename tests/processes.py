"""Runs a piece of code in two processes of one gloo group, on the CPU."""

import subprocess
import sys
import textwrap

PRELUDE = """
import os, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import quant_ops as qo

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


def refused(kind, words, call, *args):
    try:
        call(*args)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"expected {kind.__name__}: {words}")


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


"""
END = """
dist.barrier()
os._exit(0)
"""


def in_two_processes(folder, body):
    """Runs the body in both; each has to print "done" and nothing else."""
    script = folder / "worker.py"
    script.write_text(PRELUDE + textwrap.dedent(body) + 'print("done", flush=True)\n' + END)
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [worker.communicate(timeout=300) for worker in workers]
    assert [(out.strip(), worker.returncode) for (out, _), worker in zip(results, workers, strict=True)] == [("done", 0)] * 2, (
        results
    )
