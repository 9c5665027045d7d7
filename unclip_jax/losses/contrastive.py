"""Contrastive losses between pictures and captions.

  softmax   symmetric InfoNCE: Radford et al. 2021 (CLIP, arXiv 2103.00020),
            figure 3
  sigmoid   pairwise sigmoid loss: Zhai et al. 2023 (SigLIP, arXiv 2303.15343),
            equation 1

Row i of both embeddings is one example; all other rows are its negatives, so
the loss of one example depends on the whole batch. Everything is float32, and
the similarities ask for full precision: `logit_scale` (up to 100) would
multiply the rounding of a bfloat16 product.

Deviation: both papers give one number for the batch. Here it is split over the
examples so that the mean over [B] is the papers' number: an example gets half
of its picture's row and half of its caption's column.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax(
  image_embed: jax.Array, text_embed: jax.Array, logit_scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Symmetric softmax InfoNCE (Radford et al. 2021, figure 3).

  Args:
    image_embed: [B, D], L2-normalised.
    text_embed: [B, D], L2-normalised.
    logit_scale: [] factor on the cosines, after exp (1 / temperature).

  Returns:
    The loss [B] in nats (ln B where nothing is learned) and the metrics
    `image_to_text_accuracy` and `text_to_image_accuracy` [B] in [0, 1].
  """
  logits_BxB = logit_scale * _similarity(image_embed, text_embed)
  image_to_text = -jnp.diagonal(jax.nn.log_softmax(logits_BxB, axis=1))
  text_to_image = -jnp.diagonal(jax.nn.log_softmax(logits_BxB, axis=0))
  return 0.5 * (image_to_text + text_to_image), _accuracies(logits_BxB)


def sigmoid(
  image_embed: jax.Array,
  text_embed: jax.Array,
  logit_scale: jax.Array,
  logit_bias: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Pairwise sigmoid loss (Zhai et al. 2023, equation 1).

  Args:
    image_embed: [B, D], L2-normalised.
    text_embed: [B, D], L2-normalised.
    logit_scale: [] factor on the cosines, after exp.
    logit_bias: [] added to every logit; the paper starts it at -10, because
      B - 1 of B pairs are negative.

  Returns:
    The loss [B] in nats, summed over the B pairs of an example, and the
    metrics of `softmax`.
  """
  B = image_embed.shape[0]
  logits_BxB = logit_scale * _similarity(image_embed, text_embed) + logit_bias
  signs_BxB = 2.0 * jnp.eye(B) - 1.0  # 1 for a pair, -1 for a negative
  losses_BxB = -jax.nn.log_sigmoid(signs_BxB * logits_BxB)
  loss = 0.5 * (losses_BxB.sum(axis=1) + losses_BxB.sum(axis=0))
  return loss, _accuracies(logits_BxB)


def _similarity(image_embed: jax.Array, text_embed: jax.Array) -> jax.Array:
  """Dot products [B, B]: pictures are rows, captions are columns."""
  return jnp.einsum(
    "id,jd->ij",
    image_embed.astype(jnp.float32),
    text_embed.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _accuracies(logits_BxB: jax.Array) -> dict[str, jax.Array]:
  """Share of examples whose own pair has the highest logit, per direction.

  Ties share the hit: with k equal highest logits each counts 1 / k, so a
  collapsed model is at chance (1 / B) and not at 1.
  """

  def hits(axis: int) -> jax.Array:
    best = logits_BxB == logits_BxB.max(axis=axis, keepdims=True)
    return jnp.diagonal(best) / jnp.maximum(best.sum(axis=axis), 1)

  return {
    "image_to_text_accuracy": hits(axis=1),
    "text_to_image_accuracy": hits(axis=0),
  }
