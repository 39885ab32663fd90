"""Lets docstrings name the package's functions as :func:`quantize_`: in the site such a name is a link to its reference."""

import re
from pathlib import Path

import griffe

LISTED = re.compile(r"^::: quant_ops\.([\w.]+)$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces the roles of docstrings; names that no page of the reference has, and methods, become code."""

    def on_package(self, *, pkg, **kwargs):
        pages = (Path(__file__).parent / "reference").glob("*.md")
        self.listed = {name for page in pages for name in LISTED.findall(page.read_text())}
        self.replace_below(pkg)

    def replace_below(self, obj):
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(self.markdown, obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self.replace_below(member)

    def markdown(self, match):
        name = match.group(1).removeprefix("quant_ops.")
        shown = name.rpartition(".")[2]
        return f"[`{shown}`][quant_ops.{name}]" if name in self.listed else f"`{name}`"
