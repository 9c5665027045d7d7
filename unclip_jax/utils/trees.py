"""Dotted names for the leaves of a pytree ("vision.block_0.attn.kernel")."""

from __future__ import annotations

from typing import Any

import jax

PyTree = Any


def path_names(path: tuple[Any, ...]) -> list[str]:
  """The parts of a `jax.tree_util` key path as plain strings."""
  names = []
  for key in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        names.append(str(getattr(key, attribute)))
        break
    else:
      names.append(str(key))
  return names


def flatten(tree: PyTree) -> dict[str, Any]:
  """`{dotted name: leaf}` in traversal order; empty nodes vanish."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {".".join(path_names(path)): leaf for path, leaf in leaves}


def unflatten_like(template: PyTree, flat: dict[str, Any]) -> PyTree:
  """The tree of `template` with the leaves of `flat` (KeyError if missing)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: flat[".".join(path_names(path))], template
  )


def overlay(tree: PyTree, flat: dict[str, Any]) -> PyTree:
  """The tree with the leaves of `flat` where it has one of that name."""
  return unflatten_like(tree, {**flatten(tree), **flat})


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """Nested dicts from dotted names."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
