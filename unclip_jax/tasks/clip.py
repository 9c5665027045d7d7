"""CLIP: contrastive pretraining (Radford et al. 2021, arXiv 2103.00020).

The loss is the symmetric softmax InfoNCE of CLIP or the pairwise sigmoid of
SigLIP (Zhai et al. 2023, arXiv 2303.15343). One example's loss depends on the
whole batch: under `jax.jit` over a mesh the negatives are the global batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import draws
from unclip_jax.losses import contrastive
from unclip_jax.tasks import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Matches pictures with their captions.

  Attributes:
    loss_type: "softmax" (InfoNCE) or "sigmoid" (SigLIP).
    max_logit_scale: bound on exp(logit_scale); 100 in CLIP.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  loss_type: str = "softmax"
  max_logit_scale: float = 100.0

  batch_coupled = True

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    return self.model.init(
      rng, batch["image"], batch["text_tokens"], batch["text_mask"]
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

  @property
  def image_size(self) -> int:
    """Pixels of a side of the pictures that `encode_image` takes.

    Raises:
      UserError: there is no vision tower.
    """
    self.model.check_vision()
    return self.model.image_size

  def encode_image(
    self, variables: base.Variables, image: jax.Array
  ) -> jax.Array:
    """`image_embed` [B, D], not normalised, of pictures [B, S, S, 3]."""
    image_embed, _ = self.model.apply(
      variables, image, method=self.model.encode_image
    )
    return image_embed

  def encode_text(
    self,
    variables: base.Variables,
    text_tokens: jax.Array,
    text_mask: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """`text_embed` [B, D], not normalised, and `text_encodings` [B, L, W].

    Captions [B, M] that are longer than the model's context keep their first
    tokens and the end of sequence; L is then the context.
    """
    text_tokens, text_mask = _cut(
      text_tokens, text_mask, self.model.context_length
    )
    text_embed, out = self.model.apply(
      variables, text_tokens, text_mask, method=self.model.encode_text
    )
    return text_embed, out["text_encodings"]

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
    del step
    outputs = self.encode(variables, frozen, batch, rng, train=train)
    return self.coupled_loss(variables, frozen, outputs)

  def encode(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> dict[str, jax.Array]:
    """`image_embed` and `text_embed` [B, D], not normalised."""
    del frozen
    output, _ = self.model.apply(
      variables,
      batch["image"],
      batch["text_tokens"],
      batch["text_mask"],
      train=train,
      rngs={"dropout": draws.first(rng)},
    )
    return {k: output[k] for k in ("image_embed", "text_embed")}

  def coupled_loss(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    outputs: dict[str, jax.Array],
  ) -> base.LossOutput:
    del frozen
    params = variables["params"]
    if "logit_scale" not in params:
      raise errors.UserError(
        "this CLIP has no logit_scale, and is not to be trained: set"
        " config.model.logit_scale_init"
      )
    # Radford et al., section 2.5: the scale is kept at or below 100.
    logit_scale = jnp.exp(
      jnp.minimum(params["logit_scale"], math.log(self.max_logit_scale))
    )
    image_embed = normalize(outputs["image_embed"])
    text_embed = normalize(outputs["text_embed"])
    if self.loss_type == "sigmoid":
      if "logit_bias" not in params:
        raise errors.UserError(
          "loss_type 'sigmoid' needs a bias: set config.model.logit_bias_init,"
          " which is -10 in SigLIP"
        )
      loss, metrics = contrastive.sigmoid(
        image_embed, text_embed, logit_scale, params["logit_bias"]
      )
    elif self.loss_type == "softmax":
      loss, metrics = contrastive.softmax(image_embed, text_embed, logit_scale)
    else:
      raise ValueError(
        f"loss_type '{self.loss_type}' is not softmax or sigmoid"
      )
    return base.LossOutput(loss, {**metrics, "logit_scale": logit_scale}, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    **options: Any,
  ) -> dict[str, jax.Array]:
    """CLIP draws nothing; it embeds: see `predict_fns`."""
    raise NotImplementedError(
      "CLIP embeds pictures and captions; it has no sampler"
    )

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def embed(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      del frozen, rng
      text_embed, _ = self.encode_text(
        variables, batch["text_tokens"], batch["text_mask"]
      )
      image_embed = self.encode_image(variables, batch["image"])
      return {
        "image_embed": normalize(image_embed),
        "text_embed": normalize(text_embed),
      }

    def features(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      """Of pictures of any size, and of captions where there are some."""
      del frozen, rng
      B, _, _, C = batch["image"].shape
      shape = (B, self.image_size, self.image_size, C)
      image = jax.image.resize(batch["image"], shape, "bicubic")
      image_embed = self.encode_image(variables, jnp.clip(image, -1.0, 1.0))
      found = {"image_embed": normalize(image_embed)}
      if "text_tokens" in batch:
        text_embed, _ = self.encode_text(
          variables, batch["text_tokens"], batch["text_mask"]
        )
        found["text_embed"] = normalize(text_embed)
      return found

    return {
      "loss": base.loss_predict_fn(self),
      "embed": embed,
      "features": features,
    }


def _cut(
  text_tokens: jax.Array, text_mask: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
  """[B, M] -> [B, length] as the tokenizer cuts, where M is more."""
  if text_tokens.shape[1] <= length:
    return text_tokens, text_mask
  end = jnp.sum(text_mask, axis=1, keepdims=True) - 1
  end_token = jnp.take_along_axis(text_tokens, end, axis=1)
  tail = jnp.where(end < length, text_tokens[:, length - 1 : length], end_token)
  text_tokens = jnp.concatenate([text_tokens[:, : length - 1], tail], axis=1)
  return text_tokens, text_mask[:, :length]


def image_embed(
  clip: Any, variables: base.Variables, batch: base.Batch
) -> jax.Array:
  """`image_embed` [B, D], not normalised: stored in the batch, or encoded."""
  stored = batch.get("image_embed")
  if stored is not None:
    return stored
  return clip.encode_image(variables, batch["clip_image"])


def text_states(
  clip: Any, variables: base.Variables, batch: base.Batch
) -> tuple[jax.Array, jax.Array]:
  """`text_embed` [B, D], not normalised, and `text_encodings` [B, L, W].

  Stored in the batch, both of them, or encoded.
  """
  if "text_encodings" in batch:
    return batch["text_embed"], batch["text_encodings"]
  return clip.encode_text(variables, batch["text_tokens"], batch["text_mask"])


def caption(
  clip: Any,
  clip_variables: base.Variables,
  batch: base.Batch,
  *,
  drop: jax.Array | None = None,
  learned_null: bool = True,
  as_tokens: bool = False,
) -> dict[str, jax.Array]:
  """A network's text, as if there were none in the rows of `drop`.

  Args:
    clip: the task that encodes it; None: nothing does, the network takes
      tokens.
    batch: has text_tokens and text_mask [B, L], and may have what `text_states`
      stores.
    drop: [B] bool; None: no row.
    learned_null: the network puts its own null in place of what is dropped;
      else the empty caption is encoded there.
    as_tokens: tokens in place of the CLIP's states of them.

  Returns:
    `text_embed` [B, D], not normalised, where there is a CLIP; `text_tokens` or
    `text_encodings`, and `text_mask`; `text_drop`, where the network has to
    heed it.
  """
  if drop is not None and not learned_null:
    batch = _with_empty_captions(batch, drop)
  text = {}
  if clip is not None:
    text["text_embed"], text_encodings = text_states(
      clip, clip_variables, batch
    )
  if as_tokens:
    text |= base.text(batch)
  else:
    L = text_encodings.shape[1]
    text |= {
      "text_encodings": text_encodings,
      "text_mask": batch["text_mask"][:, :L],
    }
  if drop is not None and learned_null:
    text["text_drop"] = drop
  return text


def _with_empty_captions(
  batch: base.Batch, drop: jax.Array
) -> dict[str, jax.Array]:
  """Nothing between begin and end of text, in the rows of `drop` [B]."""
  text_tokens, text_mask = batch["text_tokens"], batch["text_mask"]
  position = jnp.arange(text_mask.shape[1])
  end = jnp.sum(text_mask, axis=1, keepdims=True) - 1
  end_token = jnp.take_along_axis(text_tokens, end, axis=1)
  empty = jnp.where(position == 0, text_tokens, 0)
  empty = jnp.where(position == 1, end_token, empty)
  drop = drop[:, None]
  # Without stored states: they are those of the whole captions.
  return {
    "text_tokens": jnp.where(drop, empty, text_tokens),
    "text_mask": jnp.where(drop, position < 2, text_mask),
  }


def normalize(embed: jax.Array) -> jax.Array:
  """Unit vectors along the last axis, in float32."""
  embed = embed.astype(jnp.float32)
  norm = jnp.linalg.norm(embed, axis=-1, keepdims=True)
  return embed / jnp.maximum(norm, 1e-8)
