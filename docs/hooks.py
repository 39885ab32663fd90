"""What mkdocs does beside its own: links that leave docs/, the notebook, the command line's help, and GitHub's anchors.

Links in docs/ are paths in the repository. One to a file outside of docs/ leads to a page of the site with that file, under
source/.
"""

import base64
import functools
import html
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
FENCE = re.compile(r"^(`{3,}).*?^\1", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".cuh": "cuda", ".txt": "cmake", ".ipynb": "json"}
HELP = re.compile(r"<!-- help of ?(\w*) -->")


def slug(heading, separator):
    """As on GitHub, whose anchors the documents use."""
    return re.sub(r"[^\w\- ]", "", html.unescape(heading).lower()).strip().replace(" ", separator)


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


# ---- links -----------------------------------------------------------------------------------------------------------------


def page_of(path):
    """The page of the site, as a path in its sources, for a path in the repository."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" + ("" if path.endswith(".md") else ".md")


def leads_to(place, link):
    """The path in the repository to which a link of the file at ``place`` leads; None if it is no page."""
    target = link.partition("#")[0]
    if not target or "://" in link or link.startswith("mailto:") or target.endswith((".svg", ".png")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    if (ROOT / path / "README.md").is_file():
        return f"{path}/README.md"
    return path if (ROOT / path).exists() else None


def outside_code(function, text):
    """The text with what lies between its code blocks replaced by the function of it."""
    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [function(text[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, function(text[end:])])


def with_links(place, text, found=None):
    """The text of the file at ``place`` with its links as those of the site; ``found`` gets the paths that they lead to."""
    here = posixpath.dirname(page_of(place)) or "."
    place = f"{place}/index" if (ROOT / place).is_dir() else place

    def replaced(match):
        path = leads_to(place, match.group())
        if path is None:
            return match.group()
        if found is not None:
            found.append(path)
        _, sign, anchor = match.group().partition("#")
        return posixpath.relpath(page_of(path), here) + sign + anchor

    return outside_code(functools.partial(LINK.sub, replaced), text)


def as_markdown(path):
    """The file or folder at a path in the repository."""
    file = ROOT / path
    if file.is_dir():
        listed = sorted(p for p in file.iterdir() if p.suffix in LANGUAGES or p.suffix == ".json")
        return f"# {path}\n\n" + "\n".join(f"* [{p.name}]({p.name})" if p.suffix in LANGUAGES else f"* {p.name}" for p in listed)
    if file.suffix == ".ipynb":
        return notebook_page(file)
    if file.suffix == ".md":
        return file.read_text()
    return f"# {path}\n\n`````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n`````\n"


def on_files(files, config):
    """Adds the notebooks, the changes, and everything outside of docs/ to which a page leads, directly or not."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    waiting = [
        *own,
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.ipynb")),
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ]
    done = set()
    while waiting:
        path = waiting.pop()
        if path not in done:
            done.add(path)
            text = as_markdown(path)
            if (ROOT / path).suffix in (".md", ".ipynb") or (ROOT / path).is_dir():
                text = with_links(path, text, waiting)
            if path not in own:
                files.append(File.generated(config, page_of(path), content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by:
        return markdown
    return with_links(f"docs/{page.file.src_uri}", HELP.sub(lambda match: command_help(match.group(1)), markdown))


# ---- the command line and the notebook -------------------------------------------------------------------------------------


def command_help(command):
    """A code block with what ``--help`` prints."""
    from quant_ops.cli.arguments import _HELP, parser

    made = parser(dict.fromkeys(_HELP, lambda options: 0))
    if command:
        made = next(action for action in made._actions if action.dest == "command").choices[command]
    made.formatter_class = functools.partial(made.formatter_class, width=110)
    return f"```text\n{made.format_help().rstrip()}\n```"


def notebook_page(path):
    """Markdown with the cells of a notebook and their stored outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
                parts.append(f"![What the cell draws](data:image/png;base64,{image})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
