"""Pictures as the codes of a frozen tokenizer: what all tasks over them share.

A tokenizer, `config.frozen.tokenizer`, is any task with `encode_tokens`,
`decode_tokens`, `num_codes` and `grid_size`: tasks/dvae.py, tasks/vqgan.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.tasks import base
from unclip_jax.utils import errors


def check_tokenizer(task: Any) -> None:
  """Raises UserError unless the upstream tokenizer fits the model's codes."""
  if "tokenizer" not in task.upstream:
    raise errors.UserError(
      "this task needs config.frozen.tokenizer: name the folder of a trained "
      "dVAE or VQGAN"
    )
  for name in ("num_codes", "grid_size"):
    own = getattr(task.model, name)
    given = getattr(task.upstream["tokenizer"], name)
    if own != given:
      raise errors.UserError(
        f"the model's {name} is {own}, but that of the tokenizer is {given}: "
        "let config.model fit config.frozen.tokenizer"
      )


def encode(task: Any, frozen: base.Frozen, batch: base.Batch) -> jax.Array:
  """[B, K] int32: those of the batch, or the codes of its pictures."""
  if "image_tokens" in batch:
    return batch["image_tokens"]
  return task.upstream["tokenizer"].encode_tokens(
    frozen["tokenizer"], batch["image"]
  )


def decode(task: Any, frozen: base.Frozen, tokens: jax.Array) -> jax.Array:
  """[B, K] int32 -> [B, S, S, 3] in [-1, 1].

  Raises:
    UserError: the tokenizer's pictures are not of the model's size.
  """
  tokenizer = task.upstream["tokenizer"]
  image = tokenizer.decode_tokens(frozen["tokenizer"], tokens)
  if image.shape[1] != task.model.image_size:
    raise errors.UserError(
      f"config.model.image_size is {task.model.image_size}, but the tokenizer's"
      f" pictures have {image.shape[1]} pixels: set it to that"
    )
  return jnp.clip(image, -1.0, 1.0)
