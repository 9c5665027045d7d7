"""What the bound of a variational autoencoder is weighted with in training.

  warm_up     the weight of the KL term rises with the step: KL annealing,
              Bowman et al. 2016 (arXiv 1511.06349), section 3.1
  free_bits   each latent dimension may carry some information at no cost:
              Kingma et al. 2016 (arXiv 1606.04934), appendix C.8

Both keep a decoder that could do without the latent variable from learning to.
The divergences themselves are `diffusion.gaussian.normal_kl`.

Deviation: the source bounds the mean over the batch of each group's KL from
below. Here it is each example's, so that no example's loss depends on others;
a group is one latent dimension.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def warm_up(step: jax.Array | int, num_steps: int) -> jax.Array:
  """A weight that rises linearly from 0 at step 0 to 1 at step `num_steps`.

  Args:
    step: updates done.
    num_steps: 0: the weight is 1 from the start.

  Returns:
    [] float32 in [0, 1].
  """
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(1.0, step / num_steps) if num_steps else jnp.ones(())


def free_bits(kl: jax.Array, bits: float) -> jax.Array:
  """The KL that counts: sum over j of max(bits, KL_j), Kingma et al. C.8.

  Where a dimension's KL is below the floor its gradient is 0.

  Args:
    kl: [B, Z] nats, of each latent dimension.
    bits: the floor of each, in bits.

  Returns:
    [B] nats.
  """
  return jnp.maximum(kl, bits * math.log(2.0)).sum(axis=-1)
