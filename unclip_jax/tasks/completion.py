"""Autoregressive image completion: each part of a picture from those before.

Image GPT (Chen et al. 2020), section 2.1, equation 1, in raster order. The
parts are codes of a frozen tokenizer, learned by cross-entropy and drawn one
after another, or patches of pixels, learned by the squared error and completed
by their means (models/completion.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax import decoding
from unclip_jax.diffusion import draws
from unclip_jax.models import mim as mim_model
from unclip_jax.tasks import base, image_tokens, mim
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Completes pictures from their top rows; it knows no captions.

  Attributes:
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "image_to_image"

  def __post_init__(self) -> None:
    if self._has_tokens:
      image_tokens.check_tokenizer(self)

  @property
  def _has_tokens(self) -> bool:
    return self.model.num_codes is not None

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    shape, dtype = (len(batch["image"]), self.model.num_patches), jnp.int32
    if not self._has_tokens:
      shape, dtype = (*shape, self.model.patch_size**2 * 3), jnp.float32
    return self.model.init(rng, jnp.zeros(shape, dtype))

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    return {}

  def loss(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    step: jax.Array,
    train: bool,
  ) -> base.LossOutput:
    """Nats per code, or the squared error of pixels."""
    del step
    parts = self._parts(frozen, batch)
    prediction, _ = self.model.apply(
      variables, parts, train=train, rngs={"dropout": draws.first(rng)}
    )
    if self._has_tokens:
      everything = jnp.ones(parts.shape, bool)
      return mim.token_loss(prediction, parts, everything)
    errors_ = jnp.square(prediction - parts)
    return base.LossOutput(errors_.mean(axis=(1, 2)), {}, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    num_known_rows: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_step: decoding.OnStep | None = None,
  ) -> dict[str, jax.Array]:
    """Completes the `image` [B, S, S, 3] of the batch.

    Args:
      rng: one key, or one key per picture; patches of pixels draw nothing.
      num_known_rows: rows of parts, from the top, that are given; None: half
        of them.
      temperature, top_k, top_p, on_step: of codes, as in decoding.sample.

    Returns:
      `image` [B, S, S, 3] in [-1, 1], whose known rows are those given, and of
      codes `image_tokens` [B, P] int32.

    Raises:
      UserError: an option out of its range.
    """
    S = self.model.grid_size
    rows = S // 2 if num_known_rows is None else num_known_rows
    if not 0 <= rows <= S:
      raise errors.UserError(
        f"num_known_rows {rows} must be in [0, {S}], rows of patches or codes"
      )
    parts = self._parts(frozen, batch)
    is_known = jnp.arange(S * S) < rows * S
    apply = functools.partial(self.model.apply, variables)
    first, cache = apply(len(parts), method=self.model.prefill)
    decode_fn = functools.partial(apply, method=self.model.decode_step)
    output = {}
    if self._has_tokens:
      tokens = decoding.sample(
        decode_fn,
        first,
        cache,
        rng,
        num_tokens=S * S,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        known=parts,
        is_known=is_known,
        on_step=on_step,
      )
      image = image_tokens.decode(self, frozen, tokens)
      output = {"image_tokens": tokens}
    else:
      parts = complete_patches(decode_fn, first, cache, parts, is_known)
      image = mim_model.to_image(parts, self.model.patch_size)
    # Not what a tokenizer makes of them.
    known = jnp.arange(image.shape[1]) < rows * self.model.patch_size
    image = jnp.where(known[:, None, None], batch["image"], image)
    return {"image": jnp.clip(image, -1.0, 1.0), **output}

  def _parts(self, frozen: base.Frozen, batch: base.Batch) -> jax.Array:
    """Tokens [B, P] int32, or patches [B, P, patch_size^2 * 3]."""
    if self._has_tokens:
      return image_tokens.encode(self, frozen, batch)
    return mim_model.to_patches(batch["image"], self.model.patch_size)

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
    }


def complete_patches(
  decode_fn: decoding.DecodeFn,
  first: jax.Array,
  cache: base.PyTree,
  patches: jax.Array,
  is_known: jax.Array,
) -> jax.Array:
  """Patches [B, P, any size], each unknown one as predicted from those before.

  Args:
    decode_fn, cache: as in decoding.sample, of patches in place of tokens.
    first: the prediction of patch 0.
    patches: [B, P, any size], read where is_known.
    is_known: [P] bool.
  """

  def choose(prediction: jax.Array, i: jax.Array | int) -> jax.Array:
    predicted = jnp.clip(prediction, -1.0, 1.0)
    return jnp.where(is_known[i], patches[:, i], predicted)

  def body(
    carried: tuple[jax.Array, base.PyTree], i: jax.Array
  ) -> tuple[tuple[jax.Array, base.PyTree], jax.Array]:
    prediction, cache = carried
    patch = choose(prediction, i)
    return decode_fn(patch, i, cache), patch

  P = patches.shape[1]
  (prediction, _), done = jax.lax.scan(body, (first, cache), jnp.arange(P - 1))
  last = choose(prediction, P - 1)
  return jnp.concatenate([done.swapaxes(0, 1), last[:, None]], axis=1)
