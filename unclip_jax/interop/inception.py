"""The weights of the FID's Inception-v3: one file of torch's, or safetensors.

What torch-fidelity and pytorch-fid take, "weights-inception-2015-12-05" or
"pt_inception-2015-12-05-6726825d.pth", which are one: the TensorFlow graph's
numbers by the names of torchvision's network. A .pth file needs torch, which
reads tensors out of it and runs nothing (tensor_files.read_torch).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.interop import correspondence, parts
from unclip_jax.interop.correspondence import Pair, rearranged, same
from unclip_jax.models import inception
from unclip_jax.utils import trees

_IGNORED = r".*\.num_batches_tracked"  # of training


def convert_in(src: str, out: str) -> None:
  """Writes the part of a file of weights."""
  parts.write(out, read(src))


def read(path: str) -> parts.Part:
  """The network of a file.

  Raises:
    UserError: there is no such file, or it holds another network.
  """
  shapes = _shapes()
  arrays = correspondence.to_ours(
    pairs(), correspondence.read(path), shapes, where=path, ignored=_IGNORED
  )
  config = parts.make_config(
    "inception",
    task_name="unclip_jax.tasks.features",
    model_name="unclip_jax.models.inception",
    model={},
  )
  return parts.Part(config, arrays, {})


def pairs() -> list[Pair]:
  """The released names beside ours."""
  found = [
    rearranged("fc.weight", "params.fc_kernel", "o i -> i o"),
    same("fc.bias", "params.fc_bias"),
  ]
  for name in _shapes():
    if name.endswith(".conv.kernel"):
      layer = name.removeprefix("params.").removesuffix(".conv.kernel")
      statistics = f"batch_stats.{layer}.norm"
      found += [
        rearranged(f"{layer}.conv.weight", name, "o i h w -> h w i o"),
        same(f"{layer}.bn.weight", f"params.{layer}.norm.scale"),
        same(f"{layer}.bn.bias", f"params.{layer}.norm.bias"),
        same(f"{layer}.bn.running_mean", f"{statistics}.mean"),
        same(f"{layer}.bn.running_var", f"{statistics}.var"),
      ]
  return found


def _shapes() -> dict[str, tuple[int, ...]]:
  """Flat name -> shape of all that our network has."""
  variables = jax.eval_shape(
    inception.Model().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  return {name: x.shape for name, x in trees.flatten(variables).items()}
