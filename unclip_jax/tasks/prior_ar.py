"""The autoregressive prior: P(z_i | caption) (Ramesh et al. 2022, section 2.2).

The CLIP image embedding z_i is projected onto its first principal components,
ordered by decreasing eigenvalue, each of which is quantised into buckets; a
causal transformer predicts the codes one after another, given the encoded
caption, the CLIP text embedding z_t and a token for the quantised dot product
z_i . z_t. In training the token is the true one; sampling draws it from the
top half of its values, which asks for a picture that fits its caption well.

Where the paper is silent: buckets are of equal width between the data's
extremes ("uniform"), so that the rounding error has the same bound for every
embedding; "quantile" makes them equally probable, with wide ones in the tails.
Buckets of the dot product are quantiles: with 20 of them the thresholds that
the paper tried, 50, 70, 85 and 95 %, are all edges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from unclip_jax import decoding
from unclip_jax.diffusion import draws
from unclip_jax.tasks import base, priors
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import errors

BUCKET_KINDS = ("uniform", "quantile")
# A fine bucket is narrower than a bfloat16 product's rounding error.
_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Task:
  """Predicts the codes of a CLIP image embedding from a caption.

  How many codes, buckets and dot-product buckets there are says the model.

  Attributes:
    buckets: "uniform" or "quantile", see the module's docstring.
    text_drop_prob: share of captions dropped in training, which makes
      classifier-free guidance possible; 0.1 in the paper.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  buckets: str = "uniform"
  text_drop_prob: float = 0.1
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    condition = self._condition(frozen, batch)
    B = len(condition["text_mask"])
    codes = jnp.zeros((B, self.model.num_codes), jnp.int32)
    return self.model.init(rng, codes, jnp.zeros((B,), jnp.int32), **condition)

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    @jax.jit
    def embed(
      clip_variables: base.Variables, batch: base.Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      clip = self.upstream["clip"]
      image_embed = clip_task.image_embed(clip, clip_variables, batch)
      text_embed, _ = clip_task.text_states(clip, clip_variables, batch)
      weight = batch["mask"].astype(jnp.float32)
      return image_embed, dot_product(image_embed, text_embed), weight

    embeds = [embed(frozen["clip"], batch) for batch in batches]
    return {
      "code_space": fit_code_space(
        *(jnp.concatenate(parts) for parts in zip(*embeds)),
        num_codes=self.model.num_codes,
        num_buckets=self.model.num_buckets,
        num_dot_buckets=self.model.num_dot_buckets,
        kind=self.buckets,
      )
    }

  def _condition(
    self,
    frozen: base.Frozen,
    batch: base.Batch,
    drop: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    return priors.condition(
      self.upstream["clip"],
      frozen["clip"],
      batch,
      drop=drop,
      as_tokens=self.model.vocab_size is not None,
    )

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
    """Mean cross-entropy of the codes, in nats per code."""
    del step
    drop_rng, dropout_rng = draws.split(rng)
    image_embed = clip_task.image_embed(
      self.upstream["clip"], frozen["clip"], batch
    )
    condition = self._condition(frozen, batch)
    table = frozen["code_space"]
    codes = quantize(table, image_embed)
    dot = dot_product(image_embed, condition["text_embed"])
    dot_bucket = jnp.searchsorted(table["dot_edges"], dot, side="right")
    if train:
      condition["text_drop"] = draws.bernoulli(
        drop_rng, self.text_drop_prob, dot.shape
      )
    logits, _ = self.model.apply(
      variables,
      codes,
      dot_bucket,
      **condition,
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
    is_right = (jnp.argmax(logits, axis=-1) == codes).astype(jnp.float32)
    metrics = {
      "accuracy": is_right.mean(axis=-1),
      "loss_first_code": loss[:, 0],
    }
    return base.LossOutput(loss.mean(axis=-1), metrics, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    guidance_scale: float = 1.0,
    num_candidates: int = 1,
    dot_quantile: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_step: decoding.OnStep | None = None,
  ) -> dict[str, jax.Array]:
    """Draws `image_embed` for `text_tokens`, `text_mask` of the batch.

    Args:
      rng: one key, or one key per caption, [B].
      guidance_scale: 1 is off.
      num_candidates: draws per caption, of which the one with the largest
        dot product with z_t is kept.
      dot_quantile: the dot-product token is drawn uniformly from the buckets
        above this quantile of the training data's; 0.5 in the paper.
      temperature, top_k, top_p, on_step: as in decoding.sample.

    Returns:
      `image_embed` [B, D] in the CLIP's own space and `text_embed` [B, D],
      normalised.

    Raises:
      UserError: an option out of its range.
    """
    if not 0.0 <= dot_quantile < 1.0:
      raise errors.UserError(
        f"dot_quantile must be in [0, 1), not {dot_quantile}"
      )
    apply = functools.partial(self.model.apply, variables)
    condition = self._condition(frozen, batch)
    rows = len(condition["text_mask"]) * num_candidates
    dot_rng, code_rng = draws.split(priors.candidate_rngs(rng, num_candidates))
    null = None
    if guidance_scale != 1.0:
      drop = jnp.ones(1, bool)
      null = self._condition(frozen, priors.first_row(batch), drop)
    text = priors.encode_rows(
      functools.partial(apply, method=self.model.encode_text),
      condition,
      null,
      num_candidates,
    )
    dot_bucket = self._draw_dot_bucket(dot_rng, rows, dot_quantile)
    if guidance_scale != 1.0:
      none = jnp.full_like(dot_bucket, self.model.num_dot_buckets)
      dot_bucket = jnp.concatenate([dot_bucket, none])
    logits, cache = apply(text, dot_bucket, method=self.model.prefill)
    codes = decoding.sample(
      functools.partial(apply, method=self.model.decode_step),
      logits,
      cache,
      code_rng,
      num_tokens=self.model.num_codes,
      guidance_scale=guidance_scale,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      on_step=on_step,
    )
    candidates = dequantize(frozen["code_space"], codes)
    return priors.keep_nearest(candidates, condition["text_embed"])

  def _draw_dot_bucket(
    self, rng: jax.Array, rows: int, quantile: float
  ) -> jax.Array:
    """[rows] int32, uniform over the buckets above a quantile."""
    num = self.model.num_dot_buckets
    # A quantile like 0.7 of 20 buckets is 14, whatever its rounding.
    first = min(math.ceil(round(quantile * num, 6)), num - 1)
    return draws.integers(rng, first, num, (rows,))

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return priors.predict_fns(self)


def dot_product(image_embed: jax.Array, text_embed: jax.Array) -> jax.Array:
  """z_i . z_t of unit vectors [B, D]: [B] in [-1, 1]."""
  return jnp.sum(
    clip_task.normalize(image_embed) * clip_task.normalize(text_embed), axis=-1
  )


def fit_code_space(
  image_embed: jax.Array,
  dots: jax.Array,
  weights: jax.Array,
  *,
  num_codes: int,
  num_buckets: int,
  num_dot_buckets: int,
  kind: str = "uniform",
) -> dict[str, jax.Array]:
  """The table by which embeddings become codes and back.

  Args:
    image_embed: [N, D] of the CLIP, not normalised; N many times D.
    dots: [N], `dot_product` with the captions.
    weights: [N], 0 for rows that do not count.
    num_codes: K, principal components that are kept; at most D.
    kind: one of BUCKET_KINDS.

  Returns:
    `mean` [D]; `components` [K, D], orthonormal rows by decreasing variance;
    `edges` [K, num_buckets + 1], ascending, and `centers` [K, num_buckets],
    the middles between them; `dot_edges` [num_dot_buckets - 1], ascending.

  Raises:
    UserError: more codes than dimensions, or an unknown kind.
  """
  D = image_embed.shape[-1]
  if num_codes > D:
    raise errors.UserError(
      f"config.model.num_codes {num_codes} is more than the {D} dimensions of "
      "the CLIP's embeddings: lower it"
    )
  if kind not in BUCKET_KINDS:
    raise errors.UserError(
      f"config.task.buckets '{kind}' is not one of {', '.join(BUCKET_KINDS)}"
    )
  x = image_embed.astype(jnp.float32)
  shares = weights / weights.sum()
  mean = jnp.sum(shares[:, None] * x, axis=0)
  centred = (x - mean) * jnp.sqrt(shares)[:, None]
  covariance = jnp.matmul(centred.T, centred, precision=_PRECISION)
  _, vectors = jnp.linalg.eigh(covariance)  # by increasing eigenvalue
  components = vectors[:, ::-1].T[:num_codes]
  scores = jnp.matmul(x - mean, components.T, precision=_PRECISION)
  fractions = jnp.linspace(0.0, 1.0, num_buckets + 1)
  if kind == "uniform":
    low = scores.min(axis=0)[:, None]
    edges = low + (scores.max(axis=0)[:, None] - low) * fractions
  else:
    edges = jax.vmap(_quantiles, in_axes=(1, None, None))(
      scores, shares, fractions
    )
  dot_fractions = jnp.linspace(0.0, 1.0, num_dot_buckets + 1)[1:-1]
  return {
    "mean": mean,
    "components": components,
    "edges": edges,
    "centers": (edges[:, 1:] + edges[:, :-1]) / 2,
    "dot_edges": _quantiles(dots, shares, dot_fractions),
  }


def _quantiles(
  x: jax.Array, shares: jax.Array, fractions: jax.Array
) -> jax.Array:
  """Of weighted values [N], between the least and the greatest."""
  order = jnp.argsort(x)
  middles = jnp.cumsum(shares[order]) - shares[order] / 2
  span = (middles - middles[0]) / (middles[-1] - middles[0])
  return jnp.interp(fractions, span, x[order])


def quantize(table: dict[str, jax.Array], image_embed: jax.Array) -> jax.Array:
  """[B, D] of the CLIP -> codes [B, K] int32; beyond the edges the last one."""
  scores = jnp.matmul(
    image_embed.astype(jnp.float32) - table["mean"],
    table["components"].T,
    precision=_PRECISION,
  )

  def codes(edges: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.searchsorted(edges[1:-1], scores, side="right")

  return jax.vmap(codes, in_axes=(0, 1), out_axes=1)(table["edges"], scores)


def dequantize(table: dict[str, jax.Array], codes: jax.Array) -> jax.Array:
  """Codes [B, K] -> [B, D] of the CLIP, from the middles of the buckets."""
  scores = jax.vmap(jnp.take, in_axes=(0, 1), out_axes=1)(
    table["centers"], codes
  )
  return table["mean"] + jnp.matmul(
    scores, table["components"], precision=_PRECISION
  )
