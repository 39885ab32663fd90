"""A chain as a module: a program, the layers whose weights it reads, and scales of its own; ``forward`` is one operator call.

The layers keep their names below ``layers``, so that whatever moves, saves or shows quantized layers finds them. Read first:
program.py.
"""

import dataclasses
import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from ..nn import QuantizedLayer
from ..ops._register import call, in_transform, wants_derivative
from ..ops.program import ACTIVATIONS, STEPS, Program, Step

Source = tuple[str, str]  # where a constant is: the name of a layer, or "" for the chain itself, and the name of the buffer

_int8_chain = torch.ops.quant_ops.int8_chain.default
_int8_chain_times = torch.ops.quant_ops._int8_chain_times.default
_below_autograd = torch._C._AutoDispatchBelowAutograd
_WEIGHT = STEPS["conv2d"].constants.index("weight")  # as of "linear"


@dataclasses.dataclass(repr=False)
class ChainTimes:
    """The seconds that each step of a chain takes. ``print`` shows them as a table.

    With several threads, steps that run on many samples at once count the time of each thread.

    Attributes:
        steps: name and seconds of every step, in their order.
    """

    steps: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(seconds for _, seconds in self.steps)

    def __str__(self) -> str:
        whole = self.seconds or 1.0
        lines = [f"{seconds * 1e6:10.1f} us {100 * seconds / whole:5.1f} %  {name}" for name, seconds in self.steps]
        return "\n".join([*lines, f"{self.seconds * 1e6:10.1f} us 100.0 %"])

    __repr__ = __str__


def _name_of(step: Step, path: str) -> str:
    activation = ACTIVATIONS[step.named_numbers().get("activation", 0)]
    has_residual = len(step.inputs) > 1 and bool(path)
    return " + ".join(filter(None, [path or step.op, "add" if has_residual else None, activation]))


