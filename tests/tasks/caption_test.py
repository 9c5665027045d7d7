"""Captioning: a distribution over captions, drawn from and searched."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import init_from_test, random_models, random_variables
from unclip_jax import decoding, trainer
from unclip_jax.models import captioner
from unclip_jax.tasks import caption
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

V, L, SIZE = 6, 5, 8
PAD, BEGIN, END = 0, 2, 3
TASK = caption.Task(
  model=captioner.Model(
    vocab_size=V, context_length=L, width=8, depth=1, num_heads=2,
    vision_tower=dict(
      image_size=SIZE, patch_size=4, width=8, depth=1, num_heads=2, embed_dim=4
    ),
  ),
  upstream={},
  label_smoothing=0.2,
)  # fmt: skip
BATCH = {
  "image": random_variables.normal(4, SIZE, SIZE, 3),
  "text_tokens": np.asarray(
    [
      [BEGIN, 4, 5, END, PAD],
      [BEGIN, END, PAD, PAD, PAD],
      [BEGIN, 5, 5, 4, END],
      [BEGIN, 4, END, PAD, PAD],
    ],
    np.int32,
  ),
}
BATCH["text_mask"] = BATCH["text_tokens"] != PAD


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(TASK.init, BATCH, {})


@functools.partial(jax.jit, static_argnames=("train", "smoothing"))
def _loss(variables, batch, train=False, smoothing=0.2):
  task = dataclasses.replace(TASK, label_smoothing=smoothing)
  return task.loss(variables, {}, batch, jax.random.key(0), step=0, train=train)


@functools.partial(jax.jit, static_argnames="options")
def _sample(variables, image, rng, options=()):
  return TASK.sample(variables, {}, {"image": image}, rng, **dict(options))


@pytest.fixture(name="every_caption", scope="module")
def _every_caption(variables):
  """tokens [N, L], mask [N, L] and log P [N]: all captions of a picture."""
  tokens = np.asarray([*itertools.product(range(V), repeat=L - 2)], np.int32)
  begin = jnp.full(len(tokens), BEGIN, jnp.int32)
  text_tokens, text_mask = jax.device_get(TASK._caption(begin, tokens))
  _, different = np.unique(
    np.where(text_mask, text_tokens, -1), axis=0, return_index=True
  )
  text = {
    "text_tokens": text_tokens[different],
    "text_mask": text_mask[different],
  }
  image = np.broadcast_to(BATCH["image"][:1], (len(different), SIZE, SIZE, 3))
  output = _loss(variables, {"image": image, **text})
  return *text.values(), np.asarray(output.metrics["log_prob"])


# Loss and gradient norm of the first step. A change here means that the same
# config now trains something else: if that is what you want, say so in
# CHANGELOG.md and put the new numbers (the test prints them).
PINNED = (2.196787, 1.794110)


def test_a_step_is_pinned(variables):
  @jax.jit
  @jax.value_and_grad
  def loss(variables):
    return _loss(variables, BATCH, train=True).loss.mean()

  value, gradients = loss(variables)
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradients)))
  print(f"PINNED = ({value:.6f}, {norm:.6f})")
  np.testing.assert_allclose((value, norm), PINNED, rtol=2e-3)


def test_the_probabilities_of_all_captions_add_up_to_1(every_caption):
  text_tokens, text_mask, log_probs = every_caption
  assert len(log_probs) == 1 + 5 + 5**2 + 5**3  # by their number of words
  assert np.exp(log_probs).sum() == pytest.approx(1.0, abs=1e-5)
  assert np.all(text_tokens[:, 0] == BEGIN)
  last = text_mask.sum(1) - 1
  assert np.all(text_tokens[range(len(last)), last] == END)
  assert not np.any(text_tokens[~text_mask])


@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_enough_beams_find_the_best_caption(variables, every_caption, penalty):
  text_tokens, text_mask, log_probs = every_caption
  found = _sample(
    variables,
    BATCH["image"],
    jax.random.key(0),
    (("num_beams", V ** (L - 2)), ("length_penalty", penalty)),
  )
  # Tokens that are predicted: a last one that must be the end is not.
  lengths = np.minimum(text_mask.sum(1) - 1, L - 2)
  best = np.argmax(log_probs / ((5 + lengths) / 6) ** penalty)
  np.testing.assert_array_equal(found["text_tokens"][0], text_tokens[best])
  np.testing.assert_array_equal(found["text_mask"][0], text_mask[best])
  assert found["log_prob"][0] == pytest.approx(log_probs[best], abs=1e-4)


def test_one_beam_is_greedy(variables, monkeypatch):
  greedy = _sample(
    variables, BATCH["image"], jax.random.key(0), (("temperature", 0.0),)
  )

  # The search is for more beams than one: let it take one of them.
  search = decoding.beam_search
  monkeypatch.setattr(
    decoding,
    "beam_search",
    lambda *args, **options: search(*args, **{**options, "num_beams": 1}),
  )
  searched = jax.jit(
    lambda: TASK.sample(variables, {}, BATCH, None, num_beams=2)
  )()
  for name in greedy:
    np.testing.assert_allclose(searched[name], greedy[name], rtol=1e-5)


def test_captions_are_drawn_by_their_probabilities(variables, every_caption):
  text_tokens, _, log_probs = every_caption
  N = 20_000
  image = np.broadcast_to(BATCH["image"][:1], (N, SIZE, SIZE, 3))
  drawn = _sample(variables, image, jax.random.key(1))
  found = np.asarray(drawn["text_tokens"])
  order = np.argsort(-log_probs)[:10]
  for i in order:
    p = np.exp(log_probs[i])
    is_it = (found == text_tokens[i]).all(1)
    assert abs(is_it.mean() - p) <= 5 * np.sqrt(p * (1 - p) / N)
    np.testing.assert_allclose(
      drawn["log_prob"][is_it], log_probs[i], atol=1e-4
    )


def test_a_picture_depends_on_its_own_key_alone(variables):
  rngs = jax.random.split(jax.random.key(0), 4)
  whole = _sample(variables, BATCH["image"], rngs)
  assert len({tuple(row) for row in whole["text_tokens"].tolist()}) > 1
  assert whole["text_tokens"].shape == whole["text_mask"].shape == (4, L)
  assert whole["text_tokens"].dtype == jnp.int32
  assert whole["text_mask"].dtype == bool
  again = _sample(variables, BATCH["image"][::-1], rngs[::-1])
  for name in whole:
    np.testing.assert_allclose(again[name][::-1], whole[name], rtol=1e-5)


def test_no_example_and_no_padding_reaches_a_loss(variables):
  """So that microbatches add up to the batch."""
  whole = _loss(variables, BATCH)
  own = 1  # the caption with the most padding
  others = np.arange(4) != own
  other = {
    "image": BATCH["image"].copy(),
    "text_tokens": np.where(BATCH["text_mask"], BATCH["text_tokens"], 4),
    "text_mask": BATCH["text_mask"],
  }
  other["image"][others] = 9.0
  other["text_tokens"][others, 1] = 1
  changed = _loss(variables, other)
  for name in ("accuracy", "log_prob"):
    assert changed.metrics[name][own] == whole.metrics[name][own]
  assert changed.loss[own] == whole.loss[own]
  assert np.all(changed.loss[others] != whole.loss[others])


def test_the_loss_is_the_mean_over_real_tokens_and_is_smoothed(variables):
  logits, _ = TASK.model.apply(
    variables, BATCH["text_tokens"], image=BATCH["image"]
  )
  log_p = np.asarray(jax.nn.log_softmax(logits))
  plain, smooth = (
    _loss(variables, BATCH, train, 0.2) for train in (False, True)
  )
  for b, row in enumerate(BATCH["text_tokens"]):
    # The end that comes last is certain, and does not count.
    targets = [x for x in row[1:-1] if x != PAD]
    true = [log_p[b, i, x] for i, x in enumerate(targets)]
    every = [log_p[b, i].mean() for i in range(len(targets))]
    assert plain.loss[b] == pytest.approx(-np.mean(true), rel=1e-4)
    expected = -0.8 * np.mean(true) - 0.2 * np.mean(every)
    assert smooth.loss[b] == pytest.approx(expected, rel=1e-4)
    assert plain.metrics["log_prob"][b] == pytest.approx(sum(true), rel=1e-4)


def test_where_begin_and_end_are_padding_too():
  """CLIP's tokenizer pads with its end; another one might begin with it."""
  task = dataclasses.replace(TASK, begin_token=3, pad_token=3)
  tokens = jnp.asarray([[4, 3, 5], [4, 5, 4], [3, 3, 3]])
  text_tokens, text_mask = task._caption(jnp.full(3, 3), tokens)
  np.testing.assert_array_equal(
    text_tokens, [[3, 4, 3, 3, 3], [3, 4, 5, 4, 3], [3, 3, 3, 3, 3]]
  )
  np.testing.assert_array_equal(text_mask.sum(1), [3, 5, 2])


