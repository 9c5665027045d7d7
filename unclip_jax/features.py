"""What pictures are compared by: a frozen network beside the model.

An evaluator gets what it needs from `predict` and touches no model. Metrics of
features need a second network: `Features.beside` puts it behind any predict
function that gives pictures. The network is a folder like any other (a
converted Inception, a converted CLIP, a run) whose task has the predict
function `features`. `config.evals.NAME.features` names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from unclip_jax import partitioning, upstream
from unclip_jax.data import tokenizers
from unclip_jax.evaluators import base
from unclip_jax.utils import errors

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Features:
  """A network that reads pictures, ready to run.

  Attributes:
    run: batch with `image` [B, H, W, 3] in [-1, 1], of any size, and where it
      reads captions `text_tokens` and `text_mask` -> arrays [B, ...] by name.
    encode: captions -> `text_tokens` and `text_mask`; None: it reads none.
  """

  run: Callable[[Arrays], Arrays]
  encode: Callable[[list[str]], Arrays] | None = None

  def beside(
    self, predict: base.Predict, info: base.Info | None
  ) -> base.Predict:
    """`predict`, with the features of its pictures and of the true ones.

    Args:
      predict: gives `image`; the batches hold the true `image`, and `index`.
      info: gives the captions, of which the network reads the first with its
        own tokenizer.

    Returns:
      A function that gives what `predict` gives; what the network gives for
      the drawn pictures and for the captions; and, by names with "true_" before
      them, what it gives for the true pictures.
    """

    def together(batch: Arrays) -> Arrays:
      output = predict(batch)
      drawn = base.require(output, "image", "prediction")
      true = base.require(batch, "image", "batch")
      text: Arrays = {}
      if self.encode is not None and info is not None:
        known = [info(int(i)) for i in base.require(batch, "index", "batch")]
        if "captions" in known[0]:
          text = self.encode([x["captions"][0] for x in known])
      of_true = self.run({"image": true})
      return {
        **output,
        **self.run({"image": drawn, **text}),
        **{f"true_{name}": rows for name, rows in of_true.items()},
      }

    return together


def load(path: str, mesh: jax.sharding.Mesh | None = None) -> Features:
  """The network of a folder, whole on every device of the mesh.

  Args:
    mesh: over which batches are spread; None: one device.

  Raises:
    UserError: there is no such folder, or its task has no `features`.
  """
  model = upstream.load_model(path)
  if "features" not in model.task.predict_fns():
    raise errors.UserError(
      f"the model in {path} gives no features of pictures: take a converted"
      " Inception or a CLIP"
    )
  return of(model, mesh)


def of(
  model: upstream.Loaded, mesh: jax.sharding.Mesh | None = None
) -> Features:
  """A network that is loaded, and whose task has `features`; as `load`."""
  predict = model.task.predict_fns()["features"]
  mesh = mesh or partitioning.make_mesh({}, jax.devices()[:1])
  whole = partitioning.replicated(mesh)
  weights = jax.device_put((model.variables, model.frozen), whole)
  jitted = jax.jit(predict, out_shardings=whole)
  rng = jax.random.key(0)

  def run(batch: Arrays) -> Arrays:
    placed = partitioning.spread(batch, mesh)
    return jax.device_get(jitted(*weights, placed, rng))

  length = getattr(model.task.model, "context_length", None)
  if length is None or model.assets_dir is None:  # it has no text tower
    return Features(run)
  tokenizer = tokenizers.load(model.assets_dir)

  def encode(captions: list[str]) -> Arrays:
    text_tokens, text_mask = tokenizer.encode(captions, length)
    return {"text_tokens": text_tokens, "text_mask": text_mask}

  return Features(run, encode)
