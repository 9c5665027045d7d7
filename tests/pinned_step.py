"""The first step of a task, pinned, and the same whatever its microbatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import optim, trainer
from unclip_jax.utils import config as config_lib


def check(
  task: Any, params: Any, frozen: Any, batch: Any, pinned: tuple[float, float]
) -> None:
  """Compares one SGD step, and that of two microbatches, with `pinned`.

  Args:
    pinned: loss and gradient norm. If a change is meant to change them, run
      the test with -s, look at what it prints, and write it there.
  """
  tx, _ = optim.make_optimizer(
    config_lib.from_json('{"learning_rate": 0.1, "name": "sgd"}'), 10
  )
  state = trainer.TrainState(
    jnp.zeros((), jnp.int32), params, {}, tx.init(params), params
  )
  results = []
  for n in (1, 2):
    step = trainer.make_train_step(task, tx, ema_decay=0.5, num_microbatches=n)
    after, metrics = jax.jit(step)(state, frozen, batch, jax.random.key(1))
    results.append(after.params)
    found = float(metrics["loss"]), float(metrics["grad_norm"])
    print(f"({found[0]:.6f}, {found[1]:.6f})")
    np.testing.assert_allclose(found, pinned, rtol=2e-3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    *results,
  )
