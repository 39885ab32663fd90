"""torchao's ``_eval``: inputs for calibration from texts, and the perplexity of a language model on texts.

Texts are given as they are, or as lists of tokens; torchao takes names of tasks, whose texts the package lm_eval downloads. A text
is cut into windows of the sequence length.

    perplexity = exp(-sum log p(token | tokens before it in the window) / number of these tokens)
    word_perplexity, byte_perplexity: the same sum over the words (separated by white space) and the UTF-8 bytes of the texts
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._models import evaluating

__all__ = ["InputRecorder", "MultiInput", "TransformerEvalWrapper"]


class MultiInput:
    """The values of one argument of a model in several calls.

    Attributes:
        values: one for each call.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.values = list(inputs)

    def add_input(self, input: Any) -> "MultiInput":
        """That of one more call."""
        self.values.append(input)
        return self

    def __getitem__(self, index: slice) -> "MultiInput":
        return MultiInput(self.values[index])


def _token(tokenizer: Any, name: str) -> int | None:
    """A special token of a tokenizer: an attribute, or a method of SentencePiece's."""
    value = getattr(tokenizer, name, None)
    value = value() if callable(value) else value
    return value if isinstance(value, int) and value >= 0 else None


class _Tokens:
    """What both share: tokens of the texts."""

    def __init__(self, tokenizer: Any, device: Any) -> None:
        self._tokenizer, self.device = tokenizer, torch.device(device)

    def tok_encode(self, string: str) -> list[int]:
        """Tokens of a text, after the tokenizer's ``bos_id`` if it has one."""
        if self._tokenizer is None:
            raise ValueError(f"quant_ops.{type(self).__name__}: expected a tokenizer for texts, got None. Pass lists of tokens.")
        encoded = self._tokenizer.encode(string)
        tokens = [int(token) for token in getattr(encoded, "ids", encoded)]
        first = _token(self._tokenizer, "bos_id")
        return tokens if first is None else [first, *tokens]

    def _documents(self, op: str, texts: Any, limit: int | None) -> list[tuple[str | None, list[int]]]:
        """Each text, None where tokens were given, and its tokens."""
        texts = [texts] if isinstance(texts, str | Tensor) else list(texts)
        names = [text for text in texts if isinstance(text, str) and not re.search(r"\s", text.strip())]
        if names:
            raise ValueError(
                f"quant_ops.{op}: expected texts or lists of tokens, got {names}, which look like names of tasks of lm_eval. Their "
                "texts are not downloaded here: pass the texts, e.g. of lm_eval's task or of a file."
            )
        if limit is not None and limit < 1:
            raise ValueError(f"quant_ops.{op}: expected limit >= 1 or None, got {limit}")
        documents: list[tuple[str | None, list[int]]] = []
        for text in texts[:limit]:
            if isinstance(text, str):
                documents.append((text, self.tok_encode(text)))
            else:
                documents.append((None, torch.as_tensor(text).flatten().tolist()))
        if not documents:
            raise ValueError(f"quant_ops.{op}: expected at least one text, got none")
        return documents


