"""What the diffusion and the autoregressive prior share.

Both give P(z_i | caption): they see the frozen CLIP's text states and text
embedding z_t, may draw several candidates for z_i and keep the one nearest to
z_t, and are measured beside the true z_i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.tasks import base
from unclip_jax.tasks import clip as clip_task


def condition(
  clip: Any,
  clip_variables: base.Variables,
  batch: base.Batch,
  *,
  normalize: bool = True,
  **options: Any,
) -> dict[str, jax.Array]:
  """z_t and the caption.

  Args:
    normalize: z_t is scaled to the norm of a standard normal vector; False: it
      is as the CLIP gives it.
    **options: of tasks.clip.caption.
  """
  text = clip_task.caption(clip, clip_variables, batch, **options)
  if normalize:
    scale = text["text_embed"].shape[-1] ** 0.5
    text["text_embed"] = clip_task.normalize(text["text_embed"]) * scale
  return text


def first_row(batch: base.Batch) -> dict[str, jax.Array]:
  """The first example's text, whose dropped form is every other one's."""
  return {k: v[:1] for k, v in base.text(batch).items()}


def null_row(batch: base.Batch) -> dict[str, jax.Array]:
  """One caption without tokens, of the batch's length."""
  row = first_row(batch)
  return {**row, "text_mask": jnp.zeros_like(row["text_mask"])}


def candidate_rngs(
  rng: jax.Array | None, num_candidates: int
) -> jax.Array | None:
  """Keys [B] of captions as keys [B * n] of candidates; others as they are."""
  if rng is None or not rng.ndim:
    return rng
  split = jax.vmap(lambda key: jax.random.split(key, num_candidates))
  return split(rng).reshape(-1)


def encode_rows(
  encode: Callable[..., base.PyTree],
  condition: dict[str, jax.Array],
  null: dict[str, jax.Array] | None,
  num_candidates: int = 1,
) -> base.PyTree:
  """What the network keeps of the texts, for [B * n] rows; guided [2 * B * n].

  The text runs once per caption and once for the dropped caption, which is
  the same for every row.

  Args:
    encode: takes the fields of `condition`.
    condition: of B captions.
    null: of one dropped caption; None: no guidance.
  """
  rows = jax.tree.map(
    lambda x: jnp.repeat(x, num_candidates, axis=0), encode(**condition)
  )
  if null is None:
    return rows
  return jax.tree.map(
    lambda x, y: jnp.concatenate([x, jnp.broadcast_to(y, x.shape)]),
    rows,
    encode(**null),
  )


def keep_nearest(
  candidates: jax.Array, text_embed: jax.Array
) -> dict[str, jax.Array]:
  """The best of each caption's draws, as the output of `sample`.

  Args:
    candidates: [B * n, D] in the CLIP's own space.
    text_embed: [B, D], of any length.

  Returns:
    `image_embed` [B, D], the candidate with the largest dot product of unit
    vectors with z_t, and `text_embed` [B, D], normalised.
  """
  B, D = text_embed.shape
  candidates = candidates.reshape(B, -1, D)
  text_embed = clip_task.normalize(text_embed)
  scores = jnp.einsum("bnd,bd->bn", clip_task.normalize(candidates), text_embed)
  best = jnp.argmax(scores, axis=1)
  image_embed = jnp.take_along_axis(candidates, best[:, None, None], axis=1)
  return {"image_embed": image_embed[:, 0], "text_embed": text_embed}


def predict_fns(task: Any) -> dict[str, base.PredictFn]:
  """`loss`, and `sample` beside the true embedding, of either prior."""

  def sample(
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    output = task.sample(variables, frozen, batch, rng, **task.sample_options)
    true_image_embed = clip_task.image_embed(
      task.upstream["clip"], frozen["clip"], batch
    )
    return {**output, "true_image_embed": true_image_embed}

  return {"loss": base.loss_predict_fn(task), "sample": sample}
