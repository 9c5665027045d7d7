"""Modules of torch that hold given tensors under given names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch


class Node(torch.nn.Module):
  """Holds what `tree` puts into it, and returns its input."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x


def tree(tensors: Mapping[str, torch.Tensor]) -> Node:
  """A module whose `state_dict` is `tensors`."""
  root = Node()
  for name, tensor in tensors.items():
    *path, last = name.split(".")
    node = root
    for part in path:
      if part not in dict(node.named_children()):
        node.add_module(part, Node())
      node = node.get_submodule(part)
    if tensor.is_floating_point():
      node.register_parameter(last, torch.nn.Parameter(tensor))
    else:
      node.register_buffer(last, tensor)
  return root


def save_script(tensors: Mapping[str, torch.Tensor], path: str) -> None:
  """Writes them as a TorchScript archive."""
  with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    # On its way out; the weights that were released so are not.
    torch.jit.trace(tree(tensors), torch.zeros(1)).save(path)
