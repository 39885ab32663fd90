"""``int8_chain``: many steps of int8 operators in one call. On CUDA and for fake tensors the steps run one by one in Python.

Programs are made and explained by ``quant_ops/ops/program.py``; the CPU's checks are in ``cpp/torch/chain*.h``, its run in
``cpp/cpu/chain.cpp``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_ops.ops._register import call, inference_only, register_kernel
from quant_ops.ops.program import Program, run_steps

_ops = torch.ops.quant_ops


def int8_chain(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: Sequence[int]) -> list[Tensor]:
    """Runs a chain of int8 operators in one call, with the bits of its steps called one by one.

    On the CPU nothing of torch runs between the steps, their values share one piece of memory, and a batch is cut so that samples
    stay in the cache from step to step; with several threads each thread takes samples of its own. Plans are kept for the last
    64 programs and shapes of inputs.

    Args:
        inputs: the first values.
        constants: what the steps read beside values: scales, zero points, biases and packed weights, on the inputs' device.
        program: of ``quant_ops.ops.program.Program.encode``.

    Returns:
        The values that the program names as its results; those of four dimensions are channels_last.

    Raises:
        TypeError: a dtype that a step does not take.
        ValueError: a list that encodes no program, another number of inputs, or what a step refuses.
        RuntimeError: a gradient is asked for.
    """
    return call(_ops.int8_chain.default, list(inputs), list(constants), program)


def _one_by_one(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: Sequence[int]) -> list[Tensor]:
    return run_steps(Program.decode(program), inputs, constants)


register_kernel("int8_chain", _one_by_one, "CUDA")
torch.library.register_fake("quant_ops::int8_chain", _one_by_one)
inference_only("int8_chain")
