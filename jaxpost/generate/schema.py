"""Whether a JSON schema describes any text that ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

_LOWEST = -(2.0**62)


def finite(schema: Any) -> bool:
    """Whether a value of finite size can satisfy the schema, as far as what it requires goes.

    The least fixed point over its references: a reference is finite once its target is, given those that are.
    Keywords that only narrow values (lengths, bounds, patterns) are not looked at.

    Example:
      >>> tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
      >>> finite(tree), finite(tree | {"required": ["next"]})
      (True, False)
    """
    references = {ref for ref in _references(schema) if ref.startswith("#")}
    known: set[str] = set()
    while True:
        found = {ref for ref in references - known if _ends(_target(schema, ref), known)}
        if not found:
            return _ends(schema, known)
        known |= found


def too_low(schema: Any) -> float | None:
    """The first upper bound that lies below every 64-bit integer, or as good as; None without one.

    llguidance counts whole numbers in 64 bits, and one such interval ends the whole process.

    Example:
      >>> too_low({"items": {"type": "integer", "minimum": -2e19, "maximum": -1e19}})
      -1e+19
    """
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            bounds = (node.get(name) for name in ("maximum", "exclusiveMaximum"))
            found = next((bound for bound in bounds if isinstance(bound, int | float) and bound < _LOWEST), None)
            if found is not None:
                return float(found)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return None


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _target(schema: Any, reference: str) -> Any:
    node = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return True  # the compiler names a reference that leads nowhere
    return node


def _ends(schema: Any, known: Set[str]) -> bool:
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in known:
        return False
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list) and options and not any(_ends(option, known) for option in options):
            return False
    every = schema.get("allOf")
    if isinstance(every, list) and not all(_ends(part, known) for part in every):
        return False
    kinds = schema.get("type", "any")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return (
        any(kind not in ("object", "array") for kind in kinds)
        or ("object" in kinds and _object_ends(schema, known))
        or ("array" in kinds and _array_ends(schema, known))
    )


def _object_ends(schema: Mapping[str, Any], known: Set[str]) -> bool:
    properties, rest = schema.get("properties"), schema.get("additionalProperties", True)
    required = schema.get("required")
    if not isinstance(required, list):
        return True
    properties = properties if isinstance(properties, Mapping) else {}
    return all(_ends(properties.get(name, rest), known) for name in required)


def _array_ends(schema: Mapping[str, Any], known: Set[str]) -> bool:
    least, first, rest = schema.get("minItems", 0), schema.get("prefixItems", []), schema.get("items", True)
    if not isinstance(least, int) or not isinstance(first, list) or least <= 0:
        return True
    return all(_ends(item, known) for item in first[:least]) and (least <= len(first) or _ends(rest, known))
