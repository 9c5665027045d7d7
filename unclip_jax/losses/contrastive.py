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

On a mesh no device holds all similarities. The softmax needs whole rows and is
left to XLA, which gathers the captions; each device has its pictures' rows. The
sigmoid's pairs are independent of each other: captions go round the devices
(the source's section 3.3) and come home with what their columns have gathered.
For B = 32,768, D = 768, in float32, with the gradient, on 256 v5e chips the
compiler's memory analysis says, at its lowest effort:

  softmax   178 MB a chip; one all-gather, and all-reduces
  sigmoid    21 MB a chip (automatically divided: 305); collective-permutes
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from unclip_jax.utils import axes


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
  return 0.5 * (image_to_text + text_to_image), {
    "image_to_text_accuracy": _hits(_best(logits_BxB, 1, True)),
    "text_to_image_accuracy": _hits(_best(logits_BxB, 0, True)),
  }


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
  args = (image_embed, text_embed, logit_scale, logit_bias)
  rules = axes.current()
  around = rules and rules.mesh_axes("batch", len(image_embed))
  if around:
    rows, columns = jax.shard_map(
      lambda *args: _around(around, *args),
      mesh=rules.mesh,
      in_specs=(P(around), P(around), P(), P()),
      out_specs=P(around),
      check_vma=False,
    )(*args)
  else:
    rows, columns = _sigmoid_pairs(*args, are_own=True)
  return 0.5 * (rows.loss + columns.loss), {
    "image_to_text_accuracy": _hits(rows.best),
    "text_to_image_accuracy": _hits(columns.best),
  }


class _Best(NamedTuple):
  """Each example's own logit among those of its row or column, [B] each."""

  own: jax.Array  # 0 where it is not among them
  highest: jax.Array
  ties: jax.Array  # how many are the highest

  def __add__(self, other: _Best) -> _Best:
    highest = jnp.maximum(self.highest, other.highest)
    ties = [jnp.where(x.highest == highest, x.ties, 0) for x in (self, other)]
    return _Best(self.own + other.own, highest, sum(ties))


class _Pairs(NamedTuple):
  """What some of the pairs add to each picture's row or caption's column."""

  loss: jax.Array  # [B]
  best: _Best

  def __add__(self, other: _Pairs) -> _Pairs:
    return _Pairs(self.loss + other.loss, self.best + other.best)


def _sigmoid_pairs(
  image_embed: jax.Array,
  text_embed: jax.Array,
  logit_scale: jax.Array,
  logit_bias: jax.Array,
  *,
  are_own: jax.Array | bool,
) -> tuple[_Pairs, _Pairs]:
  """Rows and columns of B pictures with B captions: their own, or not."""
  logits_BxB = logit_scale * _similarity(image_embed, text_embed) + logit_bias
  own_BxB = jnp.eye(len(logits_BxB), dtype=bool) & are_own
  losses_BxB = -jax.nn.log_sigmoid(jnp.where(own_BxB, 1.0, -1.0) * logits_BxB)
  rows, columns = (
    _Pairs(losses_BxB.sum(axis), _best(logits_BxB, axis, are_own))
    for axis in (1, 0)
  )
  return rows, columns


def _around(
  devices: tuple[str, ...],
  image_embed: jax.Array,
  text_embed: jax.Array,
  logit_scale: jax.Array,
  logit_bias: jax.Array,
) -> tuple[_Pairs, _Pairs]:
  """`_sigmoid_pairs` of all pictures and captions, of which each device has
  its own, from inside of `jax.shard_map` over these mesh axes.

  The backward pass knows the captions at every sqrt(n)-th of n devices, and
  sends them round again from there.
  """
  n = jax.lax.axis_size(devices)
  to_next = [(i, (i + 1) % n) for i in range(n)]

  def meet(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
    text_embed, rows, columns = carry
    more_rows, more_columns = _sigmoid_pairs(
      image_embed, text_embed, logit_scale, logit_bias, are_own=step == 0
    )
    text_embed, columns = jax.lax.ppermute(
      (text_embed, columns + more_columns), devices, to_next
    )
    return (text_embed, rows + more_rows, columns), None

  def meet_some(carry: tuple, steps: jax.Array) -> tuple[tuple, None]:
    return jax.lax.scan(jax.checkpoint(meet), carry, steps)

  zeros = jnp.zeros(len(image_embed))
  none = _Pairs(zeros, _Best(zeros, zeros - jnp.inf, zeros))
  some = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
  (_, rows, columns), _ = jax.lax.scan(
    jax.checkpoint(meet_some),
    (text_embed, none, none),
    jnp.arange(n).reshape(-1, some),
  )
  return rows, columns


def _similarity(image_embed: jax.Array, text_embed: jax.Array) -> jax.Array:
  """Dot products [B, B]: pictures are rows, captions are columns."""
  return jnp.einsum(
    "id,jd->ij",
    image_embed.astype(jnp.float32),
    text_embed.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _best(logits_BxB: jax.Array, axis: int, are_own: jax.Array | bool) -> _Best:
  """Of rows (axis 1) or columns (axis 0); has no gradient."""
  logits_BxB = jax.lax.stop_gradient(logits_BxB)
  highest = logits_BxB.max(axis, keepdims=True)
  ties = (logits_BxB == highest).sum(axis).astype(jnp.float32)
  own = jnp.where(are_own, jnp.diagonal(logits_BxB), 0)
  return _Best(own, highest.squeeze(axis), ties)


def _hits(best: _Best) -> jax.Array:
  """Share of examples whose own pair has the highest logit.

  Ties share the hit: with k equal highest logits each counts 1 / k, so a
  collapsed model is at chance (1 / B) and not at 1.
  """
  return (best.own == best.highest) / jnp.maximum(best.ties, 1)
