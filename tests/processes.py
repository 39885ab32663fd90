"""Python in processes of its own: forked from a server that has imported torch, which would take each of them seconds.

multiprocessing's fork server starts with the first of them, and with it the libraries that torch brings: a variable that those read
when they are loaded (OMP_NUM_THREADS) is that of the tests. Nothing of quant_ops is in it.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import textwrap
import traceback
import types
from pathlib import Path
from subprocess import CompletedProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch"])


class Started:
    """A process that runs ``python *arguments``: -c CODE, -m MODULE or a file, each with arguments of its own."""

    def __init__(self, *arguments, cwd=None, environment=None):
        self.arguments = [str(argument) for argument in arguments]
        self.output = tempfile.TemporaryDirectory()
        environment = dict(os.environ if environment is None else environment)
        self.process = _CONTEXT.Process(target=_run, args=(self.arguments, environment, str(cwd or os.getcwd()), self.output.name))
        self.process.start()

    def result(self, timeout=240):
        """As ``subprocess.run`` gives it, once the process has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self.output as folder:
            out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return CompletedProcess(self.arguments, self.process.exitcode, out, err)


def python(*arguments, timeout=240, **where):
    return Started(*arguments, **where).result(timeout)


def _run(arguments, environment, cwd, output):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        _main(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _main(kind, *arguments):
    if kind == "-m":
        module, *arguments = arguments
        sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *arguments = arguments
        sys.argv, sys.path[0] = [kind, *arguments], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = [kind, *arguments], str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


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
    workers = [Started(script, rank, folder) for rank in range(2)]
    results = [worker.result() for worker in workers]
    assert [(done.stdout.strip(), done.returncode) for done in results] == [("done", 0)] * 2, results
