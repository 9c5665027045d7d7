"""How the gradient of one step is made: at once, in parts, with SAM.

  at once       `jax.grad` of the mean loss of the batch
  microbatches  the mean of the parts' gradients, where the loss is a mean over
                examples
  cached        GradCache (Gao et al. 2021, arXiv 2101.06983, section 3.2; also
                BASIC, Pham et al. 2021, arXiv 2111.10050), where the loss
                couples the examples (`batch_coupled`):
                  1. outputs of all parts, without their activations
                  2. the loss of the whole batch, its gradient with respect to
                     the outputs and to the parameters that it uses itself
                  3. part by part again, the gradient through the outputs
  SAM           sharpness-aware minimisation (Foret et al. 2020, arXiv
                2010.01412, equations 2 and 3), with a perturbation of its own
                for each replica (their m-sharpness, section 4.1): a group of
                `Sam.replica_batch` examples, whatever the devices

For a replica r with rows of its own, w the parameters:

  e_r = rho g_r / ||g_r||_2
  uncoupled   g_r = dL_r(w)/dw                      gradient: mean_r dL_r/dw
                                                              at w + e_r
  coupled     z_r = outputs(w, rows of r)
              g_r = dL/dz_r dz_r/dw                 gradient: dL(w, z')/dw with
                                                    z'_r = outputs(w + e_r)

and e_r is a constant for the derivative. In the coupled loss the parameters
that the loss itself uses belong to no replica, and are not perturbed. What is
random is drawn alike wherever the same rows are seen again.

Replicas of one microbatch run at once (`jax.vmap`), and each holds a perturbed
copy of the parameters and a gradient, where its rows are: on a mesh every
device holds those of its own replicas. More microbatches hold fewer at once;
they change neither the replicas nor the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax import optim
from unclip_jax.tasks import base as tasks_base

PyTree = Any
Metrics = dict[str, jax.Array]


class Gradients(NamedTuple):
  """What one batch gives."""

  grads: PyTree  # as the parameters
  model_state: PyTree
  metrics: Metrics  # name -> []


# (params, model_state, frozen, batch, rng, step) -> Gradients
GradientFn = Callable[
  [
    PyTree,
    PyTree,
    tasks_base.Frozen,
    tasks_base.Batch,
    jax.Array,
    jax.Array,
  ],
  Gradients,
]


def make_gradients(
  task: tasks_base.Task,
  *,
  num_microbatches: int = 1,
  sam: optim.Sam | None = None,
) -> GradientFn:
  """The pure function from parameters and a batch to `Gradients`.

  With SAM the metrics and the model state are those at the parameters
  themselves, averaged over the replicas, and `perturbed_loss` is the loss at
  the perturbed ones.

  Args:
    task: a `CoupledTask` if it says `batch_coupled`.
    num_microbatches: parts of the batch that are seen one after another.
    sam: None = off.
  """

  def gradients(
    params: PyTree,
    model_state: PyTree,
    frozen: tasks_base.Frozen,
    batch: tasks_base.Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> Gradients:
    def loss(
      params: PyTree, model_state: PyTree, batch: PyTree, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
      variables = {"params": params, **model_state}
      return _mean(
        task.loss(variables, frozen, batch, rng, step=step, train=True)
      )

    def encode(params: PyTree, batch: PyTree, rng: jax.Array) -> PyTree:
      variables = {"params": params, **model_state}
      return task.encode(variables, frozen, batch, rng, train=True)

    def coupled_loss(
      params: PyTree, outputs: PyTree
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
      variables = {"params": params, **model_state}
      return _mean(task.coupled_loss(variables, outputs))

    if sam is not None:
      replicas = _replicas(batch, rng, sam.replica_batch)
      parts = _split(replicas, num_microbatches)
      if task.batch_coupled:
        return _cached_sam(encode, coupled_loss, sam, params, parts)
      return _accumulate(
        functools.partial(_sam, loss, sam, params), model_state, parts
      )
    if num_microbatches == 1:
      return _at_once(loss, params, model_state, batch, rng)
    rngs = jax.random.split(rng, num_microbatches)
    parts = (_split(batch, num_microbatches), rngs)
    if task.batch_coupled:
      return _cached(
        lambda params, part: encode(params, *part),
        lambda params, outputs: coupled_loss(params, _join(outputs)),
        params,
        parts,
      )
    return _accumulate(
      lambda model_state, batch, rng: _at_once(
        loss, params, model_state, batch, rng
      ),
      model_state,
      parts,
    )

  return gradients


def _mean(
  output: tasks_base.LossOutput,
) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
  """Averages over the examples: the loss, and what comes with it."""
  metrics = jax.tree.map(jnp.mean, {**output.metrics, "loss": output.loss})
  return jnp.mean(output.loss), (output.model_state, metrics)


def _at_once(
  loss: Callable[..., tuple[jax.Array, tuple[PyTree, Metrics]]],
  params: PyTree,
  model_state: PyTree,
  batch: PyTree,
  rng: jax.Array,
) -> Gradients:
  grads, aux = jax.grad(loss, has_aux=True)(params, model_state, batch, rng)
  return Gradients(grads, *aux)


def _accumulate(
  gradients_of: Callable[[PyTree, PyTree, jax.Array], Gradients],
  model_state: PyTree,
  parts: tuple[PyTree, jax.Array],
) -> Gradients:
  """Mean gradients and metrics over the leading axis of `parts`.

  Args:
    gradients_of: of (model_state, batch, rng); the model state goes from one
      part to the next.
  """
  n = parts[1].shape[0]

  def body(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
    model_state, sums = carry
    grads, model_state, metrics = gradients_of(model_state, *part)
    return (model_state, jax.tree.map(jnp.add, sums, (grads, metrics))), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradients_of, model_state, *first)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (shapes.grads, shapes.metrics)
  )
  (model_state, sums), _ = jax.lax.scan(body, (model_state, zeros), parts)
  grads, metrics = jax.tree.map(lambda x: x / n, sums)
  return Gradients(grads, model_state, metrics)


def _cached(
  encode: Callable[[PyTree, PyTree], PyTree],
  loss: Callable[[PyTree, PyTree], tuple[jax.Array, tuple[PyTree, Metrics]]],
  params: PyTree,
  parts: PyTree,
) -> Gradients:
  """Gradient of `loss(params, stacked encode(params, part))` (GradCache).

  Args:
    encode: outputs of one part; must draw alike each time.
    loss: of the outputs of all parts, stacked on a leading axis [n].
    parts: leading axis [n].
  """
  # 1. Outputs of every part.
  outputs = jax.lax.map(functools.partial(encode, params), parts)
  # 2. The loss, by its own parameters and by the outputs.
  (grads, cotangents), aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(
    params, outputs
  )

  # 3. Through the outputs, on top of 2.
  def body(grads: PyTree, part: PyTree) -> tuple[PyTree, None]:
    part, cotangents = part
    _, vjp = jax.vjp(lambda params: encode(params, part), params)
    return _add(grads, *vjp(cotangents)), None

  grads, _ = jax.lax.scan(body, grads, (parts, cotangents))
  return Gradients(grads, *aux)


def _sam(
  loss: Callable[..., tuple[jax.Array, tuple[PyTree, Metrics]]],
  sam: optim.Sam,
  params: PyTree,
  model_state: PyTree,
  replicas: PyTree,
  rngs: jax.Array,
) -> Gradients:
  """Mean over replicas [R, rows, ...] of the gradients at w + e_r."""

  def of_replica(batch: PyTree, rng: jax.Array) -> Gradients:
    plain = _at_once(loss, params, model_state, batch, rng)
    perturbed = _add(params, sam.perturbation(plain.grads))
    sharp = _at_once(loss, perturbed, model_state, batch, rng)
    return _with_perturbed_loss(plain, sharp)

  return jax.tree.map(
    lambda x: jnp.mean(x, axis=0), jax.vmap(of_replica)(replicas, rngs)
  )


def _cached_sam(
  encode: Callable[[PyTree, PyTree, jax.Array], PyTree],
  loss: Callable[[PyTree, PyTree], tuple[jax.Array, tuple[PyTree, Metrics]]],
  sam: optim.Sam,
  params: PyTree,
  parts: tuple[PyTree, jax.Array],
) -> Gradients:
  """The same for a coupled loss; `parts` are [n, R / n, rows, ...].

  A perturbation is made again where it is needed, not kept: with all replicas
  at once XLA may find that this is the same.
  """

  def loss_of_parts(
    params: PyTree, outputs: PyTree
  ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    replicas = _join(outputs)
    return loss(
      params,
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), replicas),
    )

  def plain_encode(part: PyTree) -> PyTree:
    return jax.vmap(functools.partial(encode, params))(*part)

  def perturbed_encode(moving: PyTree, part: PyTree) -> PyTree:
    def of_replica(batch: PyTree, rng: jax.Array, cotangents: PyTree) -> PyTree:
      _, vjp = jax.vjp(lambda params: encode(params, batch, rng), params)
      perturbation = sam.perturbation(*vjp(cotangents))
      return encode(_add(moving, perturbation), batch, rng)

    return jax.vmap(of_replica)(*part)

  outputs = jax.lax.map(plain_encode, parts)
  (grads, cotangents), aux = jax.grad(
    loss_of_parts, argnums=(0, 1), has_aux=True
  )(params, outputs)
  sharp = _cached(perturbed_encode, loss_of_parts, params, (*parts, cotangents))
  return _with_perturbed_loss(Gradients(grads, *aux), sharp)


def _with_perturbed_loss(plain: Gradients, sharp: Gradients) -> Gradients:
  """The gradients at w + e with the metrics and the model state at w."""
  perturbed_loss = sharp.metrics["loss"]
  return Gradients(
    sharp.grads,
    plain.model_state,
    {**plain.metrics, "perturbed_loss": perturbed_loss},
  )


def _replicas(
  batch: tasks_base.Batch, rng: jax.Array, rows: int
) -> tuple[PyTree, jax.Array]:
  """[B, ...] -> [B / rows, rows, ...], neighbours together, and keys."""
  replicas = jax.tree.map(
    lambda x: x.reshape(x.shape[0] // rows, rows, *x.shape[1:]), batch
  )
  count = jax.tree.leaves(replicas)[0].shape[0]
  return replicas, jax.random.split(rng, count)


def _split(tree: PyTree, n: int) -> PyTree:
  """[B, ...] -> [n, B / n, ...]; each part takes rows from every shard."""

  def split(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)

  return jax.tree.map(split, tree)


def _join(tree: PyTree) -> PyTree:
  """The inverse of `_split`."""

  def join(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(join, tree)


def _add(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, a, b)
