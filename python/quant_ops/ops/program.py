"""What ``int8_chain`` runs: a program, which is a list of steps over numbered values, and the list of integers that encodes it.

The inputs are values 0, 1, ..., and step i gives the value after those of the steps before it. A step is an operator of the package
with its arguments taken apart: values by number, tensors (scales, zero points, biases, packed weights) by their index among the
constants, None for one that is absent, and numbers, -1 for one that is absent. ``STEPS`` has the names and the order of all.

Each tensor and each integer that an operator takes costs the call a tenth of a microsecond. So scales and zero points can lie
together, where :func:`element` names one of them, and the encoding has eight bytes an integer.

Values of four dimensions lie in channels_last. :func:`run_steps` is the reference: each step by the operator of its name.
cpp/cpu/chain.cpp gives the same bits on the CPU.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from quant_ops.ops import int8

DTYPES = (torch.int8, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
"""An ``out_dtype`` is an index of it. int8 and uint8 go with an ``out_scale``, the others without."""

ACTIVATIONS = (None, *int8.ACTIVATIONS)
"""An ``activation`` is an index of it."""

_VERSION = 1  # of the encoding
_ELEMENT = 1 << 24  # constants below it are whole tensors


def element(index: int, position: int) -> int:
    """The constant that is one element of the constant ``index``, a tensor of one dimension."""
    return (position + 1) * _ELEMENT + index


@dataclass(frozen=True)
class Signature:
    """The arguments of an operation, in the order in which a step lists them."""

    code: int  # what stands for it in the encoding
    values: tuple[str, ...]
    constants: tuple[str, ...]
    numbers: tuple[str, ...]
    optional: tuple[str, ...] = ()  # the values and constants that may be absent


_OUT = ("out_scale", "out_zero_point")
_PRODUCT = (
    *("packed_weight", "weight_scale", "bias", "x_scale", "x_zero_point", *_OUT, "residual_scale", "residual_zero_point"),
    "weight",
)
_PRODUCT_OPTIONAL = ("residual", "packed_weight", "bias", *_PRODUCT[3:])
_X = ("x_scale", "x_zero_point", *_OUT)
_MAY_LACK = ("x_zero_point", *_OUT)
_TWO = (
    ("a_scale", "b_scale", "a_zero_point", "b_zero_point", *_OUT),
    ("out_dtype", "activation"),
    ("a_zero_point", "b_zero_point", *_OUT),
)
_WINDOW = ("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w")

STEPS = {
    # quant_tensor_forward with simulate=False: to codes; scale and zero point have one element
    "quantize": Signature(0, ("x",), ("scale", "zero_point"), ("qmin", "qmax"), ("zero_point",)),
    # A CPU reads the packed weight alone; CUDA reads the weight too. O, C, R, S are the sizes of the weight.
    "conv2d": Signature(
        1,
        ("x", "residual"),
        _PRODUCT,
        (
            *("O", "C_per_group", "R", "S", "stride_h", "stride_w", "top", "bottom", "left", "right", "dilation_h", "dilation_w"),
            *("groups", "out_dtype", "activation"),
        ),
        _PRODUCT_OPTIONAL,
    ),
    "linear": Signature(2, ("x", "residual"), _PRODUCT, ("N", "K", "out_dtype", "activation"), _PRODUCT_OPTIONAL),
    "add": Signature(3, ("a", "b"), *_TWO),
    "requantize": Signature(4, ("x",), _X, ("out_dtype", "activation"), _MAY_LACK),
    "max_pool2d": Signature(5, ("x",), (), (*_WINDOW, "dilation_h", "dilation_w", "ceil_mode")),
    "avg_pool2d": Signature(
        6, ("x",), _X, (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override", "out_dtype"), _MAY_LACK
    ),
    "adaptive_avg_pool2d": Signature(7, ("x",), _X, ("output_h", "output_w", "out_dtype"), _MAY_LACK),
    # any number n of values; the constants are n scales, n zero points (or None), out_scale, out_zero_point
    "cat": Signature(8, ("tensors",), ("scales", "zero_points", *_OUT), ("dim", "out_dtype")),
    "upsample_nearest2d": Signature(9, ("x",), (), ("scale_h", "scale_w")),
    # from start_dim on to the last dimension, in the order of torch.flatten, in whichever memory format the value lies
    "flatten": Signature(10, ("x",), (), ("start_dim",)),
    "dequantize": Signature(11, ("x",), ("scale", "zero_point"), ("dtype",), ("zero_point",)),
    "mul": Signature(12, ("a", "b"), *_TWO),  # b has a's shape, or (N, C, 1, 1) with an image a
    # of a dimension the part [start, start + length)
    "slice": Signature(13, ("x",), (), ("dim", "start", "length")),
    # channel c of `groups` groups of n goes to (c % n) * groups + c / n, as torch.nn.ChannelShuffle moves it
    "channel_shuffle": Signature(14, ("x",), (), ("groups",)),
}
_NAMES = {signature.code: name for name, signature in STEPS.items()}


def _refuse(expected: str, got: object) -> NoReturn:
    raise ValueError(f"quant_ops.int8_chain: expected {expected}, got {got}.")


@dataclass(frozen=True)
class Step:
    """One operation: values by number, constants by index or :func:`element` (None: absent) and numbers, each in the order of
    ``STEPS[op]``.

    An absent residual is left out of the inputs.
    """

    op: str
    inputs: tuple[int, ...]
    constants: tuple[int | None, ...] = ()
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.op not in STEPS:
            _refuse(f"op in {tuple(STEPS)}", repr(self.op))
        signature = STEPS[self.op]
        most = len(self.inputs) if self.op == "cat" else len(signature.values)
        least = max(1, most) - ("residual" in signature.optional)
        if not least <= len(self.inputs) <= max(1, most):
            _refuse(f"{least} to {most} inputs of {self.op}", len(self.inputs))
        constants = 2 * len(self.inputs) + 2 if self.op == "cat" else len(signature.constants)
        if len(self.constants) != constants:
            _refuse(f"{constants} constants of {self.op}", len(self.constants))
        if len(self.numbers) != len(signature.numbers):
            _refuse(f"the numbers {signature.numbers} of {self.op}", self.numbers)
        for name, index in self.named_constants().items():
            if index is None and name not in signature.optional and self.op != "cat":
                _refuse(f"{name} of {self.op}", None)

    def named_constants(self) -> dict[str, int | None]:
        return {} if self.op == "cat" else dict(zip(STEPS[self.op].constants, self.constants, strict=True))

    def named_numbers(self) -> dict[str, int]:
        return dict(zip(STEPS[self.op].numbers, self.numbers, strict=True))


@dataclass(frozen=True)
class Program:
    """Steps over ``inputs`` inputs, and the numbers of the values that are the results."""

    steps: tuple[Step, ...]
    inputs: int
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        if self.inputs < 1:
            _refuse("at least one input", self.inputs)
        for i, step in enumerate(self.steps):
            if any(not 0 <= value < self.inputs + i for value in step.inputs):
                _refuse(f"step {i} ({step.op}) to read values below {self.inputs + i}", step.inputs)
            if any(index is not None and index < 0 for index in step.constants):
                _refuse(f"indices of constants >= 0 in step {i} ({step.op})", step.constants)
        if len(set(self.outputs)) != len(self.outputs):
            _refuse("outputs that differ", self.outputs)
        if not self.outputs or any(not self.inputs <= value < self.inputs + len(self.steps) for value in self.outputs):
            _refuse("outputs that are values of steps", self.outputs)

    def encode(self) -> list[int]:
        """The list of integers that ``int8_chain`` takes."""
        numbers = [_VERSION, self.inputs, len(self.outputs), *self.outputs, len(self.steps)]
        for step in self.steps:
            numbers += [STEPS[step.op].code, len(step.inputs), len(step.constants), len(step.numbers), *step.inputs]
            numbers += [-1 if index is None else index for index in step.constants]
            numbers += step.numbers
        return _as_words(numbers)

    @staticmethod
    def decode(code: Sequence[int]) -> "Program":
        """The program of an encoding.

        Raises:
            ValueError: the list is none.
        """
        return _decode(tuple(code))

    def last_uses(self) -> list[list[int]]:
        """For each step the values that no later step reads and that are no results."""
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            last |= dict.fromkeys((*step.inputs, self.inputs + i), i)
        ends: list[list[int]] = [[] for _ in self.steps]
        for value, i in last.items():
            if value not in self.outputs:
                ends[i].append(value)
        return ends


def _as_words(numbers: Sequence[int]) -> list[int]:
    """The length in bytes, then the bytes, eight to an integer.

    A byte has seven bits of a number, the lowest first, and its eighth is set if more follow. The lowest bit of all tells whether
    the number is the complement of the others.
    """
    code = bytearray()
    for number in numbers:
        rest = 2 * number if number >= 0 else -2 * number - 1
        while rest >= 128:
            code.append(rest & 127 | 128)
            rest >>= 7
        code.append(rest)
    length = len(code)
    code += bytes(-length % 8)
    return [length, *(int.from_bytes(code[i : i + 8], "little", signed=True) for i in range(0, len(code), 8))]


def _numbers_of(words: Sequence[int]) -> Iterator[int]:
    length, *rest = words
    number = shift = 0
    for byte in b"".join(word.to_bytes(8, "little", signed=True) for word in rest)[:length]:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number >> 1 if number % 2 == 0 else -(number >> 1) - 1
            number = shift = 0


@functools.lru_cache(maxsize=64)
def _decode(code: tuple[int, ...]) -> Program:
    rest = _numbers_of(code)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(rest) for _ in range(count))

    try:
        version, inputs = take(2)
        if version != _VERSION:
            _refuse(f"a program of version {_VERSION}", f"one of version {version}")
        outputs = take(next(rest))
        steps = []
        for _ in range(next(rest)):
            operation, values, constants, numbers = take(4)
            if operation not in _NAMES:
                _refuse(f"operations numbered 0 to {len(_NAMES) - 1}", operation)
            indices = (take(values), tuple(None if index == -1 else index for index in take(constants)))
            steps.append(Step(_NAMES[operation], *indices, take(numbers)))
    except (StopIteration, RuntimeError, ValueError, OverflowError) as error:
        if str(error).startswith("quant_ops."):
            raise
        _refuse("a program as Program.encode gives it", f"{len(code)} integers that are none")
    return Program(tuple(steps), inputs, outputs)


# ---- the reference ---------------------------------------------------------------------------------------------------


def run_steps(program: Program, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    """The results of a program, step by step with the operators of their names."""
    if len(inputs) != program.inputs:
        _refuse(f"{program.inputs} inputs", len(inputs))
    values: list[Tensor | None] = [_dense(x) for x in inputs]
    for step, ended in zip(program.steps, program.last_uses(), strict=True):
        read = [values[number] for number in step.inputs]
        values.append(_RUN[step.op](step, read, [_constant(constants, index) for index in step.constants]))
        for number in ended:
            values[number] = None
    return [values[number] for number in program.outputs]  # type: ignore[misc]  # no result ends


def _constant(constants: Sequence[Tensor], index: int | None) -> Tensor | None:
    if index is None or index < _ELEMENT:
        return None if index is None else constants[index]
    return constants[index % _ELEMENT][index // _ELEMENT - 1]


def _dense(x: Tensor) -> Tensor:
    """Contiguous, or, of four dimensions, channels_last."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def _operator(name: str) -> Any:
    return getattr(torch.ops.quant_ops, name).default


