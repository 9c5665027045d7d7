"""Cosine similarity of paired embeddings, and the same under a wrong pairing.

The mean cosine of a set of embeddings to targets says little by itself: CLIP
embeddings of any two pictures have a high cosine (they fill a narrow cone).
What a wrong pairing of the same vectors gives is the level to compare with.

`clip_score` and `directional` are the two figures of CLIP embeddings that the
literature of text-to-picture models and of editing reports.
"""

from __future__ import annotations

import numpy as np


def normalize(embed: np.ndarray) -> np.ndarray:
  """Rows [..., D] of length 1, float64; zero rows stay zero."""
  embed = np.asarray(embed, np.float64)
  norm = np.linalg.norm(embed, axis=-1, keepdims=True)
  return embed / np.where(norm == 0.0, 1.0, norm)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Cosine [B] of the rows of two arrays [B, D], float64; 0 for zero rows."""
  return (normalize(a) * normalize(b)).sum(axis=-1)


def derangement(size: int, seed: int = 0) -> np.ndarray:
  """A permutation int [size] that moves every element; fixed by the seed.

  It is one random cycle through all elements.

  Raises:
    ValueError: size < 2 (there is none).
  """
  if size < 2:
    raise ValueError(f"no permutation of {size} moves every element")
  cycle = np.random.default_rng(seed).permutation(size)
  result = np.empty(size, np.int64)
  result[cycle] = np.roll(cycle, 1)
  return result


def shuffled_cosine(a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
  """Cosine [B] of every row of `a` with another row of `b` (`derangement`)."""
  return cosine(a, np.asarray(b)[derangement(len(b), seed)])


def clip_score(image_embed: np.ndarray, text_embed: np.ndarray) -> np.ndarray:
  """max(100 cos, 0) [B] of pictures and their captions [B, D].

  Hessel et al. 2021 (arXiv 2104.08718, section 3), whose factor is 2.5; with
  100 it is what text-to-picture models are compared by.
  """
  return np.maximum(100.0 * cosine(image_embed, text_embed), 0.0)


def directional(
  image_before: np.ndarray,
  image_after: np.ndarray,
  text_before: np.ndarray,
  text_after: np.ndarray,
) -> np.ndarray:
  """Whether an edit moved pictures the way that their captions moved: [B].

  The cosine of the change of the picture's embedding and that of the text's,
  embeddings being of length 1 (Gal et al. 2021, arXiv 2108.00946, eq. 2 is 1
  less this). In [-1, 1]; 0 where nothing moved.

  Args:
    image_before, image_after, text_before, text_after: [B, D], any length.
  """
  return cosine(
    normalize(image_after) - normalize(image_before),
    normalize(text_after) - normalize(text_before),
  )
