"""Masked generation: the schedule, what is known, guidance, the loss."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fake_tokenizer, pinned_step, random_variables
from unclip_jax.models import mim as mim_model
from unclip_jax.tasks import maskgit
from unclip_jax.utils import errors

B, S, PATCH, P, V, L = 4, 8, 2, 16, 5, 6
TOKENIZER = fake_tokenizer.Tokenizer(V, S // PATCH, PATCH)
MODEL = mim_model.Model(
  image_size=S, patch_size=PATCH, width=16, depth=1, num_heads=2, num_codes=V,
  inputs="tokens", vocab_size=9, context_length=L, text_width=12, text_depth=1,
  text_num_heads=2,
)  # fmt: skip
TASK = maskgit.Task(MODEL, {"tokenizer": TOKENIZER})
FROZEN = {"tokenizer": {}}
BATCH = {
  "image": np.clip(random_variables.normal(B, S, S, 3), -1, 1),
  "text_tokens": np.random.default_rng(2).integers(1, 9, (B, L), np.int32),
  "text_mask": np.arange(L) < np.asarray([[6], [3], [4], [2]]),
}
KEYS = jax.random.split(jax.random.key(0), B)
_PROBS = np.random.default_rng(5).normal(size=(P, V)).astype(np.float32)


@functools.cache
def _variables():
  variables = random_variables.like(TASK.init, batch=BATCH, frozen=FROZEN)
  variables["params"]["output"]["kernel"] *= 3
  return variables


def _decode(rows=B, logits_fn=None, rng=KEYS, **options):
  options = {"num_sample_steps": 5, **options}
  logits_fn = logits_fn or (
    lambda tokens, is_masked: jnp.tile(_PROBS, (rows, 1, 1))
  )
  return jax.jit(
    lambda rng: maskgit.decode_parallel(logits_fn, rng, (rows, P), **options)
  )(rng)


@pytest.mark.parametrize("steps", [1, 3, 8, 16, 20])
def test_steps_unmask_all_by_the_cosine_schedule(steps):
  tokens, trace = _decode(num_sample_steps=steps)
  assert tokens.shape == (B, P) and trace.shape == (steps, B, P)
  left = np.asarray(trace).sum(-1)[:, 0]
  rows = np.asarray(trace).sum(-1)
  np.testing.assert_array_equal(rows, np.tile(left[:, None], B))
  counts = -np.diff([P, *left])
  assert counts.sum() == P and left[-1] == 0
  expected = np.floor(P * np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps))
  if steps < 8:  # else one a step is the least
    np.testing.assert_array_equal(left[:-1], expected[:-1])
  assert np.all(counts[: min(steps, P)] >= 1) and np.all(counts >= 0)
  # What has been kept once stays.
  trace = np.asarray(trace)
  assert not np.any(trace[1:] & ~trace[:-1])


def test_the_most_probable_codes_are_kept_first():
  _, trace = _decode(temperature=0.0, choice_temperature=0.0)
  best = np.asarray(jax.nn.softmax(_PROBS)).max(-1)
  for is_masked in np.asarray(trace)[:-1, 0]:
    assert best[is_masked].max() < best[~is_masked].min()


def test_masked_codes_are_drawn_anew_and_kept_ones_stay():
  """The network is told of each step's codes; what is kept never changes."""
  seen = []

  def logits_fn(tokens, is_masked):
    jax.debug.callback(
      lambda *x: seen.append(tuple(np.asarray(a) for a in x)),
      tokens,
      is_masked,
      ordered=True,
    )
    return jnp.tile(_PROBS, (B, 1, 1))

  tokens, _ = _decode(logits_fn=logits_fn)
  jax.effects_barrier()
  assert len(seen) == 5 and seen[0][1].all()
  for (before, masked_before), (after, _) in itertools.pairwise(seen):
    kept = ~masked_before
    np.testing.assert_array_equal(after[kept], before[kept])
  np.testing.assert_array_equal(
    np.asarray(tokens)[~seen[-1][1]], seen[-1][0][~seen[-1][1]]
  )


