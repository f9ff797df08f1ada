"""YAML for scenario files: plain data only, and nothing that a hostile file could do with it."""

from __future__ import annotations

import io
import re
from typing import Any

import yaml

from trellis.errors import ScenarioError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 40
MAX_ALIASES = 100


class _SafeLoader(yaml.SafeLoader):
    """YAML without tags, duplicate keys, alias bombs or bottomless nesting."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = 0
        self.aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: ARG002 (PyYAML calls it so)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is not text")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


# YAML 1.1 reads ``1e-3`` as text; every researcher writes it meaning a number.
_SafeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse(text: str, source: str) -> Any:
    """Read YAML with the project's limits. ``source`` names the text in errors."""
    if len(text) > MAX_CHARACTERS:
        raise ScenarioError("scenario-size", f"{source}: {len(text)} characters; at most {MAX_CHARACTERS}")
    try:
        loader = _SafeLoader(io.StringIO(text))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ScenarioError("scenario-yaml", f"{source}: not readable as YAML: {error}") from None
