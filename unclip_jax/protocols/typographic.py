"""Is the model taken in by a word that is written on a picture?

Ramesh et al. 2022, section 4 and Fig. 6: CLIP takes an apple for the word on
it, while pictures decoded from its embedding still show apples. Every example's
picture gets the name of another example written on it, and a CLIP decides
between the two names: for the picture before and after, and for what the
decoder makes of the embedding of the second.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unclip_jax.metrics import pictures, similarity
from unclip_jax.protocols import base


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  num_examples: of the split.
  num_images: decoded from each attacked picture.
  num_grid: examples shown: attacked, and what was decoded.
  """

  num_examples: int = 50
  num_images: int = 2
  num_grid: int = 8

  def run(self, subject: base.Subject) -> base.Result:
    """Rows `clean`, `attacked` and `decoded`: how often the true name wins,
    and its mean probability."""
    batches = list(subject.batches(self.num_examples))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    indices = np.concatenate([b["index"][b["mask"]] for b in batches])
    info = subject.info()
    names = [info(int(i))["name"] for i in indices]
    words = [names[i] for i in similarity.derangement(len(names), subject.seed)]
    probabilities: dict[str, list[float]] = {
      "clean": [],
      "attacked": [],
      "decoded": [],
    }
    shown = []
    for image, name, word in zip(images, names, words):
      labels = (name, word)
      attack = subject.pipe.typographic_attack(
        image / 2 + 0.5,
        word,
        labels,
        num_images=self.num_images,
        seed=subject.seed,
      )
      drawn = [np.asarray(x, np.float32) / 255 for x in attack.output.images]
      probabilities["attacked"].append(attack.probabilities[name])
      classify = subject.pipe.classify
      probabilities["clean"] += classify([image / 2 + 0.5], labels)[
        :, 0
      ].tolist()
      probabilities["decoded"] += classify(drawn, labels)[:, 0].tolist()
      if len(shown) < self.num_grid:
        written = np.asarray(attack.image, np.float32) / 255
        row = np.concatenate([written, *drawn], axis=1) * 2 - 1
        shown.append(row)
    rows = [
      {
        "pictures": kind,
        "true_name_wins": float(np.mean(np.array(p) > 0.5)),
        "probability": float(np.mean(p)),
        "count": float(len(p)),
      }
      for kind, p in probabilities.items()
    ]
    grid = pictures.make_grid(np.stack(shown), 1)
    return base.Result(rows, pictures={"attacked_and_decoded": grid})
