"""Bottlenecks of autoencoders: a codebook, or a Gaussian.

Vector quantisation (van den Oord et al. 2017, arXiv 1711.00937). An encoder's
output z_e at each place becomes its nearest code e_k (equation 1); the gradient
of what is drawn from the code goes to z_e as it is (straight through, section
3.2), and the commitment loss, ||z_e - sg(e_k)||^2 (third term of equation 3),
keeps z_e near. Codes are no parameters: each is the moving average of the
outputs that it was nearest to (appendix A.1, equations 6 to 8),

  N_k = decay N_k + (1 - decay) n_k
  m_k = decay m_k + (1 - decay) sum of the outputs of code k
  e_k = m_k / N_k

A code that is hardly used (N_k below a threshold) dies: it is replaced by a
random output of the batch, N_k = 1 and m_k = e_k, as in Jukebox (Dhariwal et
al. 2020, arXiv 2005.00341, appendix B.1, "random restarts"). N_k starts at 0,
so that the first batch replaces all codes: those that many outputs are nearest
to by their mean, the others by one output each.

Units: n_k is V times the share of the outputs, so that 1 is the average code's,
whatever the size of a batch, and the threshold needs no other number.

What a step has seen is added up beside the codebook (`pending`), and enters the
averages when the next step begins (`committed`). So all microbatches of a step
see one codebook and give what the whole batch gives. Sums and counts are over
all rows that one program sees, which under `jax.jit` is the global batch; under
`jax.pmap`, and with SAM, they are averaged over devices or replicas, which
leaves all but the restarts as it would be: there a dead code becomes the mean
of one random output of each device.

Deviation: the averages live in float32 and start at 0 in place of the first
codes; e_k of a code that was never used is its initial value.
"""

from __future__ import annotations

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.utils import errors

# A code that is closer by less than a bfloat16 product's error is still nearer.
_PRECISION = jax.lax.Precision.HIGHEST
_LEAST_COUNT = 1e-6  # below it nothing can be said of a code's outputs
# Steps are told apart modulo this, in float32: what averages model states over
# replicas knows floating-point numbers only.
_STEPS = 4096
_MAX_LOG_VARIANCE = 20.0


class Codebook(NamedTuple):
  """The averages, and what has not entered them yet; all float32."""

  codes: jax.Array  # [V, D]
  counts: jax.Array  # [V], N; 1 = as often as the average code
  sums: jax.Array  # [V, D], m
  pending_step: jax.Array  # [], of the step that is being seen, modulo _STEPS
  pending_total: jax.Array  # [], how many outputs it has had
  pending_counts: jax.Array  # [V]
  pending_sums: jax.Array  # [V, D]
  restart_priority: jax.Array  # [V], of the outputs below; -1: there is none
  restart: jax.Array  # [V, D], random outputs


def init_codebook(codes: jax.Array) -> Codebook:
  """Averages over nothing, of initial codes [V, D]."""
  V, _ = codes.shape
  codes = codes.astype(jnp.float32)
  return Codebook(
    codes=codes,
    counts=jnp.zeros(V),
    sums=jnp.zeros_like(codes),
    pending_step=jnp.zeros(()),
    pending_total=jnp.zeros(()),
    pending_counts=jnp.zeros(V),
    pending_sums=jnp.zeros_like(codes),
    restart_priority=jnp.full(V, -1.0),
    restart=jnp.zeros_like(codes),
  )


def nearest(codes: jax.Array, x: jax.Array) -> jax.Array:
  """The nearest code of each vector (equation 1).

  Args:
    codes: [V, D].
    x: [..., D].

  Returns:
    [...] int32; of codes that are equally near the first one.
  """
  x = x.astype(jnp.float32)
  products = jnp.einsum("...d,vd->...v", x, codes, precision=_PRECISION)
  # |x - e|^2 without |x|^2, which is the same for every code.
  distances = jnp.sum(jnp.square(codes), axis=-1) - 2.0 * products
  return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def committed(
  book: Codebook, *, decay: float, restart_below: float
) -> Codebook:
  """The codebook after what is pending has entered the averages.

  Args:
    decay: of the averages, in [0, 1).
    restart_below: codes whose N is less are replaced; 0: none.
  """
  V, _ = book.codes.shape
  per_output = V / jnp.maximum(book.pending_total, 1.0)
  counts = decay * book.counts + (1 - decay) * per_output * book.pending_counts
  sums = decay * book.sums + (1 - decay) * per_output * book.pending_sums
  known = (counts > _LEAST_COUNT)[:, None]
  means = sums / jnp.maximum(counts, _LEAST_COUNT)[:, None]
  codes = jnp.where(known, means, book.codes)
  dead = (counts < restart_below) & (book.restart_priority >= 0.0)
  new = init_codebook(jnp.where(dead[:, None], book.restart, codes))._replace(
    counts=jnp.where(dead, 1.0, counts),
    sums=jnp.where(dead[:, None], book.restart, sums),
  )
  return _where(book.pending_total > 0.0, new, book)


