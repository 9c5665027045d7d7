"""How good is the prior?

For every number of candidates (Ramesh et al. 2022, section 2.2: two are drawn,
and the one with the larger dot product with z_t is kept) the cosines of
evaluators/prior_report.py: of the drawn to the true image embedding, to those
of other captions, of the text embedding to the true one, which is what a prior
has to beat; and of a diffusion prior its loss by timestep.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unclip_jax.evaluators import base as evaluators
from unclip_jax.evaluators import prior_report
from unclip_jax.protocols import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  num_examples: of the split.
  num_candidates: each is a row.
  num_bins: timesteps at which the loss is taken, evenly over all.
  """

  num_examples: int = 500
  num_candidates: tuple[int, ...] = (1, 2, 4)
  num_bins: int = 10

  def run(self, subject: base.Subject) -> base.Result:
    """Rows by number of candidates; figures `loss_by_timestep`, `gain`.

    Raises:
      UserError: the model has no prior.
    """
    if "prior" not in subject.pipe.parts:
      raise errors.UserError("prior_report needs a model with a prior")
    rows = []
    evaluator = prior_report.Evaluator(self.num_examples)
    for count in self.num_candidates:
      predict = subject.predict("prior", prior=dict(num_candidates=count))
      batches = subject.batches(self.num_examples)
      found = dict(evaluator.run(predict, batches, None))
      rows.append({"num_candidates": count, **found})
    gain = {
      f"{row['num_candidates']}": row["cosine"] - rows[0]["cosine"]
      for row in rows[1:]
    }
    figures = {"gain_in_cosine_over_the_first": gain}
    task = subject.pipe.parts["prior"].task
    if hasattr(task, "diffusion"):
      figures["loss_by_timestep"] = self._losses(
        subject, task.diffusion.num_timesteps
      )
    return base.Result(rows, figures)

  def _losses(
    self, subject: base.Subject, num_timesteps: int
  ) -> dict[str, float]:
    """Timestep -> mean loss."""
    predict = subject.predict("prior_loss")
    losses = {}
    for t in np.linspace(0, num_timesteps - 1, self.num_bins).astype(int):
      batches = (
        {**batch, "timesteps": np.full(len(batch["index"]), t, np.int32)}
        for batch in subject.batches(self.num_examples)
      )
      found, _ = evaluators.collect(predict, batches, ("loss",))
      losses[str(t)] = float(found["loss"].mean())
    return losses
