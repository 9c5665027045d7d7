"""Transformers over tokens: losses, likelihoods, drawing with caches."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import random_variables
from unclip_jax import decoding, trainer
from unclip_jax.models import dvae as dvae_model
from unclip_jax.models import token_encoder_decoder, token_transformer
from unclip_jax.tasks import dvae, tokens
from unclip_jax.utils import errors

B, L, S, K, V, TEXT_V = 3, 5, 2, 4, 4, 7
SIZES = dict(
  vocab_size=TEXT_V, context_length=L, num_codes=V, grid_size=S, image_size=4,
  width=8, depth=2, num_heads=2,
)  # fmt: skip
TOKENIZER = dvae.Task(
  dvae_model.Model(
    image_size=4, num_codes=V, channels=8, channel_mult=(1, 2),
    num_res_blocks=1, codebook_width=4,
  ),
  {},
)  # fmt: skip
UPSTREAM = {"tokenizer": TOKENIZER}
TASKS = {
  "decoder": tokens.Task(
    token_transformer.Model(
      **SIZES, attention_types=("row", "column"), kernel_size=1
    ),
    UPSTREAM,
  ),
  "encoder_decoder": tokens.Task(
    token_encoder_decoder.Model(**SIZES, encoder_depth=1), UPSTREAM
  ),
  "captions": tokens.Task(
    token_encoder_decoder.Model(
      **SIZES, encoder_depth=1, direction="image_to_text"
    ),
    UPSTREAM,
  ),
}
BATCH = {
  "text_tokens": np.asarray(
    [[2, 4, 3, 0, 0], [2, 5, 6, 4, 3], [2, 6, 5, 3, 0]], np.int32
  ),
  "text_mask": np.asarray([[1] * 3 + [0] * 2, [1] * 5, [1] * 4 + [0]], bool),
  "image": np.tanh(random_variables.normal(B, 4, 4, 3)),
}
KEYS = jax.random.split(jax.random.key(0), B)


@functools.cache
def _frozen():
  variables = random_variables.like(TOKENIZER.model.init, BATCH["image"])
  variables["params"]["encoder_out"]["kernel"] *= 30
  return {"tokenizer": variables}


@functools.cache
def _variables(name):
  task = TASKS[name]
  variables = random_variables.like_tree(
    jax.eval_shape(lambda: task.init(jax.random.key(0), BATCH, {}))
  )
  # Large logits, so that draws differ from row to row and not by rounding.
  for head in ("output", "image_output"):
    if head in variables["params"]:
      variables["params"][head]["kernel"] *= 3
  return variables


@functools.partial(jax.jit, static_argnames=("name", "train", "changes"))
def _loss(name, batch, rng=KEYS, train=False, changes=()):
  task = dataclasses.replace(TASKS[name], **dict(changes))
  return task.loss(_variables(name), _frozen(), batch, rng, step=0, train=train)


_STATIC = ("name", "guidance_scale", "temperature", "num_known_rows")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _sample(name, batch=BATCH, rng=KEYS, **options):
  return TASKS[name].sample(_variables(name), _frozen(), batch, rng, **options)


@functools.partial(jax.jit, static_argnames="name")
def _logits(name, text_tokens, text_mask, image_tokens):
  model = TASKS[name].model
  return model.apply(_variables(name), text_tokens, text_mask, image_tokens)


@functools.cache
def _image_tokens():
  return TOKENIZER.encode_tokens(_frozen()["tokenizer"], BATCH["image"])


def cross_entropy(logits, targets):
  """In float64: [B, tokens]."""
  logits = np.asarray(logits, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  own = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)
  return log_z - own[..., 0]


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_means_over_real_tokens_of_each_kind(name):
  text_tokens, text_mask = BATCH["text_tokens"], BATCH["text_mask"]
  image_tokens = _image_tokens()
  logits, out = _logits(name, text_tokens, text_mask, image_tokens)
  found = _loss(name, BATCH)
  real = text_mask[:, 1:]
  expected = {}
  if name != "captions":
    expected["image"] = cross_entropy(logits, image_tokens).mean(1)
  text_logits = logits if name == "captions" else out.get("text_logits")
  if text_logits is not None:
    nats = cross_entropy(text_logits, text_tokens[:, 1:])
    expected["text"] = (nats * real).sum(1) / real.sum(1)
  for kind, losses in expected.items():
    np.testing.assert_allclose(found.metrics[f"{kind}_loss"], losses, rtol=1e-4)
    assert found.metrics[f"{kind}_accuracy"].shape == (B,)
  assert len(found.metrics) == 2 * len(expected)
  total = {
    "decoder": lambda: expected["text"] / 8 + expected["image"] * 7 / 8,
    "encoder_decoder": lambda: expected["image"],
    "captions": lambda: expected["text"],
  }[name]()
  np.testing.assert_allclose(found.loss, total, rtol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_in_padding_does_not_count(name):
  other = dict(BATCH, text_tokens=BATCH["text_tokens"].copy())
  other["text_tokens"][~BATCH["text_mask"]] = 5
  np.testing.assert_array_equal(
    _loss(name, other).loss, _loss(name, BATCH).loss
  )
  longer = dict(BATCH, text_mask=np.ones_like(BATCH["text_mask"]))
  changed = np.abs(_loss(name, longer).loss - _loss(name, BATCH).loss) > 1e-5
  np.testing.assert_array_equal(changed, ~BATCH["text_mask"].all(1))


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_dropped_captions_do_not_reach_the_loss(name):
  drop = (("text_drop_prob", 1.0),)
  other = dict(BATCH, text_tokens=BATCH["text_tokens"][::-1].copy())
  a, b = (_loss(name, x, train=True, changes=drop) for x in (BATCH, other))
  np.testing.assert_array_equal(a.loss, b.loss)
  if name == "decoder":
    np.testing.assert_array_equal(a.metrics["text_loss"], 0)
  # In evaluation nothing is dropped.
  kept = _loss(name, BATCH, changes=drop).loss
  np.testing.assert_array_equal(kept, _loss(name, BATCH).loss)
  assert np.abs(kept - a.loss).max() > 1e-3


@pytest.mark.parametrize("name", ["decoder", "captions"])
def test_microbatches_lose_the_same(name):
  whole = _loss(name, BATCH, train=True).loss
  last = {k: v[1:] for k, v in BATCH.items()}
  part = _loss(name, last, rng=KEYS[1:], train=True).loss
  np.testing.assert_allclose(part, whole[1:], rtol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_probabilities_of_all_pictures_sum_to_1(name):
  every = np.asarray([*itertools.product(range(V), repeat=K)], np.int32)
  text = {k: np.repeat(BATCH[k][:1], len(every), 0) for k in BATCH}
  predict = jax.jit(TASKS[name].predict_fns()["log_likelihood"])
  found = predict(
    _variables(name), _frozen(), {**text, "image_tokens": every}, KEYS
  )["log_likelihood"]
  assert found.shape == (V**K,)
  assert np.exp(np.asarray(found, np.float64)).sum() == pytest.approx(1, 1e-3)


def test_likelihood_of_captions_is_a_sum_over_their_tokens():
  task = TASKS["captions"]
  found = task.log_likelihood(_variables("captions"), _frozen(), BATCH)
  losses = _loss("captions", BATCH).loss
  expected = -losses * (BATCH["text_mask"].sum(1) - 1)
  np.testing.assert_allclose(found["log_likelihood"], expected, rtol=1e-4)


@pytest.fixture(name="greedy", scope="module")
def _greedy():
  return {name: _sample(name, temperature=0.0) for name in TASKS}


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_greedy_pictures_are_those_of_the_whole_network(name, greedy):
  """Cached step by step, or all at once on what was drawn: one and the same."""
  image_tokens = greedy[name]["image_tokens"]
  text = BATCH["text_tokens"], BATCH["text_mask"]
  logits, _ = _logits(name, *text, image_tokens)
  np.testing.assert_array_equal(logits.argmax(-1), image_tokens)
  assert len(np.unique(image_tokens, axis=0)) > 1
  image = greedy[name]["image"]
  assert image.shape == (B, 4, 4, 3) and np.abs(image).max() <= 1
  decode = TOKENIZER.decode_tokens(_frozen()["tokenizer"], image_tokens)
  np.testing.assert_allclose(image, decode, atol=1e-5)


def test_greedy_captions_are_those_of_the_whole_network(greedy):
  drawn = greedy["captions"]
  text_tokens, text_mask = drawn["text_tokens"], drawn["text_mask"]
  logits, _ = _logits("captions", text_tokens, text_mask, _image_tokens())
  best = np.asarray(logits.argmax(-1))
  real = np.asarray(text_mask[:, 1:])
  np.testing.assert_array_equal(best[real], text_tokens[:, 1:][real])
  assert text_tokens.shape == (B, L) and np.all(text_tokens[:, 0] == 2)


def test_a_caption_is_cut_behind_its_first_end():
  drawn = jnp.asarray([[2, 4, 3, 3, 5], [2, 3, 4, 4, 4], [2, 4, 4, 4, 4]])
  text_tokens, text_mask = decoding.up_to_end(drawn, 3)
  np.testing.assert_array_equal(
    text_tokens, [[2, 4, 3, 0, 0], [2, 3, 0, 0, 0], [2, 4, 4, 4, 4]]
  )
  np.testing.assert_array_equal(text_mask, text_tokens > 0)


@pytest.mark.parametrize("name", TASKS)
def test_at_temperature_0_any_key_draws_the_same(name, greedy):
  other = _sample(name, rng=KEYS[::-1], temperature=0.0)
  jax.tree.map(np.testing.assert_array_equal, other, greedy[name])


def test_guidance_goes_from_no_caption_over_the_caption_beyond(greedy):
  """Scale 0 is the null caption's, 1 the caption's; 1 is off, so nearly 1."""
  without = dict(BATCH, text_mask=np.zeros_like(BATCH["text_mask"]))
  null = _sample("decoder", without, temperature=0.0)["image_tokens"]
  at = lambda scale: _sample(  # noqa: E731
    "decoder", guidance_scale=scale, temperature=0.0
  )["image_tokens"]
  conditional = greedy["decoder"]["image_tokens"]
  np.testing.assert_array_equal(at(0.0), null)
  np.testing.assert_array_equal(at(1.000001), conditional)
  assert np.any(null != conditional)


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_a_caption_draws_the_same_wherever_it_stands(name):
  """Guided: also keeps conditions in order in the 2B rows."""
  drawn = _sample(name, guidance_scale=1.5)["image_tokens"]
  moved = {k: np.roll(v, 1, axis=0) for k, v in BATCH.items()}
  again = _sample(name, moved, jnp.roll(KEYS, 1), guidance_scale=1.5)
  np.testing.assert_array_equal(again["image_tokens"], np.roll(drawn, 1, 0))
  assert len(np.unique(drawn, axis=0)) > 1


@pytest.mark.parametrize(
  ("name", "given"), [("decoder", False), ("encoder_decoder", True)]
)
def test_known_rows_stay_and_the_others_follow_from_them(name, given, greedy):
  """Those of the batch's picture, or given tokens."""
  known, options = _image_tokens(), {}
  if given:
    known = (known + 1) % V
    options = {"image_tokens": known}
  completed = _sample(name, temperature=0.0, num_known_rows=1, **options)
  completed = completed["image_tokens"]
  np.testing.assert_array_equal(completed[:, :S], known[:, :S])
  text = BATCH["text_tokens"], BATCH["text_mask"]
  logits, _ = _logits(name, *text, completed)
  np.testing.assert_array_equal(logits.argmax(-1)[:, S:], completed[:, S:])
  assert np.any(completed != greedy[name]["image_tokens"])


