"""Codebooks and Gaussians: nearest, straight through, averages, restarts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.diffusion import gaussian
from unclip_jax.layers import quantize
from unclip_jax.utils import errors

V, D, B, P = 6, 3, 4, 4
CODES = random_variables.normal(V, D)
NOISE = np.random.default_rng(7).uniform(size=(B, V)).astype(np.float32)
DECAY = 0.8


def outputs(tokens, codes=CODES, seed=0):
  """Encoder outputs [B, P, D] about the codes of tokens [B, P]."""
  noise = np.random.default_rng(seed).normal(size=(*tokens.shape, D))
  return (codes[tokens] + 1e-2 * noise).astype(np.float32)


nearest = jax.jit(quantize.nearest)
seen = jax.jit(quantize.seen)
committed = jax.jit(
  quantize.committed, static_argnames=("decay", "restart_below")
)
commit = functools.partial(committed, decay=DECAY, restart_below=0.0)


def test_the_nearest_code_is_nearest():
  x = 2.0 * random_variables.normal(5, 7, D)
  distances = np.square(x[..., None, :] - CODES).sum(-1)
  np.testing.assert_array_equal(nearest(CODES, x), distances.argmin(-1))
  np.testing.assert_array_equal(nearest(CODES, CODES), np.arange(V))
  twice = np.concatenate([CODES, CODES])
  np.testing.assert_array_equal(nearest(twice, CODES), np.arange(V))


def test_gradients_go_straight_through():
  """The Jacobian of the result by z_e is the identity, that by z_q is 0."""
  z_e, z_q = CODES[0], CODES[1]
  by_e, by_q = jax.jit(jax.jacobian(quantize.straight_through, (0, 1)))(
    z_e, z_q
  )
  np.testing.assert_allclose(
    quantize.straight_through(z_e, z_q), z_q, atol=1e-6
  )
  np.testing.assert_array_equal(by_e, np.eye(D))
  np.testing.assert_array_equal(by_q, np.zeros((D, D)))


def test_averages_are_those_of_the_formula_over_two_steps():
  """Equations 6 to 8 by hand, in the units of the module's docstring."""
  book = quantize.init_codebook(CODES)
  counts, sums = np.zeros(V), np.zeros((V, D))
  for step, used in enumerate(([0, 0, 1, 2], [0, 1, 1, 4])):
    tokens = np.tile(used, (B, 1))
    z_e = outputs(tokens, seed=step)
    book = commit(seen(book, z_e, tokens, NOISE))
    for k in range(V):
      own = z_e[tokens == k]
      scale = V / tokens.size
      counts[k] = DECAY * counts[k] + (1 - DECAY) * scale * len(own)
      sums[k] = DECAY * sums[k] + (1 - DECAY) * scale * own.sum(0)
  np.testing.assert_allclose(book.counts, counts, rtol=1e-5)
  np.testing.assert_allclose(book.sums, sums, rtol=1e-5, atol=1e-6)
  used = counts > 0
  np.testing.assert_array_equal(used, [1, 1, 1, 0, 1, 0])
  expected = np.where(used[:, None], sums / np.maximum(counts, 1e-9)[:, None],
                      CODES)  # fmt: skip
  np.testing.assert_allclose(book.codes, expected, rtol=1e-5)
  # Nothing is pending now: once more changes nothing.
  jax.tree.map(np.testing.assert_array_equal, commit(book), book)


def test_dead_codes_become_outputs_of_the_batch_and_live_ones_stay():
  tokens = np.tile([0, 1, 1, 2], (B, 1))
  z_e = outputs(tokens)
  book = quantize.init_codebook(CODES)._replace(
    counts=jnp.asarray([1.0, 1.0, 1.0, 0.01, 1.0, 0.0]),
    sums=CODES * np.asarray([1.0, 1.0, 1.0, 0.01, 1.0, 0.0])[:, None],
  )
  pending = seen(book, z_e, tokens, NOISE)
  plain = commit(pending)
  after = committed(pending, decay=DECAY, restart_below=0.1)
  dead = np.asarray([False, False, False, True, False, True])
  np.testing.assert_array_equal(after.codes[~dead], plain.codes[~dead])
  np.testing.assert_array_equal(after.counts[~dead], plain.counts[~dead])
  np.testing.assert_allclose(after.codes[~dead], CODES[~dead], atol=0.05)
  np.testing.assert_array_equal(after.counts[dead], [1.0, 1.0])
  np.testing.assert_array_equal(after.sums[dead], after.codes[dead])
  found = np.asarray(after.codes)[dead]
  is_output = (found[:, None] == z_e.reshape(1, -1, D)).all(-1).any(-1)
  assert is_output.all()
  # The same draws give the same, others something else.
  again = committed(
    seen(book, z_e, tokens, NOISE), decay=DECAY, restart_below=0.1
  )
  np.testing.assert_array_equal(again.codes, after.codes)
  other = committed(
    seen(book, z_e, tokens, NOISE[:, ::-1]), decay=DECAY, restart_below=0.1
  )
  assert (np.asarray(other.codes)[dead] != found).any()


def test_any_output_may_be_the_one():
  """Over many draws every place of every example is put forward alike."""
  n = 3000
  z_e = np.arange(B * P, dtype=np.float32).reshape(B, P, 1)
  noise = np.random.default_rng(0).uniform(size=(B, n)).astype(np.float32)
  book = quantize.init_codebook(np.zeros((n, 1), np.float32))
  book = seen(book, z_e, np.zeros((B, P), np.int32), noise)
  counts = np.bincount(np.asarray(book.restart[:, 0], int), minlength=B * P)
  np.testing.assert_allclose(counts / n, 1 / (B * P), atol=0.02)


