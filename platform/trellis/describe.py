"""What the command line says of plug-ins: all of a kind in a table, and the parameters of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from trellis import registry

REQUIRED = "required"
"""What stands in place of the default of a parameter that has none."""


class Parameter(NamedTuple):
    """One parameter of a plug-in's ``Config``: its key (``stream.batch``), type, default as JSON, and meaning."""

    key: str
    kind: str
    default: str
    meaning: str


def plugins(group: str) -> Table:
    """Return a table of a kind's plug-ins. Names stand whole on lines of their own; only what is beside them wraps."""
    table = _table("name", "what it is")
    for name, plugin in registry.plugins(group).items():
        try:
            info = registry.info_of(plugin.load())
        except Exception as error:  # one broken third-party plug-in must not hide the others
            table.add_row(Text(name), Text(f"does not load: {type(error).__name__}", style="red"))
            continue
        details = "; ".join(part for part in (plugin.family, *_facts(info), info.paper) if part)
        said = [(text, style) for text, style in ((info.summary, ""), (details, "dim")) if text]
        table.add_row(Text(name), Text("\n").join(Text(text, style) for text, style in said))
    return table


def facts(info: registry.Info) -> Iterator[str]:
    """Yield a line for each thing that a plug-in says of itself, but for what says nothing."""
    words = {"sends": "pairs with strategies that merge", "payload": "sends", "replies": "records beside the weights"}
    for key, value in info.facts.items():
        text = value if isinstance(value, str) else ", ".join(map(str, value))
        if text:
            yield f"{words.get(key, key.replace('_', ' '))}: {text}"


def parameters(config: type) -> list[Parameter]:
    """Return the parameters of a ``Config``; those of a config within it as ``outer.inner``."""
    schema = config.model_json_schema()  # type: ignore[attr-defined]
    return list(_parameters(schema, schema.get("$defs", {}), ""))


def parameter_table(found: list[Parameter]) -> Table:
    """Return parameters as a table."""
    table = _table("parameter", "default", "what it is")
    for each in found:
        meaning = "; ".join(part for part in (each.kind, each.meaning) if part)
        table.add_row(Text(each.key), Text(each.default), Text(meaning))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, overflow="fold")
    return table


def _facts(info: registry.Info) -> Iterator[str]:
    """Yield what a list says of a plug-in beside its summary."""
    if info.group == "trainers":
        takes = ", ".join(info.facts.get("takes", ()))
        yield f"takes {takes}" if takes else ""
        yield f"sends {info.facts.get('payload') or info.facts.get('sends', 'weights')}"
    elif merges := info.facts.get("merges"):
        yield f"merges {merges}"
    elif kind := info.facts.get("kind"):
        yield f"kind {kind}"


def _parameters(schema: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[Parameter]:
    for key, field in schema.get("properties", {}).items():
        inner = _inner(field, known)
        default = json.dumps(field["default"]) if "default" in field else REQUIRED
        if inner is None:
            yield Parameter(prefix + key, _kind(field, known), default, field.get("description", ""))
            continue
        if default in (REQUIRED, "null") or field.get("description") or not inner.get("properties"):
            note = field.get("description", "") or inner.get("description", "").partition("\n")[0]
            yield Parameter(prefix + key, _kind(field, known), default, note)
        given = field.get("default") or {}
        nested = {
            **inner,
            "properties": {
                name: {**part, "default": given[name]} if name in given else part
                for name, part in inner.get("properties", {}).items()
            },
        }
        yield from _parameters(nested, known, f"{prefix}{key}.")


def _inner(field: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of a config that a parameter holds, be it optional; None where it holds no config."""
    for each in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in each:
            found: Mapping[str, Any] = known[each["$ref"].rpartition("/")[2]]
            return found if found.get("type") == "object" else None
    return None


def _kind(field: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return a parameter's type as a person writes it: ``integer``, ``sgd | adam``, ``list of number``."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(json.dumps(field["const"]))
    if parts := field.get("anyOf"):
        return " | ".join(_kind(part, known) for part in parts)
    if "$ref" in field:
        target = known[field["$ref"].rpartition("/")[2]]
        return "keys" if target.get("type") == "object" else _kind(target, known)
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(field['items'], known)}" if "items" in field else "list"
    return "keys" if kind == "object" else kind
