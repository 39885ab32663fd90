"""Lets docstrings name the package's functions as :func:`quantize_`: in the site such a name is a link to its reference."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces the roles of docstrings; names that are not public, and methods, become code."""

    def on_package(self, *, pkg, **kwargs):
        self.public = {str(name).strip("'\"") for name in pkg.exports or ()}
        self.replace_below(pkg)

    def replace_below(self, obj):
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(self.markdown, obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self.replace_below(member)

    def markdown(self, match):
        name = match.group(1).removeprefix("quant_ops.")
        return f"[`{name}`][quant_ops.{name}]" if name in self.public else f"`{name}`"
