"""The one way to read YAML that others may have written: bounded in time and memory, whatever it holds.

A kilobyte of YAML can name a list of lists so often that its text fills the memory. So what a file is when all its
aliases are written out is counted before any value is made.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 2**20
MOST_VALUES = 100_000
"""Keys and values with all aliases written out; the largest configuration here has some hundred."""

# libyaml refuses deep nesting; PyYAML's own reader takes minutes over a megabyte.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(content: bytes | str, *, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES) -> Any:
    """What a YAML document holds, in plain values.

    Raises:
        ValueError: it is not plain YAML, or too large; the message is one line.
    """
    if len(content) > most_bytes:
        raise ValueError(f"{len(content):,} bytes, more than {most_bytes:,}")
    try:
        loader = _Loader(content)
        try:
            document = loader.get_single_node()
            if document is None:
                return None
            refuse_large(document, most_values)
            return loader.construct_document(document)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # A date or a number can be written that does not exist.
    except (yaml.YAMLError, UnicodeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def refuse_large(document: yaml.Node, most: int = MOST_VALUES) -> None:
    """Count a parsed document's values with all aliases written out, each node once.

    Raises:
        ValueError: more than ``most``, or a value that contains itself.
    """
    sizes: dict[int, int] = {}
    under_way: set[int] = set()
    waiting: list[yaml.Node] = [document]
    while waiting:
        node = waiting[-1]
        children = _children(node)
        if id(node) in sizes:
            waiting.pop()
        elif id(node) in under_way:
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            under_way.discard(id(node))
            waiting.pop()
            if sizes[id(node)] > most:
                raise ValueError(f"more than {most:,} values once its aliases are written out")
        else:
            under_way.add(id(node))
            if any(id(child) in under_way for child in children):
                raise ValueError("a value that contains itself")
            waiting.extend(child for child in children if id(child) not in sizes)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
