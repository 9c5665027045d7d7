"""The paper's CLIP has the paper's size (Ramesh et al. 2022, Appendix C)."""

import math

import jax

from unclip_jax import optim
from unclip_jax.tasks import base
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import trees

IMAGE, PATCH, TOKENS, CONTEXT, JOINT = 256, 16, 49_408, 77, 1024


def transformer(width, depth):
  """Parameters of blocks: attention, MLP of 4 widths, two LayerNorms."""
  attention = 4 * (width * width + width)
  mlp = width * 4 * width + 4 * width + 4 * width * width + width
  return depth * (attention + mlp + 2 * 2 * width)


def test_clip_has_the_papers_parameters():
  config = config_lib.load("configs/paper/clip.py")
  task = base.build(config)
  L = config.data.preprocess.context_length
  batch = {
    "image": jax.ShapeDtypeStruct((1, IMAGE, IMAGE, 3), "float32"),
    "text_tokens": jax.ShapeDtypeStruct((1, L), "int32"),
    "text_mask": jax.ShapeDtypeStruct((1, L), "bool"),
  }
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch, {})["params"]
  counts = {"vision": 0, "text": 0, "logit_scale": 0}
  for name, leaf in trees.flatten(shapes).items():
    counts[name.partition(".")[0]] += math.prod(leaf.shape)

  patches = (IMAGE // PATCH) ** 2
  vision = (
    PATCH * PATCH * 3 * 1280  # patches
    + (1 + patches) * 1280 + 1280  # positions and class token
    + transformer(1280, 32)
    + 2 * 2 * 1280  # LayerNorms before and after
    + 1280 * JOINT
  )  # fmt: skip
  text = (
    TOKENS * 1024
    + CONTEXT * 1024
    + transformer(1024, 24)
    + 2 * 1024
    + 1024 * JOINT
  )
  assert counts == {"vision": vision, "text": text, "logit_scale": 1}
  assert (round(vision / 1e6), round(text / 1e6)) == (632, 354)


def test_clip_is_trained_as_in_the_paper():
  config = config_lib.load("configs/paper/clip.py")
  # 32 epochs of 650 million pictures.
  assert 0 <= 32 * 650e6 - config.num_steps * config.batch_size < 32_768
  assert config.num_steps == 634_765
  sam = optim.make_sam(config.optim, config.batch_size, config.num_microbatches)
  assert (sam.optim.sam_rho, sam.replica_batch) == (0.1, 64)
  _, learning_rate = optim.make_optimizer(config.optim, config.num_steps)
  assert math.isclose(learning_rate(2000), 3e-4, rel_tol=1e-6)