class Chain(nn.Module):
    """Layers, additions, activations and pools between which values stay int8, as one call of :func:`int8_chain`.

    Made by :func:`chain_`. Takes and gives floating tensors; images are (N, C, H, W), and results lie in channels_last. It is for
    inference: a gradient is refused.

    A chain owns its layers, under their names in the model below ``layers``, and reads their weights, biases where they
    lie. Its ``state_dict`` has theirs, the scales of the values and the program: loading it makes the chain that was saved.

    Attributes:
        program: the steps; see :mod:`quant_ops.ops.program`.
        layers: the quantized layers.
        scales, zero_points: of the values, float32 and int32. Layers keep theirs, which are not read.
    """

    program: Program
    layers: nn.Module
    scales: Tensor
    zero_points: Tensor

    def __init__(
        self,
        program: Program,
        sources: Sequence[Source],
        paths: Sequence[str],
        layers: Mapping[str, QuantizedLayer],
        scales: Tensor,
        zero_points: Tensor,
    ) -> None:
        """
        Args:
            sources: of every constant of the program.
            paths: the name of each step's layer, empty for a step without one.
            layers: by name.
            scales, zero_points: of the values, float32 and int32.
        """
        super().__init__()
        self.layers = nn.Module()
        for path, layer in layers.items():
            _place(self.layers, path, layer)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)
        self._describe(program, sources, paths)
        self.eval()

    def _describe(self, program: Program, sources: Sequence[Source], paths: Sequence[str]) -> None:
        self.program, self._sources, self._paths = program, tuple(sources), tuple(paths)
        self._prepare()

    def _prepare(self) -> None:
        """Makes what a call needs, on whichever device the chain is now."""
        program, sources = self.program, self._sources
        if self.device.type == "cuda":
            program, sources = self._with_weights()
        self._code = program.encode()
        groups = itertools.groupby(sources, operator.itemgetter(0))
        self._constants = [(path, [name for _, name in group]) for path, group in groups]  # by owner, whose buffers they are
        self._owners: list[nn.Module] | None = None

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The chain's result, or its results in a tuple."""
        if isinstance(inputs[0], Proxy):  # one node of a graph
            tracer: Any = inputs[0].tracer
            node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})
            return node
        if is_compiling() or torch.is_inference_mode_enabled() or in_transform() is not None:
            results = call(_int8_chain, inputs, self.constants(), self._code)
        elif wants_derivative(inputs):
            results = _Inference.apply(self.constants(), self._code, *inputs)  # type: ignore[no-untyped-call]
        else:
            with _below_autograd():
                results = call(_int8_chain, inputs, self.constants(), self._code)
        return results[0] if len(results) == 1 else tuple(results)

    @torch.no_grad()
    def times(self, *inputs: Tensor, calls: int = 20) -> "ChainTimes":
        """How long each step takes on the CPU, of the fastest of some calls.

        Args:
            inputs: of :meth:`forward`.
            calls: how many are timed, after one that is not.

        Raises:
            ValueError: the chain is not on the CPU, or ``calls`` is less than one.
        """
        if self.device.type != "cpu" or calls < 1:
            raise ValueError(
                f"quant_ops.Chain.times: expected a chain on the CPU and calls >= 1, got {self.device} and {calls}. "
                "torch.profiler times the operators that a chain calls on other devices."
            )
        one_call = (_int8_chain_times, inputs, self.constants(), self._code)
        seconds = torch.stack([call(*one_call) for _ in range(calls + 1)][1:])
        best = seconds[seconds.sum(1).argmin()].tolist()
        return ChainTimes(list(zip(map(_name_of, self.program.steps, self._paths), best, strict=True)))

    def constants(self) -> list[Tensor]:
        """The constants of the program, in their order: buffers of the chain and of its layers."""
        owners = self._owners
        if owners is None or is_compiling():
            owners = [self.layers.get_submodule(path) if path else self for path, _ in self._constants]
            if not is_compiling():
                self._owners = owners
        constants: list[Any] = []
        for owner, (_, names) in zip(owners, self._constants, strict=True):
            buffers = owner._buffers
            constants.extend([buffers[name] for name in names])
        return constants

    def _with_weights(self) -> tuple[Program, tuple[Source, ...]]:
        """CUDA's kernels read the weight itself, beside the packed one."""
        sources, steps = [*self._sources], []
        for step, path in zip(self.program.steps, self._paths, strict=True):
            if path:
                constants = [*step.constants]
                constants[_WEIGHT] = len(sources)
                sources.append((path, "qweight"))
                step = dataclasses.replace(step, constants=tuple(constants))
            steps.append(step)
        return dataclasses.replace(self.program, steps=tuple(steps)), tuple(sources)

    @property
    def device(self) -> torch.device:
        """Where the chain is."""
        return self.scales.device

    def _apply(self, fn: Any, recurse: bool = True) -> "Chain":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:  # .half() and friends
                self._buffers[name] = old.to(new.device)
        self._prepare()
        return self

    # ---- saving ----------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """What the ``state_dict`` has beside tensors, as the bytes of JSON."""
        state = {"program": self.program.encode(), "sources": self._sources, "paths": self._paths}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Makes this the chain that was saved.

        Raises:
            RuntimeError: it was another model's.
        """
        try:
            saved = json.loads(bytes(state.cpu().tolist()))
            program, paths = Program.decode(saved["program"]), [str(path) for path in saved["paths"]]
            sources = [(str(path), str(name)) for path, name in saved["sources"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"quant_ops.Chain: expected the state of a chain, got {type(state).__name__}: {error}") from error
        mine = {path for path in self._paths if path}
        if theirs := {path for path in paths if path} ^ mine:
            raise RuntimeError(f"quant_ops.Chain: expected a chain of the same layers, got a difference in {sorted(theirs)}")
        self._describe(program, sources, paths)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "_extra_state"
        if key in state_dict:
            try:
                self.set_extra_state(state_dict[key])  # before the buffers are loaded, since it says which there are
            except RuntimeError as error:
                args[-1].append(str(error))
                return
        for name in ("scales", "zero_points"):  # as many as that program has
            stored, held = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(stored, Tensor) and held is not None and stored.shape != held.shape:
                self._buffers[name] = torch.empty(stored.shape, dtype=held.dtype, device=held.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owners": None}

    def extra_repr(self) -> str:
        layers = len({path for path in self._paths if path})
        return (
            f"{layers} layers, {len(self.program.steps)} steps, {self.program.inputs} inputs, {len(self.program.outputs)} results"
        )


class _Inference(torch.autograd.Function):
    """Computes without a graph; a gradient that is asked for gets an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, constants: list[Tensor], code: list[int], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(_int8_chain, list(inputs), constants, code))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "quant_ops.Chain: expected no gradient to be asked for, got a backward pass through a chain, which is for inference. "
            "Run the model under torch.no_grad(), or train it before it is quantized."
        )


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Registers a layer under a name with dots."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        child = root._modules[parent]
        assert child is not None
        root = child
    root.add_module(name, layer)