def test_microbatches_of_a_step_are_the_whole_batch():
  tokens = np.random.default_rng(0).integers(0, V, (B, P))
  z_e = outputs(tokens)
  whole = seen(quantize.init_codebook(CODES), z_e, tokens, NOISE)
  parts = quantize.init_codebook(CODES)
  for half in (slice(0, B // 2), slice(B // 2, B)):
    parts = seen(parts, z_e[half], tokens[half], NOISE[half])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, whole
  )


def test_the_mean_over_devices_is_the_whole_batch():
  """Averages are linear in the batch: what `jax.pmap` and SAM count on."""
  tokens = np.random.default_rng(0).integers(0, V, (B, P))
  z_e = outputs(tokens)
  book = commit(seen(quantize.init_codebook(CODES), z_e, tokens, NOISE))
  whole = commit(seen(book, z_e[::-1], tokens[::-1], NOISE))
  halves = [
    seen(book, z_e[half], tokens[half], NOISE[half])
    for half in (slice(0, B // 2), slice(B // 2, B))
  ]
  mean = commit(jax.tree.map(lambda a, b: (a + b) / 2, *halves))
  for name in ("codes", "counts", "sums"):
    np.testing.assert_allclose(
      getattr(mean, name), getattr(whole, name), rtol=1e-5
    )


MODULE = quantize.VectorQuantizer(V, D, decay=DECAY, restart_below=0.0)


@jax.jit
def learn(state, z_e, step):
  (z_q, out), new = MODULE.apply(
    state, z_e, step=step, restart_noise=NOISE, mutable=["codebook"]
  )
  return z_q, out, new


def test_a_step_sees_one_codebook_and_evaluation_the_newest():
  z_e = random_variables.normal(B, 2, 2, D)
  use = jax.jit(lambda state: MODULE.apply(state, z_e))
  same = functools.partial(np.testing.assert_allclose, atol=1e-6)
  state = MODULE.init(jax.random.key(0), z_e)
  first = use(state)[0]
  z_q, out, state = learn(state, z_e, 0)
  same(z_q, first)
  again, _, state = learn(state, z_e, 0)  # a microbatch of the same step
  same(again, first)
  newest = use(state)[0]
  assert np.abs(newest - first).max() > 1e-3
  z_q, _, _ = learn(state, z_e, 1)
  same(z_q, newest)
  # As `decode` of the codes, and as far from z_e as the commitment says.
  tokens = use(state)[1]["tokens"]
  decoded = MODULE.apply(state, tokens, method=MODULE.decode)
  same(decoded, newest)
  commitment = np.square(z_e - first).mean((1, 2, 3))
  np.testing.assert_allclose(out["commitment"], commitment, rtol=1e-5)
  counts = np.bincount(np.asarray(out["tokens"]).ravel(), minlength=V)
  assert out["code_usage"] == pytest.approx((counts > 0).mean())


def test_the_first_batch_replaces_the_codes():
  module = MODULE.clone(restart_below=0.03, decay=0.99)
  z_e = 5.0 + random_variables.normal(B, 2, 2, D)
  state = module.init(jax.random.key(0), z_e)
  (_, out), state = module.apply(
    state, z_e, step=0, restart_noise=NOISE, mutable=["codebook"]
  )
  codes = module.apply(state, np.arange(V), method=module.decode)
  flat, tokens = z_e.reshape(-1, D), np.asarray(out["tokens"]).ravel()
  counts = 0.01 * V * np.bincount(tokens, minlength=V) / len(tokens)
  assert 0 < (counts < 0.03).sum() < V
  for k, code in enumerate(np.asarray(codes)):
    if counts[k] < 0.03:
      assert (code == flat).all(-1).any()
    else:
      np.testing.assert_allclose(code, flat[tokens == k].mean(0), rtol=1e-4)


def test_perplexity_counts_codes():
  assert quantize.perplexity(jnp.full(V, 3.0)) == pytest.approx(V, rel=1e-5)
  assert quantize.perplexity(jnp.asarray([5.0, 0.0])) == pytest.approx(1.0)


def test_a_decay_of_one_is_refused():
  module = MODULE.clone(decay=1.0)
  with pytest.raises(errors.UserError, match=r"decay 1\.0"):
    module.init(jax.random.key(0), np.zeros((1, 1, 1, D), np.float32))


class TestGaussian:
  def test_the_sample_has_the_moments(self):
    moments = random_variables.normal(1, 2 * D)
    given = quantize.gaussian(moments)
    noise = np.random.default_rng(0).normal(size=(20_000, D)).astype("f4")
    x = np.asarray(given.sample(noise))
    np.testing.assert_allclose(x.mean(0), moments[0, :D], atol=0.05)
    np.testing.assert_allclose(np.log(x.var(0)), moments[0, D:], atol=0.05)
    mean = given.sample(noise[:1], temperature=0.0)
    np.testing.assert_array_equal(mean, moments[:, :D])

  def test_kl_is_that_of_samples_and_0_of_equals(self):
    q, p = (quantize.gaussian(x) for x in random_variables.normal(2, 1, 2 * D))
    np.testing.assert_array_equal(gaussian.normal_kl(*q, *q), np.zeros((1, D)))
    noise = np.random.default_rng(0).normal(size=(100_000, D)).astype("f4")
    x = q.sample(noise)
    log_ratio = gaussian.log_density(x, *q) - gaussian.log_density(x, *p)
    expected = gaussian.normal_kl(*q, *p)
    assert expected.min() > 0
    np.testing.assert_allclose(
      log_ratio.mean(0), expected[0], rtol=0.03, atol=0.01
    )

  def test_variances_are_bounded(self):
    given = quantize.gaussian(np.asarray([[0.0, 1e9]], np.float32))
    assert np.isfinite(given.sample(np.ones((1, 1), np.float32))).all()
