"""Autoregressive sampling: a network that predicts the next token, in a scan.

The network enters only as `decode_fn(tokens, index, cache) -> (logits, cache)`,
which is told token `index` of each of B rows and predicts token index + 1. The
cache is any pytree of fixed shapes (usually the keys and values of all
positions, each written into its place), so that `lax.scan` updates it in place.

From the logits a token is drawn by, in this order, classifier-free guidance,
temperature, top-k (Fan et al. 2018, arXiv 1805.04833) and top-p (nucleus
sampling, Holtzman et al. 2019, arXiv 1904.09751).

Randomness: `rng` is one typed key, or typed keys [B], one per row, in which
case a row's draws do not depend on the batch that it is in. Token i is drawn
with fold_in(rng, i).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.utils import errors

PyTree = Any
# (tokens [B] int32, index [] int32, cache) -> (logits [B, V], cache)
DecodeFn = Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]

OnStep = Callable[[int], None]


def sample(
  decode_fn: DecodeFn,
  logits: jax.Array,
  cache: PyTree,
  rng: jax.Array,
  *,
  num_tokens: int,
  guidance_scale: float = 1.0,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  known: jax.Array | None = None,
  is_known: jax.Array | None = None,
  on_step: OnStep | None = None,
) -> jax.Array:
  """Draws `num_tokens` tokens, one after another.

  Args:
    decode_fn: the network; with guidance it takes and gives 2B rows, the
      conditional half first. Called num_tokens - 1 times.
    logits: [B, V] of the first token; with guidance [2B, V].
    cache: what the first call of `decode_fn` is given.
    rng: typed key or keys [B].
    guidance_scale: uncond + scale (cond - uncond) of the logits; 1 is off.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: draw among the k most probable tokens, and those that equal the
      k-th; None: among all.
    top_p: draw among the fewest most probable tokens whose probabilities add
      up to top_p or more; None: among all.
    known: [B, num_tokens] int32, tokens that are given and not drawn.
    is_known: bool, broadcastable to [B, num_tokens]: where `known` counts.
    on_step: called on the host with `num_tokens` after every token.

  Returns:
    [B, num_tokens] int32.

  Raises:
    UserError: an option out of its range.
  """
  _check_options(temperature, top_k, top_p)
  is_guided = guidance_scale != 1.0
  B = logits.shape[0] // (2 if is_guided else 1)
  if known is not None:
    known = jnp.broadcast_to(known, (B, num_tokens)).T
    is_known = jnp.broadcast_to(is_known, (B, num_tokens)).T

  def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    if is_guided:
      cond, uncond = jnp.split(logits, 2)
      logits = uncond + guidance_scale * (cond - uncond)
    tokens = _draw(_fold_in(rng, i), logits, temperature, top_k, top_p)
    if known is not None:
      tokens = jnp.where(is_known[i], known[i], tokens)
    if on_step is not None:
      # The dependence on the token keeps the call behind the step's work.
      jax.debug.callback(lambda _: on_step(num_tokens), tokens[0])
    return tokens

  def body(
    carried: tuple[jax.Array, PyTree], i: jax.Array
  ) -> tuple[tuple[jax.Array, PyTree], jax.Array]:
    logits, cache = carried
    tokens = draw(logits, i)
    rows = jnp.concatenate([tokens, tokens]) if is_guided else tokens
    return decode_fn(rows, i, cache), tokens

  (logits, _), tokens = jax.lax.scan(
    body, (logits, cache), jnp.arange(num_tokens - 1)
  )
  last = draw(logits, jnp.asarray(num_tokens - 1))
  return jnp.concatenate([tokens, last[None]]).T


def _check_options(
  temperature: float, top_k: int | None, top_p: float | None
) -> None:
  if temperature < 0:
    raise errors.UserError(f"temperature must be 0 or more, not {temperature}")
  if top_k is not None and top_k < 1:
    raise errors.UserError(f"top_k must be 1 or more, not {top_k}")
  if top_p is not None and not 0.0 < top_p <= 1.0:
    raise errors.UserError(f"top_p must be in (0, 1], not {top_p}")


def _draw(
  rng: jax.Array,
  logits: jax.Array,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
) -> jax.Array:
  """Tokens [B] int32 from logits [B, V]."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  if top_p is not None:
    logits = keep_top_p(logits, top_p)
  if rng.ndim:
    tokens = jax.vmap(jax.random.categorical)(rng, logits)
  else:
    tokens = jax.random.categorical(rng, logits)
  return tokens.astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """-inf for all but the k largest logits of [B, V]; ties with the k-th stay.

  Fan et al. 2018, section 5.
  """
  largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
  return jnp.where(logits < largest[:, -1:], -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """-inf for all but the nucleus of [B, V]: Holtzman et al. 2019, section 3.1.

  A token stays where the probabilities of those above it add up to less than
  p; the most probable one always does.
  """
  descending = -jnp.sort(-logits, axis=-1)
  probs = jax.nn.softmax(descending, axis=-1)
  above = jnp.cumsum(probs, axis=-1) - probs
  smallest = jnp.where(above < p, descending, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def _fold_in(rng: jax.Array, step: jax.Array) -> jax.Array:
  if rng.ndim == 0:
    return jax.random.fold_in(rng, step)
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng, step)