def test_known_codes_stay_and_are_shown_from_the_start():
  known = np.random.default_rng(1).integers(0, V, (B, P), np.int32)
  is_known = np.arange(P) < 6
  shown = []

  def logits_fn(tokens, is_masked):
    jax.debug.callback(
      lambda x: shown.append(np.asarray(x)), tokens, ordered=True
    )
    return jnp.tile(_PROBS, (B, 1, 1))

  tokens, trace = _decode(
    logits_fn=logits_fn, known=known, is_known=is_known, num_sample_steps=4
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(np.asarray(tokens)[:, :6], known[:, :6])
  np.testing.assert_array_equal(shown[0][:, :6], known[:, :6])
  assert not np.any(np.asarray(trace)[..., :6])
  # The schedule goes by what is unknown.
  left = np.floor(10 * np.cos(np.pi / 2 * np.arange(1, 4) / 4))
  np.testing.assert_array_equal(np.asarray(trace).sum(-1)[:-1, 0], left)
  assert np.any(np.asarray(tokens)[:, 6:] != known[:, 6:])


def test_codes_that_do_not_depend_on_each_other_are_drawn_as_they_should():
  """Frequencies of independent codes, whose choice plays no part."""
  keys = jax.random.split(jax.random.key(1), 4000)
  tokens, _ = _decode(
    rows=4000, rng=keys, num_sample_steps=1, choice_temperature=0.0
  )
  found = (np.asarray(tokens)[..., None] == np.arange(V)).mean(0)
  np.testing.assert_allclose(found, jax.nn.softmax(_PROBS), atol=0.03)


@functools.cache
def _sampler(**options):
  return jax.jit(functools.partial(TASK.sample, **options))


def test_a_caption_draws_the_same_in_any_batch():
  draw = _sampler(guidance_scale=2.0, num_sample_steps=3)
  text = {k: BATCH[k] for k in ("text_tokens", "text_mask")}
  whole = draw(_variables(), FROZEN, text, KEYS)
  assert whole["image"].shape == (B, S, S, 3)
  assert np.abs(whole["image"]).max() <= 1
  assert whole["image_tokens"].shape == (B, P)
  assert whole["image_tokens"].dtype == jnp.int32
  part = {k: v[2:] for k, v in text.items()}
  alone = draw(_variables(), FROZEN, part, KEYS[2:])["image_tokens"]
  np.testing.assert_array_equal(alone, whole["image_tokens"][2:])
  again = draw(_variables(), FROZEN, text, KEYS[::-1])["image_tokens"]
  assert np.any(again != whole["image_tokens"])


def test_guidance_0_is_no_caption_and_1_is_none():
  """By the most probable codes in one step, which draws nothing."""
  greedy = dict(num_sample_steps=1, temperature=0.0, choice_temperature=0.0)
  none = dict(BATCH, text_mask=np.zeros((B, L), bool))

  def tokens(batch, **options):
    draw = _sampler(**greedy, **options)
    return draw(_variables(), FROZEN, batch, KEYS)["image_tokens"]

  unguided = tokens(BATCH)
  np.testing.assert_array_equal(tokens(BATCH, guidance_scale=0.0), tokens(none))
  assert np.any(tokens(none) != unguided)
  logits, _ = MODEL.apply(
    _variables(),
    jnp.zeros((B, P), jnp.int32),
    jnp.ones((B, P), bool),
    BATCH["text_tokens"],
    BATCH["text_mask"],
  )
  np.testing.assert_array_equal(unguided, logits.argmax(-1))


@functools.cache
def _loss(**fields):
  task = dataclasses.replace(TASK, **fields)
  return jax.jit(
    lambda batch, rng, train: (
      task.loss(_variables(), FROZEN, batch, rng, step=0, train=train).loss
    ),
    static_argnames="train",
  )


def test_dropped_captions_do_not_reach_the_loss():
  other = dict(BATCH, text_tokens=BATCH["text_tokens"][::-1])
  dropped = _loss(text_drop_prob=1.0)
  a, b = (dropped(x, KEYS, train=True) for x in (BATCH, other))
  np.testing.assert_array_equal(a, b)
  a, b = (dropped(x, KEYS, train=False) for x in (BATCH, other))
  assert np.abs(a - b).max() > 1e-3  # nothing is dropped in evaluation
  kept = _loss(text_drop_prob=0.0, label_smoothing=0.0)
  np.testing.assert_allclose(kept(BATCH, KEYS, train=True), a, rtol=1e-5)


def test_an_example_is_the_same_in_any_batch():
  part = {k: v[2:] for k, v in BATCH.items()}
  whole = _loss()(BATCH, KEYS, train=True)
  np.testing.assert_allclose(
    _loss()(part, KEYS[2:], train=True), whole[2:], rtol=1e-5
  )


# Loss and gradient norm of the first step: tests/pinned_step.py.
PINNED = (3.290647, 18.129068)


def test_the_first_step_is_pinned_and_parts_of_it_are_the_whole():
  pinned_step.check(TASK, _variables()["params"], FROZEN, BATCH, PINNED)


def test_wrong_options_are_errors():
  fn = lambda tokens, is_masked: jnp.zeros((B, P, V))  # noqa: E731
  with pytest.raises(errors.UserError, match="num_sample_steps must be 1"):
    maskgit.decode_parallel(fn, KEYS, (B, P), num_sample_steps=0)
  with pytest.raises(errors.UserError, match="choice_temperature -1"):
    maskgit.decode_parallel(
      fn, KEYS, (B, P), num_sample_steps=2, choice_temperature=-1.0
    )
  with pytest.raises(errors.UserError, match="tokens with captions"):
    dataclasses.replace(TASK, model=MODEL.clone(vocab_size=None))
