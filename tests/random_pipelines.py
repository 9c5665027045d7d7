"""A whole pipeline of tiny networks with random weights, trained on nothing."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax

from tests import random_variables
from unclip_jax import inference, model_folder, pipelines, trainer
from unclip_jax.utils import config as config_lib


def make(
  assets: pathlib.Path, prior: str = "prior"
) -> pipelines.UnCLIPPipeline:
  """The pipeline of the `:smoke` configs.

  Args:
    assets: folder that the tokenizer is copied to.
    prior: file of configs/emoji that gives the prior.
  """
  files = {
    "clip": "clip",
    "prior": prior,
    "decoder": "decoder",
    "upsampler_64": "upsampler",
  }
  parts: dict[str, inference.Loaded] = {}
  clip: Any = None
  for part, file in files.items():
    run = trainer.setup(config_lib.load(f"configs/emoji/{file}.py:smoke"))
    batches = run.data.eval_batches("train", 4, 8)
    frozen = dict(run.frozen)
    if "clip" in frozen:
      frozen["clip"] = clip
      with run.config.unlocked():
        run.config.frozen.clip.fingerprint = model_folder.fingerprint(clip)
    frozen |= run.task.prepare(frozen, batches)
    batch = next(iter(batches))
    shapes = jax.eval_shape(run.task.init, jax.random.key(0), batch, frozen)
    variables = random_variables.like_tree(shapes)
    if part == "clip":
      clip = variables
      for asset, path in run.data.assets().items():
        shutil.copy(path, assets / asset)
    parts[part] = inference.Loaded(
      run.task, variables, frozen, run.config, str(assets), "0"
    )
  return pipelines.UnCLIPPipeline(parts)
