"""The YAML that users write: configurations, options and sweep files."""

from typing import Any, NoReturn

import yaml

MAX_NODES = 100_000  # a sweep of a thousand arms has about ten thousand
MAX_INTEGER = 2**63
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """``SafeLoader`` that refuses repeated keys, which would replace each other, and what is too large to work with."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because construct_mapping also sees the keys that a merge (<<) adds, which may be repeated.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                value = key.value if key.tag == MERGE else self.construct_object(key)
                if value in found:
                    _refuse(f"keys must differ, found {key.value} twice", node)
                found.add(value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded(node, {}) > MAX_NODES:
            _refuse(f"with its aliases written out it must have at most {MAX_NODES:,} values, found more", node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            ValueError,
        ):  # what PyYAML's converters raise: !!bool maybe
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            _refuse(f"{node.value!r:.100} is not of the type {kind}", node)
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            _refuse(f"integers must be below 2^63, found one of {len(node.value)} characters", node)
        return value


def _refuse(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _expanded(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of nodes with every alias written out; infinite if a node contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until its children are counted
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in children)
    return sizes[id(node)]


def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML document, of plain types alone.

    Raises:
        ValueError: the text is not valid YAML, repeats a key, or is too large. The message says where.

    >>> load_yaml("base: &b {x: 1, y: 2}\\nall: {<<: *b, y: 3}")["all"]
    {'x': 1, 'y': 3}
    >>> load_yaml("{x: 1, x: 2}")
    Traceback (most recent call last):
    ValueError: not valid YAML: keys must differ, found x twice
      in "<unicode string>", line 1, column 1:
        {x: 1, x: 2}
        ^
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("not valid YAML: nested too deeply") from error
