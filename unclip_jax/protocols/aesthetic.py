"""How well are pictures liked, by a probe of the user's own ratings?

Ramesh et al. 2022 (section 5.5) train a linear probe from CLIP image
embeddings to human ratings of pictures and find that guidance raises the mean
predicted rating of drawn ones. Here the ratings are yours: a CSV file with the
columns `file_name` (beside it) and `rating`.

The probe is a ridge regression on the pipeline's own normalised embeddings; its
strength is chosen by the error on a tenth of the ratings, and it is judged on
another tenth by rank correlation (Spearman), which is to be looked at first: a
probe that knows nothing of held-out pictures says nothing of drawn ones.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import scipy.stats

from unclip_jax.data import preprocess
from unclip_jax.metrics import similarity
from unclip_jax.protocols import base
from unclip_jax.utils import errors

_LEAST = 30
_STRENGTHS = tuple(10.0**k for k in range(-4, 4))


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  ratings: path of the CSV file.
  guidance_scales: of the decoder; each is a row.
  num_images: captions of the split, one picture each.
  image_size: of the rated pictures, before the CLIP resizes them.
  """

  ratings: str
  guidance_scales: tuple[float, ...] = (1.0, 2.0, 4.0)
  num_images: int = 500
  image_size: int = 256

  def run(self, subject: base.Subject) -> base.Result:
    """Rows by guidance scale, and one of the true pictures.

    Raises:
      UserError: no such file, no such columns, or fewer than 30 ratings.
    """
    embeds, ratings = self._rated(subject)
    probe, figures = fit(embeds, ratings, subject.seed)
    rows = []
    for scale in self.guidance_scales:
      draw = subject.predict(
        "text_to_image", decoder=dict(guidance_scale=scale)
      )
      seen = subject.look(draw, self.num_images)
      if not rows:
        rating = probe(seen["true_image_embed"]).mean()
        rows.append({"pictures": "true", "rating": float(rating)})
      rating = probe(seen["image_embed"]).mean()
      row = {"pictures": "drawn", "guidance_scale": scale}
      rows.append({**row, "rating": float(rating)})
    plots = (base.Plot("guidance_scale", "rating"),)
    return base.Result(rows, {"probe": figures}, plots)

  def _rated(self, subject: base.Subject) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, D] and ratings [N] of the file."""
    path = pathlib.Path(self.ratings)
    try:
      with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [
          (r["file_name"], float(r["rating"])) for r in csv.DictReader(file)
        ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as e:
      raise errors.UserError(
        f"aesthetic.ratings: {path} cannot be read as a CSV file with the"
        f" columns file_name and rating ({e})"
      ) from e
    if len(rows) < _LEAST:
      raise errors.UserError(
        f"aesthetic.ratings: {path} has {len(rows)} ratings: give {_LEAST} or"
        " more"
      )
    see = subject.clip(lambda batch: {"image": batch["image"]}, None)
    embeds = []
    for start in range(0, len(rows), subject.batch_size):
      names = [name for name, _ in rows[start : start + subject.batch_size]]
      images = np.stack([self._picture(path.parent / name) for name in names])
      embeds.append(see({"image": images})["image_embed"])
    return np.concatenate(embeds), np.array([rating for _, rating in rows])

  def _picture(self, path: pathlib.Path) -> np.ndarray:
    try:
      encoded = path.read_bytes()
    except OSError as e:
      raise errors.UserError(
        f"aesthetic.ratings: cannot read {path}: {e}"
      ) from e
    picture = preprocess.decode(encoded, name=str(path))
    square = preprocess.square(picture, self.image_size)
    return preprocess.to_float(np.asarray(square))


def fit(
  embeds: np.ndarray, ratings: np.ndarray, seed: int = 0
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, float]]:
  """A linear probe.

  Args:
    embeds: [N, D], of any length.
    ratings: [N].

  Returns:
    [M, D] -> predicted ratings [M]; and `spearman`, `error` (root mean square)
    beside `error_of_the_mean`, all of the tenth that was held out, `strength`
    and `count`.
  """
  embeds = similarity.normalize(embeds)
  order = np.random.default_rng(seed).permutation(len(embeds))
  test, chosen, train = np.split(order, [len(order) // 10, len(order) // 5])

  def solve(rows: np.ndarray, strength: float) -> Callable:
    mean, level = embeds[rows].mean(axis=0), ratings[rows].mean()
    x, y = embeds[rows] - mean, ratings[rows] - level
    gram = x.T @ x + strength * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ y)
    return lambda z: (similarity.normalize(z) - mean) @ weights + level

  def error(probe: Callable, rows: np.ndarray) -> float:
    return float(np.sqrt(np.mean((probe(embeds[rows]) - ratings[rows]) ** 2)))

  strength = min(_STRENGTHS, key=lambda s: error(solve(train, s), chosen))
  probe = solve(np.concatenate([train, chosen]), strength)
  figures = {
    "spearman": float(
      scipy.stats.spearmanr(probe(embeds[test]), ratings[test]).statistic
    ),
    "error": error(probe, test),
    "error_of_the_mean": float(
      np.sqrt(np.mean((ratings[test] - ratings[train].mean()) ** 2))
    ),
    "strength": strength,
    "count": float(len(embeds)),
  }
  return probe, figures
