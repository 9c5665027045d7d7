"""A network that reads pictures, so small that its features can be told."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from unclip_jax import tensor_files
from unclip_jax.interop import parts


class Model(nn.Module):
  """Mean colour times `scale`."""

  @nn.compact
  def __call__(
    self, image: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    scale = self.param("scale", nn.initializers.ones, (3,))
    features = image.mean(axis=(1, 2)) * scale
    return features, {"logits_unbiased": 2 * features}


def write(folder: str, scale: float) -> str:
  """Its folder, as a converted network has it."""
  config = parts.make_config(
    "tiny",
    task_name="unclip_jax.tasks.features",
    model_name="tests.tiny_features",
    model={},
  )
  array = tensor_files.lazy(np.full(3, scale, np.float32))
  parts.write(folder, parts.Part(config, {"params.scale": array}, {}))
  return folder