def seen(
  book: Codebook,
  z_e: jax.Array,
  tokens: jax.Array,
  restart_noise: jax.Array,
) -> Codebook:
  """The codebook with more outputs pending.

  Args:
    z_e: encoder outputs [B, P, D].
    tokens: [B, P] int32, their codes.
    restart_noise: [B, V] uniform in [0, 1): for every code each example puts
      one of its outputs forward; the one with the highest priority is kept.
  """
  V, _ = book.codes.shape
  B, P = tokens.shape
  z_e = jax.lax.stop_gradient(z_e.astype(jnp.float32))
  chosen = jax.nn.one_hot(tokens, V, dtype=jnp.float32)
  # One uniform number gives two: a place, and how far it is into that place.
  places = jnp.minimum((restart_noise * P).astype(jnp.int32), P - 1)
  priorities = restart_noise * P - places
  best = jnp.argmax(priorities, axis=0)  # [V], an example for each code
  own = jnp.arange(V)
  priority, candidates = priorities[best, own], z_e[best, places[best, own]]
  better = priority > book.restart_priority
  return book._replace(
    pending_total=book.pending_total + B * P,
    pending_counts=book.pending_counts + chosen.sum((0, 1)),
    pending_sums=book.pending_sums
    + jnp.einsum("bpv,bpd->vd", chosen, z_e, precision=_PRECISION),
    restart_priority=jnp.where(better, priority, book.restart_priority),
    restart=jnp.where(better[:, None], candidates, book.restart),
  )


def straight_through(z_e: jax.Array, z_q: jax.Array) -> jax.Array:
  """z_q, whose gradient goes to z_e as it is (section 3.2)."""
  return z_e + jax.lax.stop_gradient(z_q.astype(z_e.dtype) - z_e)


def perplexity(counts: jax.Array) -> jax.Array:
  """2 to the entropy in bits of a distribution [V]: V where all are alike."""
  p = counts / jnp.maximum(counts.sum(), 1e-30)
  entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)))
  return jnp.exp(entropy)


def _where(condition: jax.Array, a: Codebook, b: Codebook) -> Codebook:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


class VectorQuantizer(nn.Module):
  """The codebook, in the collection "codebook".

  Attributes:
    num_codes: V.
    code_dim: D.
    decay: of the averages; 0.99 in the paper.
    restart_below: see `committed`.
  """

  num_codes: int
  code_dim: int
  decay: float = 0.99
  restart_below: float = 0.03

  def setup(self) -> None:
    if not 0.0 <= self.decay < 1.0 or not 0.0 <= self.restart_below < 1.0:
      raise errors.UserError(
        f"a codebook's decay {self.decay} and restart_below"
        f" {self.restart_below} must be in [0, 1): change config.model"
      )

    def fresh() -> dict[str, jax.Array]:
      shape = (self.num_codes, self.code_dim)
      codes = jax.random.normal(self.make_rng("params"), shape)
      return init_codebook(codes)._asdict()

    self.book = self.variable("codebook", "book", fresh)

  def __call__(
    self,
    z_e: jax.Array,
    *,
    step: jax.Array | None = None,
    restart_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Quantises encoder outputs; learns from them where "codebook" is mutable.

    Args:
      z_e: [B, h, w, D].
      step: [] int32, of training; needed to learn.
      restart_noise: [B, V] uniform in [0, 1); needed to learn.

    Returns:
      z_q [B, h, w, D], straight through, and {"tokens": [B, h, w] int32,
      "commitment": [B], the mean over places and dimensions, and of this batch
      "perplexity" [] in [1, V] and "code_usage" [], the share of codes used}.
    """
    B, h, w, _ = z_e.shape
    book = Codebook(**self.book.value)
    current = self._committed(book)
    learns = self.is_mutable_collection("codebook")
    learns = learns and not self.is_initializing()
    if learns:
      own_step = jnp.asarray(step % _STEPS, jnp.float32)
      is_new = jnp.abs(own_step - book.pending_step) > 0.5
      book = _where(is_new, current, book)._replace(pending_step=own_step)
      current = book
    tokens = nearest(current.codes, z_e)
    z_q = current.codes[tokens]
    if learns:
      flat = einops.rearrange(z_e, "b h w d -> b (h w) d")
      book = seen(book, flat, tokens.reshape(B, h * w), restart_noise)
      self.book.value = book._asdict()
    error = z_e.astype(jnp.float32) - jax.lax.stop_gradient(z_q)
    used = jnp.zeros(self.num_codes).at[tokens].add(1.0)
    return straight_through(z_e, z_q), {
      "tokens": tokens,
      "commitment": jnp.mean(jnp.square(error), axis=(1, 2, 3)),
      "perplexity": perplexity(used),
      "code_usage": jnp.mean(used > 0.0),
    }

  def decode(self, tokens: jax.Array) -> jax.Array:
    """Codes [...] int32 -> their vectors [..., D] float32."""
    return self._committed(Codebook(**self.book.value)).codes[tokens]

  def _committed(self, book: Codebook) -> Codebook:
    return committed(book, decay=self.decay, restart_below=self.restart_below)


class Gaussian(NamedTuple):
  """Independent normal distributions, of any one shape."""

  mean: jax.Array
  log_variance: jax.Array

  def sample(self, noise: jax.Array, temperature: float = 1.0) -> jax.Array:
    """mean + temperature * std * noise (Kingma & Welling 2013, section 2.4)."""
    return self.mean + temperature * jnp.exp(0.5 * self.log_variance) * noise


def gaussian(moments: jax.Array) -> Gaussian:
  """[..., 2 D] of a network -> float32 of [..., D], with bounded variances."""
  mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  bound = _MAX_LOG_VARIANCE
  return Gaussian(mean, jnp.clip(log_variance, -bound, bound))
