"""Completing pictures: what is known stays, the rest follows the network."""

import functools

import jax
import numpy as np
import pytest

from tests import fake_tokenizer, pinned_step, random_variables
from unclip_jax.models import completion as completion_model
from unclip_jax.models import mim
from unclip_jax.tasks import completion
from unclip_jax.utils import errors

B, S, PATCH, P, V = 4, 8, 2, 16, 5
TOKENIZER = fake_tokenizer.Tokenizer(V, S // PATCH, PATCH)
MODEL = completion_model.Model(
  image_size=S, patch_size=PATCH, width=16, depth=1, num_heads=2
)
TASKS = {
  "pixel": completion.Task(MODEL, {}),
  "token": completion.Task(MODEL.clone(num_codes=V), {"tokenizer": TOKENIZER}),
}
FROZEN = {"tokenizer": {}}
BATCH = {"image": np.clip(random_variables.normal(B, S, S, 3), -1, 1)}
KEYS = jax.random.split(jax.random.key(0), B)


@functools.cache
def _variables(name):
  variables = random_variables.like(
    TASKS[name].init, batch=BATCH, frozen=FROZEN
  )
  variables["params"]["output"]["kernel"] *= 3 if name == "token" else 0.1
  return variables


@functools.cache
def _sampler(name, **options):
  return jax.jit(functools.partial(TASKS[name].sample, **options))


def _draw(name, batch=BATCH, rng=KEYS, **options):
  draw = _sampler(name, **options)
  return draw(_variables(name), FROZEN, batch, rng)


@pytest.mark.parametrize("name", TASKS)
def test_known_rows_stay_and_what_is_below_is_not_looked_at(name):
  drawn = _draw(name)["image"]
  assert drawn.shape == (B, S, S, 3) and np.abs(drawn).max() <= 1
  image = BATCH["image"]
  np.testing.assert_array_equal(drawn[:, :4], image[:, :4])
  assert np.all(np.abs(drawn - image)[:, 4:].max((1, 2, 3)) > 1e-2)
  other = image.copy()
  other[:, 4:] = -other[:, 4:]
  np.testing.assert_array_equal(_draw(name, {"image": other})["image"], drawn)
  other = image.copy()
  other[:, :4] = -other[:, :4]
  below = _draw(name, {"image": other})["image"][:, 4:]
  assert np.abs(below - drawn[:, 4:]).max() > 1e-3


def test_drawing_with_the_cache_is_the_network_itself():
  """Greedy codes are the argmax of the whole network on themselves."""
  task = TASKS["token"]
  tokens = _draw("token", temperature=0.0, num_known_rows=1)["image_tokens"]
  logits, _ = task.model.apply(_variables("token"), tokens)
  np.testing.assert_array_equal(logits.argmax(-1)[:, 4:], tokens[:, 4:])
  np.testing.assert_array_equal(
    tokens[:, :4], TOKENIZER.encode_tokens({}, BATCH["image"])[:, :4]
  )


def test_patches_are_the_networks_own_means():
  image = _draw("pixel", num_known_rows=1)["image"]
  patches = mim.to_patches(image, PATCH)
  means, _ = TASKS["pixel"].model.apply(_variables("pixel"), patches)
  np.testing.assert_allclose(
    patches[:, 4:], np.clip(means, -1, 1)[:, 4:], atol=1e-4
  )
  assert np.abs(patches[:, 4:]).max() < 1  # where nothing is cut


def test_a_picture_is_completed_the_same_in_any_batch():
  whole = _draw("token")["image_tokens"]
  part = {"image": BATCH["image"][2:]}
  alone = _draw("token", part, KEYS[2:])["image_tokens"]
  np.testing.assert_array_equal(alone, whole[2:])
  assert np.any(_draw("token", rng=KEYS[::-1])["image_tokens"] != whole)


@pytest.mark.parametrize("name", TASKS)
def test_all_rows_and_none_may_be_known(name):
  everything = _draw(name, num_known_rows=4)["image"]
  np.testing.assert_array_equal(everything, BATCH["image"])
  nothing = _draw(name, num_known_rows=0)["image"]
  other = {"image": BATCH["image"][::-1]}
  np.testing.assert_array_equal(
    _draw(name, other, num_known_rows=0)["image"], nothing
  )


# Loss and gradient norm of the first step: tests/pinned_step.py.
PINNED = {"pixel": (0.587264, 0.368780), "token": (4.093371, 13.582122)}


@pytest.mark.parametrize("name", TASKS)
def test_the_first_step_is_pinned_and_parts_of_it_are_the_whole(name):
  pinned_step.check(
    TASKS[name], _variables(name)["params"], FROZEN, BATCH, PINNED[name]
  )


def test_wrong_options_are_errors():
  with pytest.raises(errors.UserError, match="num_known_rows 5 must be in"):
    TASKS["pixel"].sample({}, {}, BATCH, KEYS, num_known_rows=5)
  with pytest.raises(errors.UserError, match=r"needs config.frozen.tokenizer"):
    completion.Task(MODEL.clone(num_codes=V), {})
