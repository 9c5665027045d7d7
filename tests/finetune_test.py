"""Layer-wise decay: the rates that a network's parameters learn with."""

import jax
import numpy as np
import pytest

from configs import finetune
from unclip_jax import trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import trees


def test_rules_of_layer_decay():
  rules = finetune.layer_decay(
    3, 0.5, below=("^stem",), fresh=(r"\.cross_attn\.",)
  )
  assert rules == (
    (r"\.cross_attn\.", dict(lr_mult=1.0)),
    (r"^block_0\.", dict(lr_mult=0.125)),
    (r"^block_1\.", dict(lr_mult=0.25)),
    (r"^block_2\.", dict(lr_mult=0.5)),
    ("^stem", dict(lr_mult=0.0625)),
  )


@pytest.fixture(scope="module", name="updates")
def _updates():
  """Name -> how far a first step of Adam moves it, in learning rates."""
  config = config_lib.load("configs/baselines/mim_finetune.py:smoke")
  config.optim.clip_norm = None
  config.optim.weight_decay = 0.0
  config.optim.warmup_steps = 0
  run = trainer.setup(config, abstract=True)
  shapes = trainer.step_shapes(run)[0].params
  # Adam's first step is the rate, whatever the gradient.
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  updates, _ = run.tx.update(ones, run.tx.init(ones), ones)
  rate = config.optim.learning_rate
  flat = trees.flatten(updates)
  return {name: float(-x.ravel()[0] / rate) for name, x in flat.items()}


def test_blocks_learn_with_their_share_of_the_rate(updates):
  depth, decay = 2, 0.75
  for i in range(depth):
    name = f"block_{i}.attn.query.kernel"
    assert updates[name] == pytest.approx(decay ** (depth - i), rel=1e-4)
  assert updates["position"] == pytest.approx(decay ** (depth + 1), rel=1e-4)


def test_what_is_new_learns_with_the_whole_rate(updates):
  whole = {
    name for name, x in updates.items() if x == pytest.approx(1.0, rel=1e-4)
  }
  for part in ("cross_attn", "norm_cross", "text_encoder", "code_embed"):
    names = {name for name in updates if part in name}
    assert names and names <= whole, part
  assert {"output.kernel", "ln_final.scale"} <= whole
