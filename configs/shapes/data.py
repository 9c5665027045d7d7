"""The shapes dataset as the stages read it (unclip_jax/data/shapes.py)."""

from __future__ import annotations

import ml_collections

CONTEXT_LENGTH = 32  # tokens; the longest caption has 30
VOCAB_SIZE = 640
SPLITS = ("validation", "unseen_pairs", "unseen_bindings")


def shapes(*, smoke: bool, image_size: int, **preprocess) -> dict:
  """`config.data`.

  Args:
    smoke: few scenes.
    image_size: of the pictures that are drawn, and of `image`.
    **preprocess: other fields of unclip_jax.data.preprocess.Preprocess. They
      are not mirrored: captions speak of left and right.
  """
  return dict(
    source_name="unclip_jax.data.shapes",
    source=dict(
      data_dir=None,
      image_size=image_size,
      num_train=64 if smoke else 100_000,
      num_held_out=16 if smoke else 2000,
      seed=0,
    ),
    preprocess=dict(
      context_length=CONTEXT_LENGTH, image_size=image_size, **preprocess
    ),
    tokenizer=None,
    max_broken=0.05,  # share of broken records; more of them stop the run
    stored_arrays=True,  # embeddings and the like, where records have them
  )


def on_every_split(**evaluator) -> ml_collections.ConfigDict:
  """An entry of `config.evals` for each held-out split, by its name."""
  return ml_collections.ConfigDict(
    {split: dict(evaluator, split=split) for split in SPLITS}
  )
