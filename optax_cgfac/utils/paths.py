"""Names of parameters: key paths, the same for dicts, boxes and NNX states."""

from typing import Any

import jax

from optax_cgfac.utils.types import Array, PyTree

Path = tuple[str, ...]


def normalize(key_path: tuple[Any, ...]) -> Path:
    """Returns a JAX key path as strings, without the ``.value`` of a box."""
    # A boxed leaf (``nn.Partitioned``, an NNX variable) and a plain array at the same
    # place get the same name.
    names = tuple(_key_name(key) for key in key_path)
    is_box = key_path and getattr(key_path[-1], "name", None) == "value"
    return names[:-1] if is_box and len(names) > 1 else names


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaves_by_path(tree: PyTree) -> dict[Path, Array]:
    """Returns the leaves of ``tree`` keyed by their normalized paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {normalize(path): leaf for path, leaf in leaves}


def map_with_path(function: Any, tree: PyTree, *rest: PyTree) -> PyTree:
    """Like `jax.tree.map`, calling ``function(path, leaf, *rest_leaves)``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(normalize(path), *leaves), tree, *rest
    )


def text(path: Path) -> str:
    """Returns a path as users write it: ``"encoder/Dense_0/kernel"``."""
    return "/".join(path)
