"""Autoregressive decoding: what is drawn, guidance, keys; beam search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import decoding
from unclip_jax.utils import errors

V = 3
LENGTH = 3
# Logits of the next token, by the last two tokens (V stands for none).
TABLE = 2 * random_variables.normal(V + 1, V + 1, V)


def decode_fn(tokens, index, cache):
  """A second-order Markov chain; the cache [B, LENGTH] holds all tokens."""
  cache = jax.lax.dynamic_update_slice(
    cache, tokens[:, None], (jnp.int32(0), index)
  )
  before = cache[:, jnp.maximum(index - 1, 0)]
  before = jnp.where(index == 0, V, before)
  return jnp.asarray(TABLE)[before, tokens], cache


def start(B):
  logits = jnp.broadcast_to(TABLE[V, V], (B, V))
  return logits, jnp.zeros((B, LENGTH), jnp.int32)


@functools.partial(jax.jit, static_argnames=("B", "temperature", "k", "p"))
def draw(rng, B, temperature=1.0, k=None, p=None, known=None, is_known=None):
  return decoding.sample(
    decode_fn,
    *start(B),
    rng,
    num_tokens=LENGTH,
    temperature=temperature,
    top_k=k,
    top_p=p,
    known=known,
    is_known=is_known,
  )


def distribution(next_probs):
  """Probability of every sequence, by chained next-token probabilities."""
  probs = {}
  for sequence in itertools.product(range(V), repeat=LENGTH):
    padded = (V, V, *sequence)
    probs[sequence] = np.prod(
      [
        next_probs(TABLE[padded[i], padded[i + 1]])[padded[i + 2]]
        for i in range(LENGTH)
      ]
    )
  return probs


def softmax(x):
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def top_k_probs(x, k):
  return softmax(np.where(x < np.sort(x)[-k], -np.inf, x))


def top_p_probs(x, p):
  order = np.argsort(-x)
  count = 1 + np.sum(np.cumsum(softmax(x)[order])[:-1] < p)
  kept = np.full(V, -np.inf)
  kept[order[:count]] = x[order[:count]]
  return softmax(kept)


@pytest.mark.parametrize(
  ("options", "next_probs"),
  [
    ({}, softmax),
    ({"temperature": 0.5}, lambda x: softmax(x / 0.5)),
    ({"k": 2}, lambda x: top_k_probs(x, 2)),
    ({"p": 0.6}, lambda x: top_p_probs(x, 0.6)),
    ({"p": 0.8, "temperature": 2.0}, lambda x: top_p_probs(x / 2.0, 0.8)),
  ],
)
def test_sequences_have_the_chain_rules_probabilities(options, next_probs):
  B = 20_000
  tokens = np.asarray(draw(jax.random.key(0), B, **options))
  expected = distribution(next_probs)
  assert sum(expected.values()) == pytest.approx(1)
  for sequence, p in expected.items():
    share = (tokens == sequence).all(axis=1).mean()
    assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / B), sequence


def test_temperature_0_and_top_1_take_the_most_probable_token():
  greedy, token = [], None
  padded = [V, V]
  for _ in range(LENGTH):
    token = int(np.argmax(TABLE[padded[-2], padded[-1]]))
    padded.append(token)
    greedy.append(token)
  for options in ({"temperature": 0.0}, {"k": 1}, {"p": 1e-6}):
    tokens = draw(jax.random.key(1), 4, **options)
    np.testing.assert_array_equal(tokens, [greedy] * 4)


def test_a_row_depends_on_its_own_key_alone():
  keys = jax.random.split(jax.random.key(0), 6)
  together = np.asarray(draw(keys, 6))
  assert len({tuple(row) for row in together}) > 1
  for i in (0, 3, 5):
    np.testing.assert_array_equal(draw(keys[i : i + 1], 1)[0], together[i])


def test_known_tokens_stay_and_the_others_are_drawn_given_them():
  B = 20_000
  known = jnp.broadcast_to(jnp.asarray([1, 0, 2]), (B, LENGTH))
  tokens = draw(
    jax.random.key(0), B, known=known, is_known=jnp.asarray([True, False, True])
  )
  np.testing.assert_array_equal(tokens[:, 0], 1)
  np.testing.assert_array_equal(tokens[:, 2], 2)
  expected = softmax(TABLE[V, 1])
  shares = np.bincount(tokens[:, 1], minlength=V) / B
  np.testing.assert_allclose(shares, expected, atol=0.02)


def test_guidance_of_scale_1_runs_no_second_half():
  rows = []

  def counting(tokens, index, cache):
    rows.append(len(tokens))
    return decode_fn(tokens, index, cache)

  options = dict(rng=jax.random.split(jax.random.key(0), 4), num_tokens=LENGTH)
  tokens = decoding.sample(counting, *start(4), **options)
  assert set(rows) == {4}
  rows.clear()
  # Both halves have the same condition: any scale draws the same.
  guided = decoding.sample(counting, *start(8), guidance_scale=3.0, **options)
  assert set(rows) == {8}
  np.testing.assert_array_equal(guided, tokens)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_linear_in_the_logits(scale):
  first, second = random_variables.normal(2, 2 * 50, 8)
  tokens = decoding.sample(
    lambda tokens, index, cache: (second, cache),
    jnp.asarray(first),
    (),
    jax.random.key(0),
    num_tokens=2,
    guidance_scale=scale,
    temperature=0.0,
  )
  for i, logits in enumerate((first, second)):
    cond, uncond = logits[:50], logits[50:]
    expected = np.argmax(uncond + scale * (cond - uncond), axis=-1)
    np.testing.assert_array_equal(tokens[:, i], expected)


def test_tokens_are_drawn_in_one_scan():
  program = draw.trace(jax.random.key(0), 2).jaxpr
  scans = [x for x in program.eqns if x.primitive.name == "scan"]
  assert len(scans) == 1 and scans[0].params["length"] == LENGTH - 1


def test_on_step_is_called_after_every_token():
  calls = []
  tokens = decoding.sample(
    decode_fn,
    *start(2),
    jax.random.key(0),
    num_tokens=LENGTH,
    on_step=calls.append,
  )
  jax.block_until_ready(tokens)
  jax.effects_barrier()
  assert calls == [LENGTH] * LENGTH


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"temperature": -1.0}, "temperature"),
    ({"k": 0}, "top_k"),
    ({"p": 0.0}, "top_p"),
    ({"p": 1.5}, "top_p"),
  ],
)
def test_an_option_out_of_its_range_is_an_error(options, word):
  with pytest.raises(errors.UserError, match=word):
    draw(jax.random.key(0), 1, **options)


# ---- beam search, with token END as the end

END, PAD = 2, 0


@functools.partial(jax.jit, static_argnames=("B", "K", "penalty"))
def search(B, K, penalty=0.0):
  return decoding.beam_search(
    decode_fn,
    *start(B),
    num_beams=K,
    num_tokens=LENGTH,
    end_token=END,
    pad_token=PAD,
    length_penalty=penalty,
  )


def all_sequences(penalty):
  """[(score, log P, tokens, length)] of every sequence, the best first."""
  found = {}
  for sequence in itertools.product(range(V), repeat=LENGTH):
    length = sequence.index(END) + 1 if END in sequence else LENGTH
    padded = (V, V, *sequence)
    log_p = sum(
      np.log(softmax(TABLE[padded[i], padded[i + 1]])[padded[i + 2]])
      for i in range(length)
    )
    tokens = (*sequence[:length], *[PAD] * (LENGTH - length))
    score = log_p / ((5 + length) / 6) ** penalty
    found[tokens, length] = (score, log_p, tokens, length)
  return sorted(found.values(), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_enough_beams_are_an_exhaustive_search(penalty):
  expected = all_sequences(penalty)
  K = V**LENGTH  # more than there are sequences
  beams = search(2, K, penalty)
  assert len(expected) < K
  for b in range(2):
    rows = zip(*(x[b] for x in beams))
    for want, row in zip(expected, rows):
      score, log_p, tokens, length = want
      assert tuple(row[0].tolist()) == tokens
      assert row[1] == pytest.approx(log_p, abs=1e-5)
      assert row[2] == pytest.approx(score, abs=1e-5)
      assert (row[3], row[4]) == (length, END in tokens)
  # What there is not has no probability.
  assert np.all(np.isneginf(beams.log_probs[:, len(expected) :]))
  assert np.all(np.isneginf(beams.scores[:, len(expected) :]))


def test_the_length_penalty_changes_what_is_best():
  lengths = [all_sequences(penalty)[0][3] for penalty in (0.0, 5.0)]
  assert lengths[0] < lengths[1]


def test_one_beam_is_greedy():
  beams = search(3, 1)
  greedy = np.asarray(draw(jax.random.key(0), 3, temperature=0.0))
  for row, found in zip(greedy.tolist(), beams.tokens[:, 0].tolist()):
    length = row.index(END) + 1 if END in row else LENGTH
    assert found == row[:length] + [PAD] * (LENGTH - length)


def _walk(num_tokens, seed):
  """A search of 3 beams in a random chain of 5 tokens, of which 4 ends."""
  rng = np.random.default_rng(seed)
  table = 2 * rng.normal(size=(6, 5)).astype(np.float32)
  first = rng.normal(size=(2, 5)).astype(np.float32)

  def decode(tokens, index, cache):
    # The cache is what was told before, so a wrong order shows.
    told = cache.at[:, index].set(tokens)
    before = jnp.where(index == 0, 5, told[:, jnp.maximum(index - 1, 0)])
    return jnp.asarray(table)[before] + jnp.asarray(table)[tokens], told

  beams = decoding.beam_search(
    decode,
    jnp.asarray(first),
    jnp.zeros((2, num_tokens), jnp.int32),
    num_beams=3,
    num_tokens=num_tokens,
    end_token=4,
    length_penalty=0.6,
  )
  return jax.device_get(beams), table, first


@pytest.mark.parametrize("seed", range(2))
def test_beams_have_their_teacher_forced_log_probabilities(seed):
  beams, table, first = _walk(6, seed)
  for b, k in np.ndindex(2, 3):
    tokens, length = beams.tokens[b, k], beams.lengths[b, k]
    log_p = np.log(softmax(first[b])[tokens[0]])
    for i in range(1, length):
      before = tokens[i - 2] if i > 1 else 5
      log_p += np.log(softmax(table[before] + table[tokens[i - 1]])[tokens[i]])
    assert beams.log_probs[b, k] == pytest.approx(log_p, abs=1e-4)
    score = log_p / ((5 + length) / 6) ** 0.6
    assert beams.scores[b, k] == pytest.approx(score, abs=1e-4)
  assert np.all(np.diff(beams.scores, axis=1) <= 0)


def test_a_finished_beam_stays_finished():
  beams, *_ = _walk(9, 2)
  assert beams.is_finished.all()
  for b, k in np.ndindex(2, 3):
    tokens, length = beams.tokens[b, k], beams.lengths[b, k]
    assert tokens[length - 1] == 4 and 4 not in tokens[: length - 1]
    np.testing.assert_array_equal(tokens[length:], 0)
  # All have ended within fewer tokens: more of them change nothing.
  short, *_ = _walk(beams.lengths.max(), 2)
  assert short.is_finished.all()
  np.testing.assert_array_equal(short.log_probs, beams.log_probs)
  np.testing.assert_array_equal(
    short.tokens, beams.tokens[..., : short.tokens.shape[-1]]
  )


def test_beams_are_extended_in_one_scan():
  program = search.trace(2, 3).jaxpr
  scans = [x for x in program.eqns if x.primitive.name == "scan"]
  assert len(scans) == 1 and scans[0].params["length"] == LENGTH - 1


def test_a_search_reports_and_needs_a_beam():
  calls = []
  beams = decoding.beam_search(
    decode_fn, *start(2), num_beams=2, num_tokens=LENGTH, end_token=END,
    on_step=calls.append,
  )  # fmt: skip
  jax.block_until_ready(beams)
  jax.effects_barrier()
  assert calls == [LENGTH] * LENGTH
  with pytest.raises(errors.UserError, match="num_beams"):
    search(1, 0)
