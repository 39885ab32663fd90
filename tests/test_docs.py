"""What the documents show runs: Python snippets, commands of the package, the notebook. The reference has every public name."""

import contextlib
import importlib.util
import inspect
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import quant_ops as qo
from quant_ops.cli import main

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# pages that say that each of their snippets runs as it stands; those of all others go on from the ones before them
STANDING = ["README.md", "docs/index.md", "docs/guide.md", "docs/simulation.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


# ---- Python ----------------------------------------------------------------------------------------------------------------

SNIPPETS = {page: blocks(page, "python") for page in PAGES}
ALONE = {f"{page}-{i}": snippet for page in STANDING for i, snippet in enumerate(SNIPPETS[page])}


@contextlib.contextmanager
def as_it_was():
    """What a page or a command may set for the process ends with it."""
    threads, engine, variables = torch.get_num_threads(), torch.backends.quantized.engine, dict(os.environ)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.quantized.engine = engine
        os.environ.clear()
        os.environ.update(variables)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ALONE)
def test_snippet_runs_by_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with as_it_was():
        exec(compile(ALONE[name], name, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page] and page not in STANDING])
def test_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippets"}
    with as_it_was():
        for i, snippet in enumerate(SNIPPETS[page]):
            exec(compile(snippet, f"{page}-{i}", "exec"), namespace)


def test_there_are_snippets():
    for page, least in (("README.md", 3), ("docs/index.md", 3), ("docs/guide.md", 10), ("docs/simulation.md", 3)):
        assert len(SNIPPETS[page]) >= least


# ---- commands --------------------------------------------------------------------------------------------------------------

COMMANDS = {}
for _page in PAGES:
    for _block in blocks(_page, "sh"):
        COMMANDS |= {line.split("#")[0].strip(): _page for line in _block.splitlines() if line.startswith("python -m quant_ops ")}

USER_MODULE = """
import torch

def trained():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))

def batches():
    return list(torch.randn(2, 16, 64))

model = resnet18 = trained
"""


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """Where the modules of the commands are: small ones, in place of large models and of the user's."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("my_net", "my_llama", "my_resnet"):
        (folder / f"{name}.py").write_text(USER_MODULE)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{page}-{i}" for i, page in enumerate(COMMANDS.values())])
def test_commands_run(command, user_folder, monkeypatch, capsys):
    """In the order of the page, so that a file is there when a later command reads it."""
    monkeypatch.chdir(user_folder)
    monkeypatch.syspath_prepend(str(user_folder))
    arguments = shlex.split(command.replace("torchvision.models:", "my_resnet:"))[3:]
    if arguments[0] == "report" and not Path(arguments[1]).exists():  # this test runs alone
        main(["quantize", "my_net:trained", arguments[1]])
    if arguments[0] == "bench":
        arguments += ["--seconds", "0.1"]
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    with as_it_was():
        assert main(arguments) == 0, capsys.readouterr().err


def test_there_are_commands():
    assert {command.split()[3] for command in COMMANDS} >= {"info", "bench", "quantize", "report"}


# ---- the notebook ----------------------------------------------------------------------------------------------------------


def test_notebook(tmp_path, monkeypatch):
    """It runs, its outputs are stored, and what it prints of accuracy is still so."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = ROOT / "docs" / "quickstart.ipynb"
    assert path.stat().st_size < 50_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = [printed(cell) for cell in code]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, cell in zip(stored, code, strict=True):
        accuracies = re.findall(r"accuracy: ([\d.]+)", before), re.findall(r"accuracy: ([\d.]+)", printed(cell))
        assert len(accuracies[0]) == len(accuracies[1])
        assert all(abs(float(a) - float(b)) < 0.05 for a, b in zip(*accuracies, strict=True))
        assert bool(before) == bool(printed(cell))


def printed(cell):
    return "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs)


# ---- the reference ---------------------------------------------------------------------------------------------------------


def test_reference_has_every_public_name():
    listed = [
        name for page in (ROOT / "docs" / "reference").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed))
    public = {f"quant_ops.{name}" for name in qo.__all__ if name != "__version__"}
    assert public <= set(listed)
    elsewhere = ("observers", "compat", "integrations", "onnx", "distributed")
    assert all(name in public or name.split(".")[1] in elsewhere for name in listed)


def documented():
    """Public functions, classes and their public methods."""
    for name in qo.__all__:
        found = getattr(qo, name)
        if inspect.isfunction(found):
            yield name, found
        elif inspect.isclass(found):
            yield name, found
            own = {key: getattr(found, key) for key in vars(found) if not key.startswith("_")}
            yield from ((f"{name}.{key}", member) for key, member in own.items() if inspect.isroutine(member))


def test_docstrings_name_the_arguments():
    """Of ``Args:``, which the site shows beside the signature; one entry may be about several arguments."""
    wrong = []
    for name, found in documented():
        section = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.getdoc(found) or "", re.MULTILINE)
        if section is None:
            continue
        entries = re.findall(r"^    ([\w*]+(?:, [\w*]+)*):", section.group(1), re.MULTILINE)
        assert entries, name
        known = inspect.signature(found).parameters
        wrong += [f"{name}: {argument}" for entry in entries for argument in entry.split(", ") if argument.strip("*") not in known]
    assert not wrong


# ---- the site --------------------------------------------------------------------------------------------------------------


def test_links_of_the_site(monkeypatch):
    """The hooks alone: the build itself is `make site`, which takes no warning."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = (
        "[a](../cpp/contract/ops.h) [b](numerics.md#gradients) ![c](layers.svg) [d](../benchmarks/)\n```c\n[e](../LICENSE)\n```\n"
    )
    found = []
    assert hooks.with_links("docs/guide.md", text, found) == (
        "[a](source/cpp/contract/ops.h.md) [b](numerics.md#gradients) ![c](layers.svg) [d](source/benchmarks/README.md)\n"
        "```c\n[e](../LICENSE)\n```\n"
    )
    assert found == ["cpp/contract/ops.h", "docs/numerics.md", "benchmarks/README.md"]
    assert hooks.with_links("benchmarks/README.md", "[a](../docs/guide.md#chains)") == "[a](../../guide.md#chains)"
    assert hooks.with_links("docs/reference/cli.md", "[a](../quickstart.ipynb)") == "[a](../quickstart.md)"
    assert hooks.with_links("examples", "[a](digits.py)") == "[a](digits.py.md)"
    assert hooks.slug("What a quantized layer holds: `qweight`", "-") == "what-a-quantized-layer-holds-qweight"
    assert "usage: python -m quant_ops bench" in hooks.command_help("bench")
    notebook = hooks.notebook_page(ROOT / "docs" / "quickstart.ipynb")
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    assert notebook.count("```python") == sum(cell["cell_type"] == "code" for cell in cells)