def _out(named: dict[str, Any], dtype: int) -> dict[str, Any]:
    return {"out_scale": named["out_scale"], "out_zero_point": named["out_zero_point"], "out_dtype": DTYPES[dtype]}


def _quantize(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    scale, zero_point = constants
    return _operator("quant_tensor_forward")(values[0], scale, zero_point, *step.numbers, zero_point is not None, False)


def _dequantize(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _operator("dequant_tensor")(values[0], *constants, DTYPES[step.numbers[0]])


def _product(step: Step, values: list[Any], constants: list[Any], shape: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    """What conv2d and linear share: the first arguments and the keyword ones."""
    named = dict(zip(STEPS[step.op].constants, constants, strict=True))
    numbers = step.named_numbers()
    weight = named["weight"]
    if weight is None and values[0].device.type == "cuda":
        _refuse(f"the weight of {step.op} on CUDA, whose kernels read it beside the packed one", None)
    if weight is None:  # only its shape is read
        weight = torch.zeros((), dtype=torch.int8, device=values[0].device).expand(tuple(shape))
    keywords = {name: named[name] for name in ("x_scale", "x_zero_point", "packed_weight")} | _out(named, numbers["out_dtype"])
    if len(values) > 1:
        keywords |= {"residual": values[1], **{name: named[name] for name in ("residual_scale", "residual_zero_point")}}
    if numbers["activation"]:
        keywords["activation"] = numbers["activation"]
    return [values[0], weight, named["weight_scale"], named["bias"]], keywords


def _conv2d(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    o, c, r, s, *geometry = step.numbers
    first, keywords = _product(step, values, constants, (o, c, r, s))
    stride, padding, dilation, groups = geometry[:2], geometry[2:6], geometry[6:8], geometry[8]
    channels_last = True if values[0].dim() == 4 else None
    return _operator("int8_conv2d")(*first, stride, padding, dilation, groups, **keywords, channels_last=channels_last)


def _linear(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    first, keywords = _product(step, values, constants, step.numbers[:2])
    return _operator("int8_linear")(*first, **keywords)


def _two(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    a_scale, b_scale, a_zero_point, b_zero_point, out_scale, out_zero_point = constants
    out = _out({"out_scale": out_scale, "out_zero_point": out_zero_point}, step.numbers[0])
    return _operator(f"int8_{step.op}")(*values, a_scale, b_scale, a_zero_point, b_zero_point, **out, activation=step.numbers[1])


def _rescaled(name: str, step: Step, values: list[Any], constants: list[Any], *arguments: Any, **keywords: Any) -> Tensor:
    """An operator that takes codes with their scale and gives a result as any other."""
    x_scale, x_zero_point, out_scale, out_zero_point = constants
    out = _out({"out_scale": out_scale, "out_zero_point": out_zero_point}, step.named_numbers()["out_dtype"])
    return _operator(name)(values[0], x_scale, x_zero_point, *arguments, **out, **keywords)


def _requantize(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _rescaled("requantize", step, values, constants, activation=step.numbers[1])


def _max_pool2d(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    n = step.numbers
    return _operator("int8_max_pool2d")(values[0], n[:2], n[2:4], n[4:6], n[6:8], bool(n[8]))


def _avg_pool2d(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    n = step.numbers
    divisor = None if n[8] == -1 else n[8]
    return _rescaled("int8_avg_pool2d", step, values, constants, n[:2], n[2:4], n[4:6], bool(n[6]), bool(n[7]), divisor)


def _adaptive_avg_pool2d(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _rescaled("int8_adaptive_avg_pool2d", step, values, constants, step.numbers[:2])


def _cat(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    n = len(values)
    scales, zero_points = constants[:n], constants[n : 2 * n]
    if any(zero_point is not None for zero_point in zero_points):
        zero = torch.zeros((), dtype=torch.int32, device=values[0].device)
        zero_points = [zero if zero_point is None else zero_point for zero_point in zero_points]
    else:
        zero_points = []
    out = _out({"out_scale": constants[-2], "out_zero_point": constants[-1]}, step.numbers[1])
    return _operator("int8_cat")(values, scales, zero_points, step.numbers[0], **out)


def _upsample_nearest2d(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _operator("int8_upsample_nearest2d")(values[0], step.numbers)


def _flatten(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _dense(values[0].flatten(step.numbers[0]))


def _slice(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _dense(values[0].narrow(*step.numbers))


def _channel_shuffle(step: Step, values: list[Any], constants: list[Any]) -> Tensor:
    return _dense(values[0].unflatten(1, (step.numbers[0], -1)).transpose(1, 2).flatten(1, 2))


_RUN = {
    "quantize": _quantize,
    "conv2d": _conv2d,
    "linear": _linear,
    "add": _two,
    "mul": _two,
    "requantize": _requantize,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "cat": _cat,
    "upsample_nearest2d": _upsample_nearest2d,
    "flatten": _flatten,
    "dequantize": _dequantize,
    "slice": _slice,
    "channel_shuffle": _channel_shuffle,
}
