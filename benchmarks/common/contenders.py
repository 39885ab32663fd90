"""A contender is checked before it is timed: its result must be close enough to a reference."""

import warnings

import torch

from quant_ops.report.error import sqnr


def prepare(contenders, *arguments, reference, least):
    """(the calls, their distances from the reference in dB, and why contenders are missing).

    A contender makes a call from the arguments. If it cannot, or if its result is no more than `least` dB from the reference, it is
    missing; one of ours must not be.
    """
    calls, distances, missing = {}, {}, {}
    for name, contender in contenders.items():
        try:
            with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
                warnings.simplefilter("ignore")  # torch.ao announces its removal
                call = contender(*arguments)
            with torch.inference_mode():
                distance = sqnr(reference, torch.as_tensor(getattr(call, "result", call)()))
            if not distance > least:
                raise ArithmeticError(f"{distance:.1f} dB from float32, expected more than {least:.0f}")
            calls[name], distances[name] = call, distance
        except Exception as error:
            if name.startswith("ours"):
                raise
            missing[name] = in_one_line(error)
    return calls, distances, missing


def in_one_line(error):
    """The kind of an exception and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