def test_stored_tokens_serve_in_place_of_the_tokenizer():
  stored = {**BATCH, "image_tokens": _image_tokens()}
  del stored["image"]
  np.testing.assert_allclose(
    _loss("decoder", stored).loss, _loss("decoder", BATCH).loss, rtol=1e-5
  )


TEXT = {k: BATCH[k] for k in ("text_tokens", "text_mask")}


@pytest.mark.parametrize(
  ("name", "batch", "options", "word"),
  [
    ("decoder", BATCH, {"num_known_rows": 3}, "must be in .0, 2."),
    ("decoder", TEXT, {"num_known_rows": 1}, "give image_tokens"),
    ("captions", BATCH, {"guidance_scale": 2.0}, "leave them out"),
    ("captions", BATCH, {"num_known_rows": 1}, "leave them out"),
  ],
)
def test_options_that_cannot_work_are_errors(name, batch, options, word):
  with pytest.raises(errors.UserError, match=word):
    _sample(name, batch, **options)


def test_networks_that_do_not_fit_the_tokenizer_are_errors():
  task = TASKS["decoder"]
  with pytest.raises(errors.UserError, match=r"config\.frozen\.tokenizer"):
    dataclasses.replace(task, upstream={})
  with pytest.raises(errors.UserError, match=r"num_codes is 9, but .* is 4"):
    dataclasses.replace(task, model=task.model.clone(num_codes=9))
  with pytest.raises(errors.UserError, match=r"text_loss_weight 7 must be in"):
    dataclasses.replace(task, text_loss_weight=7)
  larger = dataclasses.replace(task, model=task.model.clone(image_size=8))
  with pytest.raises(errors.UserError, match=r"image_size is 8, but .* 4 pix"):
    jax.eval_shape(
      lambda: larger.sample(_variables("decoder"), _frozen(), BATCH, KEYS)
    )


# Loss, gradient norm and norm of the parameters after one step of SGD. A change
# means that the same task now trains something else: if that is what you want,
# say so in CHANGELOG.md and put the new numbers (the test prints them).
PINNED = {
  "decoder": (4.934752, 19.186548, 16.979155),
  "encoder_decoder": (1.845839, 8.142245, 21.236504),
  "captions": (3.350212, 7.401643, 21.757484),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_pinned(name):
  tx = optax.sgd(0.1)
  params = _variables(name)["params"]
  state = trainer.TrainState(
    jnp.zeros((), jnp.int32), params, {}, tx.init(params), params
  )
  step = jax.jit(trainer.make_train_step(TASKS[name], tx, ema_decay=0.9))
  after, metrics = step(state, _frozen(), BATCH, jax.random.key(0))
  found = [
    float(x)
    for x in (
      metrics["loss"], metrics["grad_norm"], optax.tree.norm(after.params)
    )
  ]  # fmt: skip
  print(name, found)
  np.testing.assert_allclose(found, PINNED[name], rtol=2e-3)
