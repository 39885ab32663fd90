"""The packages stand on one another in one direction, which their imports show."""

import ast
from pathlib import Path

import pytest

import quant_ops as qo

ROOT = Path(qo.__file__).parent
# for each package the others that it may import; "" is the compiled library and what the packages share
BELOW = {
    "": {"ops"},  # info checks the operators
    "ops": {""},
    "nn": {"", "ops"},
    "formats": {"", "ops"},
    "observers": {"", "ops", "formats"},
    "simulation": {"", "ops", "nn", "formats", "observers"},
    "convert": {"", "ops", "nn", "formats", "observers", "simulation"},
    "report": {"", "ops", "nn", "formats", "simulation", "convert"},
    "accuracy": {"", "ops", "nn", "observers", "convert"},
    "chains": {"", "ops", "nn", "observers", "convert", "accuracy"},
    "autoquant": {"", "nn", "convert", "report"},
    "compat": {"", "ops", "nn", "formats", "observers", "simulation", "convert", "report", "autoquant"},
    "cli": {"", "nn", "convert", "report"},
    "distributed": {"", "ops", "nn"},
    "onnx": {"", "ops", "nn", "simulation", "convert"},
    "integrations": {"", "ops", "nn", "simulation", "convert"},
}
FREE = {"__init__.py", "__main__.py"}  # the public names, and the entry of the command line
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).as_posix() not in FREE)


def package(parts):
    """The package that a module of quant_ops lies in, given its path below it."""
    return parts[0] if parts and parts[0] in BELOW else ""


def imported(path):
    """The modules of quant_ops that a file imports, as tuples of names below it."""
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else ()))
            yield from ([base] if node.module else [(*base, alias.name) for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "quant_ops":
            below = tuple(node.module.split(".")[1:])
            yield from ([below] if below else [(alias.name,) for alias in node.names])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    own = package(path.relative_to(ROOT).parts[:-1])
    for module in imported(path):
        assert package(module) == own or package(module) in BELOW[own], f"{own or 'quant_ops'} imports {'.'.join(module)}"


def test_every_package_has_its_place():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(BELOW) - {""}
    assert len(FILES) > 20
    assert {package(module) for path in (ROOT / "convert").iterdir() if path.suffix == ".py" for module in imported(path)} == {
        "",
        "ops",
        "nn",
        "formats",
        "observers",
        "simulation",
        "convert",
    }