def test_a_frozen_clip_gives_the_states_of_its_patches():
  config = config_lib.load("configs/baselines/captioner.py:smoke")
  run = trainer.setup(config)
  assert run.task.image_size == 32
  frozen = random_variables.like_tree(run.frozen)
  batch = next(iter(run.data.eval_batches("train", 4, 4)))
  variables = random_variables.like(run.task.init, batch, frozen)
  loss = jax.jit(
    lambda batch: (
      run.task.loss(
        variables, frozen, batch, jax.random.key(0), step=0, train=False
      ).loss
    )
  )
  picture = run.task._picture(frozen, batch)
  num_patches = (32 // config.frozen.clip.untrained.model.patch_size) ** 2
  assert picture["image_encodings"].shape[:2] == (4, 1 + num_patches)
  np.testing.assert_allclose(
    picture["image_embed"],
    run.task.upstream["clip"].encode_image(frozen["clip"], batch["image"]),
    rtol=1e-4,
    atol=1e-5,
  )
  others = {**batch, "image": batch["image"][::-1]}
  assert np.all(loss(batch) != loss(others))


def test_a_tuned_tower_starts_as_the_clips_and_can_be_frozen(tmp_path):
  clip = config_lib.load("configs/emoji/clip.py:smoke")
  arrays = random_models.save(tmp_path / "clip", clip)
  config = config_lib.load("configs/baselines/captioner_tuned.py:smoke")
  full = config_lib.load("configs/baselines/captioner_tuned.py")
  config.evals = {}
  config.init_from = dict(
    path=str(tmp_path / "clip"), names=full.init_from.names
  )
  _, found = init_from_test.start(tmp_path / "run", config)
  tower = {k: v for k, v in arrays.items() if k.startswith("params.vision.")}
  init_from_test.assert_equal({k: found[k] for k in tower}, tower)
  assert len(tower) > 10

  frozen = config_lib.apply_overrides(
    config, {"optim.rules": "(('^vision', 'freeze'),)"}
  )
  state = trainer.train(frozen, str(tmp_path / "frozen"))
  trained = trees.flatten({"params": jax.device_get(state.params)})
  init_from_test.assert_equal({k: trained[k] for k in tower}, tower)
  assert np.any(trained["params.output.kernel"])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"upstream": {"clip": None}}, "set one of them"),
    ({"model": TASK.model.clone(vision_tower=None)}, "set one of them"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
  ],
)
def test_mistakes_are_named(fields, message):
  with pytest.raises(errors.UserError, match=message):
    dataclasses.replace(TASK, **fields)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_beams": 0}, "num_beams must be 1 or more"),
    ({"num_beams": 2, "top_k": 3}, "a beam search draws nothing"),
  ],
)
def test_wrong_options_are_named(variables, options, message):
  with pytest.raises(errors.UserError, match=message):
    TASK.sample(variables, {}, BATCH, jax.random.key(0), **options)
