"""The libraries that save and load models themselves, and when the package is registered there.

That is as soon as a program has imported both, in either order: a library that does not know how a checkpoint is quantized gives
its weights random values. ``import quant_ops`` imports none of them. Next: integrations/transformers.py.
"""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

# Where each library defines its class of models, which is the last thing that the package's part for it needs.
LIBRARIES = {"transformers.modeling_utils": "PreTrainedModel", "diffusers.models.modeling_utils": "ModelMixin"}


def integration(defined_in: str) -> Any:
    """The package's part for a library, registered there; None, with a warning, for a version that it does not work with."""
    try:
        return importlib.import_module(f"quant_ops.integrations.{defined_in.partition('.')[0]}")
    except ImportError as error:
        warnings.warn(f"{error} Until then quantized models can be neither saved nor loaded with it.", stacklevel=3)
        return None


class _Finder(PathFinder):
    """Finds the modules of LIBRARIES as Python would, and has the package registered once one has run."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in LIBRARIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                integration(fullname)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers the package in the libraries that are imported already, and in the others when they are."""
    for defined_in in LIBRARIES:
        if defined_in in sys.modules:
            integration(defined_in)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
