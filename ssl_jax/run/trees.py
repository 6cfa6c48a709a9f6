# SPDX-License-Identifier: Apache-2.0
"""Names of the leaves of a tree: 'encoder/blocks/attn/qkv/kernel'."""

from collections.abc import Callable
from typing import Any

import jax


def path_str(path: tuple) -> str:
    """A tree path with slashes; attribute, dict and sequence keys look alike, as Orbax has them."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(fn: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of fn(path, leaf, *leaves of rest)."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: fn(path_str(p), *x), tree, *rest)


def nested(flat: dict[str, Any]) -> dict:
    """Nested dicts of {'a/b': leaf}, the inverse of `named` for trees of dicts."""
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def dotted(tree: dict, prefix: str = '') -> dict[str, Any]:
    """{'a.b': value} of nested dicts; an empty dict is a value."""
    flat = {}
    for key in tree:
        value, name = tree[key], f'{prefix}{key}'
        if hasattr(value, 'keys') and len(value):
            flat |= dotted(value, f'{name}.')
        else:
            flat[name] = value
    return flat
