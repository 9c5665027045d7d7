"""Autoregressive decoding: a network that predicts the next token, in a scan.

The network enters only as `decode_fn(tokens, index, cache) -> (logits, cache)`,
which is told token `index` of each of B rows and predicts token index + 1. The
cache is any pytree of fixed shapes (usually the keys and values of all
positions, each written into its place), so that `lax.scan` updates it in place.

From the logits a token is drawn by, in this order, classifier-free guidance,
temperature, top-k (Fan et al. 2018, arXiv 1805.04833) and top-p (nucleus
sampling, Holtzman et al. 2019, arXiv 1904.09751). `beam_search` draws nothing:
it looks for the most probable sequences, up to the length penalty of Wu et al.
2016 (arXiv 1609.08144, equation 14).

Randomness: `rng` is one typed key, or typed keys [B], one per row, in which
case a row's draws do not depend on the batch that it is in. Token i is drawn
with fold_in(rng, i).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.utils import errors

PyTree = Any
# (tokens [B] int32, index [] int32, cache) -> (logits [B, V], cache)
DecodeFn = Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]

OnStep = Callable[[int], None]


class Beams(NamedTuple):
  """K sequences of each of B rows that `beam_search` found, the best first.

  Attributes:
    tokens: [B, K, num_tokens] int32; behind its end a sequence is padded.
    log_probs: [B, K] float32, of the whole sequence with its end; -inf where
      there are fewer than K sequences.
    scores: [B, K] float32, what they are sorted by.
    lengths: [B, K] int32, tokens with the end.
    is_finished: [B, K] bool, False where the end did not come.
  """

  tokens: jax.Array
  log_probs: jax.Array
  scores: jax.Array
  lengths: jax.Array
  is_finished: jax.Array


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
      logits = guide(logits, guidance_scale)
    tokens = _draw(_fold_in(rng, i), logits, temperature, top_k, top_p)
    if known is not None:
      tokens = jnp.where(is_known[i], known[i], tokens)
    _report(on_step, num_tokens, tokens)
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


def beam_search(
  decode_fn: DecodeFn,
  logits: jax.Array,
  cache: PyTree,
  *,
  num_beams: int,
  num_tokens: int,
  end_token: int,
  pad_token: int = 0,
  length_penalty: float = 0.0,
  on_step: OnStep | None = None,
) -> Beams:
  """Beam search: the best sequences of up to `num_tokens` tokens.

  At each token the `num_beams` best are kept of all continuations of the
  beams, where one that has its end has none but itself. What is best is said by
  log P / ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14), also
  among beams of different lengths. One beam is greedy decoding.

  Args:
    decode_fn: the network; it takes and gives B * num_beams rows, the beams of
      a row together. Called num_tokens - 1 times.
    logits: [B, V] of the first token.
    cache: what `decode_fn` has seen before it; leaves [B, ...], which are
      repeated and reordered with the beams.
    num_beams: K.
    end_token: is the last of a sequence, and counts in its length.
    pad_token: what stands behind it.
    length_penalty: the exponent; 0 sorts by probability, more favours long
      sequences.
    on_step: called on the host with `num_tokens` after every token.

  Raises:
    UserError: num_beams is less than 1.
  """
  if num_beams < 1:
    raise errors.UserError(f"num_beams must be 1 or more, not {num_beams}")
  B, K = logits.shape[0], num_beams
  logits, cache = jax.tree.map(
    lambda x: jnp.repeat(x, K, axis=0), (logits, cache)
  )
  # All beams are one at first: the others are made impossible.
  log_probs = jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0)
  beams = Beams(
    tokens=jnp.full((B, K, num_tokens), pad_token, jnp.int32),
    log_probs=log_probs,
    scores=log_probs,
    lengths=jnp.zeros((B, K), jnp.int32),
    is_finished=jnp.zeros((B, K), bool),
  )

  def extend(
    beams: Beams, logits: jax.Array, i: jax.Array
  ) -> tuple[Beams, jax.Array, jax.Array]:
    """The beams with token i; these tokens [B, K], and what they extend."""
    V = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_probs = jnp.where(
      beams.is_finished[..., None],
      jnp.where(jnp.arange(V) == pad_token, 0.0, -jnp.inf),
      log_probs.reshape(B, K, V),
    )
    log_probs = beams.log_probs[..., None] + log_probs
    lengths = beams.lengths + ~beams.is_finished
    scores = log_probs / (((5 + lengths) / 6) ** length_penalty)[..., None]
    scores, chosen = jax.lax.top_k(scores.reshape(B, K * V), K)
    parents, tokens = chosen // V, (chosen % V).astype(jnp.int32)

    def take(x: jax.Array) -> jax.Array:
      return jax.vmap(lambda rows, places: rows[places])(x, parents)

    was_finished = take(beams.is_finished)
    beams = Beams(
      tokens=take(beams.tokens).at[:, :, i].set(tokens),
      log_probs=jnp.take_along_axis(
        log_probs.reshape(B, K * V), chosen, axis=1
      ),
      scores=scores,
      lengths=take(lengths),
      is_finished=was_finished | (tokens == end_token),
    )
    _report(on_step, num_tokens, tokens[0])
    return beams, tokens, parents

  def body(
    carried: tuple[Beams, jax.Array, PyTree], i: jax.Array
  ) -> tuple[tuple[Beams, jax.Array, PyTree], None]:
    beams, logits, cache = carried
    beams, tokens, parents = extend(beams, logits, i)
    rows = (jnp.arange(B)[:, None] * K + parents).reshape(-1)
    cache = jax.tree.map(lambda x: x[rows], cache)
    logits, cache = decode_fn(tokens.reshape(-1), i, cache)
    return (beams, logits, cache), None

  (beams, logits, _), _ = jax.lax.scan(
    body, (beams, logits, cache), jnp.arange(num_tokens - 1)
  )
  return extend(beams, logits, jnp.asarray(num_tokens - 1))[0]


def guide(logits: jax.Array, scale: float) -> jax.Array:
  """uncond + scale (cond - uncond) of [2B, ...], the conditional half first."""
  cond, uncond = jnp.split(logits, 2)
  return uncond + scale * (cond - uncond)


def up_to_end(
  tokens: jax.Array, end_token: int, pad_token: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Texts cut behind their first end.

  Args:
    tokens: [B, L] int32, whose first is the begin, even if it is the same
      token as the end.

  Returns:
    [B, L] int32, padded behind the end, and bool, True up to it.
  """
  is_end = (tokens == end_token).at[:, 0].set(False)
  mask = jnp.cumsum(is_end, axis=1) - is_end == 0
  return jnp.where(mask, tokens, pad_token), mask


def _report(on_step: OnStep | None, num_tokens: int, tokens: jax.Array) -> None:
  if on_step is not None:
    # The dependence on the token keeps the call behind the step's work.
    jax.debug.callback(lambda _: on_step(num_tokens), tokens[0])


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
