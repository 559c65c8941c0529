"""How the API page shows an option: with its default as its value, and its help text and choices as its docstring.

Griffe, which reads the sources for mkdocstrings, sees `interval: int = option(500, "…")`: a call, and no docstring.
"""

import dataclasses
from typing import Any

import griffe

from codistill import CodistillConfig, DataConfig

OPTIONS = {
    f"{kind.__module__}.{kind.__qualname__}.{item.name}": item
    for kind in (CodistillConfig, DataConfig)
    for item in dataclasses.fields(kind)
}


class OptionDocs(griffe.Extension):
    """Puts in place what the dataclasses say."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Look at one attribute."""
        item = OPTIONS.get(attr.path)
        if item is None:
            return
        choices = item.metadata["choices"]
        text = item.metadata["help"] + (f" (one of {', '.join(choices)})" if choices else "")
        attr.value = repr(item.default)
        attr.docstring = griffe.Docstring(f"{text[0].upper()}{text[1:]}.", parent=attr)