class InputRecorder(_Tokens):
    """Makes inputs for calibration of texts.

    Args:
        tokenizer: with ``encode``, of SentencePiece, transformers or tokenizers; None if lists of tokens are given.
        calibration_seq_length: tokens of an input.
        input_prep_func: makes the model's arguments, a tuple, of tokens (1, calibration_seq_length); by default the tokens alone.
        pad_calibration_inputs: fill up shorter windows with ``pad_token`` instead of leaving them out.
        vocab_size: tokens have to be below it; None: they are not looked at.
        pad_token: see above.
        device: where the tokens go.
    """

    def __init__(
        self,
        tokenizer: Any,
        calibration_seq_length: int,
        input_prep_func: Callable[[Tensor], Any] | None = None,
        pad_calibration_inputs: bool = False,
        vocab_size: int | None = 32000,
        pad_token: int = 0,
        device: Any = "cpu",
    ) -> None:
        super().__init__(tokenizer, device)
        if calibration_seq_length < 1:
            raise ValueError(f"quant_ops.InputRecorder: expected calibration_seq_length >= 1, got {calibration_seq_length}")
        self.calibration_seq_length, self.vocab_size, self.pad_token = calibration_seq_length, vocab_size, pad_token
        self.input_prep_func = input_prep_func or (lambda tokens: (tokens,))
        self.pad_calibration_inputs = pad_calibration_inputs
        self.inputs: list[MultiInput] | None = None

    def record_inputs(self, calibration_tasks: Any, calibration_limit: int | None = None) -> "InputRecorder":
        """Adds the windows of texts, and returns the recorder.

        Args:
            calibration_tasks: texts, or lists of tokens.
            calibration_limit: at most so many of them.

        Raises:
            ValueError: names of tasks of lm_eval, no window that is long enough, or a token outside of the vocabulary.
        """
        length, windows = self.calibration_seq_length, []
        for _, tokens in self._documents("InputRecorder.record_inputs", calibration_tasks, calibration_limit):
            if self.vocab_size is not None and not all(0 <= token < self.vocab_size for token in tokens):
                raise ValueError(
                    f"quant_ops.InputRecorder.record_inputs: expected 0 <= token < vocab_size, {self.vocab_size}, got one in "
                    f"[{min(tokens)}, {max(tokens)}]. Is it the model's tokenizer?"
                )
            windows += [tokens[i : i + length] for i in range(0, len(tokens), length)]
        if self.pad_calibration_inputs:
            windows = [window + [self.pad_token] * (length - len(window)) for window in windows]
        windows = [window for window in windows if len(window) == length]
        if not windows:
            raise ValueError(
                f"quant_ops.InputRecorder.record_inputs: expected texts of at least {length} tokens, got shorter ones. Give longer "
                "ones, a smaller calibration_seq_length, or pad_calibration_inputs=True."
            )
        for window in windows:
            self.add_input(self.input_prep_func(torch.tensor([window], device=self.device)))
        return self

    def add_input(self, args: Any) -> None:
        """Adds the arguments of one call."""
        args = tuple(args) if isinstance(args, tuple | list) else (args,)
        if self.inputs is None:
            self.inputs = [MultiInput([]) for _ in args]
        for values, value in zip(self.inputs, args, strict=True):
            values.add_input(value)

    def get_inputs(self) -> list[MultiInput]:
        """For each argument of the model its values, for ``quantize`` of the GPTQ quantizers.

        Raises:
            ValueError: nothing was recorded.
        """
        if self.inputs is None:
            raise ValueError("quant_ops.InputRecorder.get_inputs: expected recorded inputs, got none. Call record_inputs first.")
        return self.inputs


class TransformerEvalWrapper(_Tokens):
    """The perplexity of a language model on texts.

    Args:
        model: takes what input_prep_func makes, and returns logits (1, T, vocabulary), or an object with ``logits``.
        tokenizer, input_prep_func, device: as of :class:`InputRecorder`.
        max_seq_length: tokens of a window.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_seq_length: int,
        input_prep_func: Callable[[Tensor], Any] | None = None,
        device: Any = "cpu",
    ) -> None:
        super().__init__(tokenizer, device)
        if max_seq_length < 2:
            raise ValueError(f"quant_ops.TransformerEvalWrapper: expected max_seq_length >= 2, got {max_seq_length}")
        self._model, self._length = model, max_seq_length
        self.input_prep_func = input_prep_func or (lambda tokens: (tokens,))

    def run_eval(self, tasks: Any, limit: int | None = None) -> dict[str, dict[str, dict[str, float]]]:
        """Perplexities on texts.

        Args:
            tasks: texts, or lists of tokens.
            limit: at most so many of them.

        Returns:
            ``{"results": {"texts": {"perplexity": ..., "word_perplexity": ..., "byte_perplexity": ...}}}``; the last two where
            texts and not tokens were given.

        Raises:
            ValueError: names of tasks of lm_eval, or no text of two tokens.
        """
        total, count, words, characters = 0.0, 0, 0, 0
        documents = self._documents("TransformerEvalWrapper.run_eval", tasks, limit)
        with evaluating(self._model):
            for text, tokens in documents:
                for start in range(0, len(tokens), self._length):
                    window = torch.tensor([tokens[start : start + self._length]], device=self.device)
                    if window.shape[1] > 1:
                        total += self._log_likelihood(window)
                        count += window.shape[1] - 1
                if text is not None:
                    words += len(text.split())
                    characters += len(text.encode())
        if not count:
            raise ValueError("quant_ops.TransformerEvalWrapper.run_eval: expected texts of at least two tokens, got shorter ones")
        found = {"perplexity": math.exp(-total / count)}
        if all(text is not None for text, _ in documents):
            found |= {"word_perplexity": _exp(-total / words), "byte_perplexity": _exp(-total / characters)}
        return {"results": {"texts": found}}

    def _log_likelihood(self, window: Tensor) -> float:
        """The sum over all tokens but the first."""
        args = self.input_prep_func(window)
        model: Any = self._model
        if hasattr(model, "setup_caches"):
            with torch.device(self.device):
                model.setup_caches(1, window.shape[1])
        given = model(*args) if isinstance(args, tuple | list) else model(args)
        logits = getattr(given, "logits", given)[0, :-1].double()
        return -float(F.cross_entropy(logits, window[0, 1:].to(logits.device), reduction="sum"))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
