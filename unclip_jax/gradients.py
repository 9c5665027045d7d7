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
that the loss itself uses belong to no replica, and are not perturbed.

Every example has a key of its own, with which it draws alike wherever it is
seen: the three ways give the same gradient, up to rounding (but for dropout,
which takes one key for the examples that are seen together). Under `jax.pmap`,
with `axis_name`, a device sees its own rows; a coupled loss sees the outputs of
all, and what the devices find is averaged.

With SAM a replica is a microbatch of its own: a device goes through its
replicas one after another, with one perturbed copy of the parameters and one
gradient beside the sum of gradients. On a mesh `jax.shard_map` sees to it that
every device has its own replicas: the compiler would gather the rows, since it
cannot split convolutions whose kernels differ by row. For a coupled loss a
replica is encoded five times and differentiated three times, since its
perturbation is made anew where it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from unclip_jax import optim, partitioning
from unclip_jax.tasks import base as tasks_base
from unclip_jax.utils import axes, trees

PyTree = Any
Metrics = dict[str, jax.Array]


class Gradients(NamedTuple):
  """What one batch gives."""

  grads: PyTree  # as the parameters
  model_state: PyTree
  metrics: Metrics  # name -> []


class _Devices(NamedTuple):
  """Each of which goes through replicas of its own."""

  mesh: Mesh
  specs: PyTree  # of the parameters: a P for each


class _Fixed(NamedTuple):
  """What a loss needs besides parameters, rows and keys."""

  model_state: PyTree
  frozen: tasks_base.Frozen
  step: jax.Array


# (params, model_state, frozen, batch, rngs, step) -> Gradients; rngs: one key
# per example, [B].
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
  mesh: Mesh | None = None,
  sharding: partitioning.Rules = (("", "replicate"),),
  axis_name: str | None = None,
) -> GradientFn:
  """The pure function from parameters and a batch to `Gradients`.

  With SAM the metrics and the model state are those at the parameters
  themselves, averaged over the replicas, and `perturbed_loss` is the loss at
  the perturbed ones.

  Args:
    task: a `CoupledTask` if it says `batch_coupled`.
    num_microbatches: parts of the batch that are seen one after another; of no
      effect with SAM.
    sam: None = off.
    mesh: gives SAM's replicas to its devices, if it divides them; else each
      replica lies where its rows are.
    sharding: of the parameters on that mesh, by which the sum of what the
      devices find is scattered.
    axis_name: of the devices under `jax.pmap`; None: there is one program for
      all devices.
  """

  def gradients(
    params: PyTree,
    model_state: PyTree,
    frozen: tasks_base.Frozen,
    batch: tasks_base.Batch,
    rngs: jax.Array,
    step: jax.Array,
  ) -> Gradients:
    def loss(
      params: PyTree, fixed: _Fixed, part: PyTree
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
      if task.batch_coupled and axis_name is not None:
        return coupled_loss(params, encode(params, fixed, part))
      model_state, frozen, step = fixed
      variables = {"params": params, **model_state}
      return _mean(task.loss(variables, frozen, *part, step=step, train=True))

    def encode(params: PyTree, fixed: _Fixed, part: PyTree) -> PyTree:
      model_state, frozen, _ = fixed
      variables = {"params": params, **model_state}
      return task.encode(variables, frozen, *part, train=True)

    def coupled_loss(
      params: PyTree, outputs: PyTree
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
      # The gradient of a device's outputs is the sum of what all devices make
      # of them: each of n makes the whole loss, and the average divides by n.
      if axis_name is not None:
        outputs = jax.lax.all_gather(outputs, axis_name, tiled=True)
      variables = {"params": params, **model_state}
      return _mean(task.coupled_loss(variables, frozen, outputs))

    fixed = _Fixed(model_state, frozen, step)
    if sam is not None:
      replicas = _replicas((batch, rngs), sam.replica_batch)
      devices = _divided_by(mesh, sharding, params, replicas[1].shape[0])
      if task.batch_coupled:
        return _cached_sam(
          encode, coupled_loss, sam, params, fixed, replicas, devices
        )
      return _sam(loss, sam, params, fixed, replicas, devices)
    if num_microbatches == 1:
      return _at_once(loss, params, fixed, (batch, rngs))
    parts = _split((batch, rngs), num_microbatches)
    if task.batch_coupled:
      return _cached(
        encode,
        lambda params, outputs: coupled_loss(params, _join(outputs)),
        params,
        fixed,
        parts,
      )
    return _accumulate(
      lambda model_state, part: _at_once(
        loss, params, _Fixed(model_state, frozen, step), part
      ),
      model_state,
      parts,
    )

  if axis_name is None:
    return gradients
  return lambda *args: _averaged(gradients(*args), axis_name)


def _averaged(tree: PyTree, axis_name: str) -> PyTree:
  """The mean over devices; what is counted in integers is alike on all."""

  def mean(x: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.pmean(x, axis_name) if is_float else x

  return jax.tree.map(mean, tree)


def _mean(
  output: tasks_base.LossOutput,
) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
  """Averages over the examples: the loss, and what comes with it."""
  metrics = jax.tree.map(jnp.mean, {**output.metrics, "loss": output.loss})
  return jnp.mean(output.loss), (output.model_state, metrics)


def _at_once(
  loss: Callable[..., tuple[jax.Array, tuple[PyTree, Metrics]]],
  params: PyTree,
  fixed: _Fixed,
  part: PyTree,
) -> Gradients:
  grads, aux = jax.grad(loss, has_aux=True)(params, fixed, part)
  return Gradients(grads, *aux)


def _accumulate(
  gradients_of: Callable[[PyTree, PyTree], Gradients],
  model_state: PyTree,
  parts: tuple[PyTree, jax.Array],
) -> Gradients:
  """Mean gradients and metrics over the leading axis of `parts`.

  Args:
    gradients_of: of (model_state, part); the model state goes from one part
      to the next.
  """
  n = parts[1].shape[0]

  def body(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
    model_state, sums = carry
    grads, model_state, metrics = gradients_of(model_state, part)
    return (model_state, jax.tree.map(jnp.add, sums, (grads, metrics))), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradients_of, model_state, first)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (shapes.grads, shapes.metrics)
  )
  (model_state, sums), _ = jax.lax.scan(body, (model_state, zeros), parts)
  grads, metrics = jax.tree.map(lambda x: x / n, sums)
  return Gradients(grads, model_state, metrics)


def _cached(
  encode: Callable[[PyTree, PyTree, PyTree], PyTree],
  loss: Callable[[PyTree, PyTree], tuple[jax.Array, tuple[PyTree, Metrics]]],
  params: PyTree,
  fixed: PyTree,
  parts: PyTree,
  devices: _Devices | None = None,
) -> Gradients:
  """Gradient of `loss(params, stacked encode(params, fixed, part))`.

  GradCache; the numbers are those of the module's docstring.

  Args:
    encode: outputs of one part; must draw alike each time.
    loss: of the outputs of all parts, stacked on a leading axis [n].
    fixed: arrays that `encode` needs and that have no gradient.
    parts: leading axis [n].
    devices: as in `_stacked`.
  """
  # 1.
  outputs = _stacked(encode, params, fixed, parts, devices)
  # 2.
  (grads, cotangents), aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(
    params, outputs
  )

  # 3.
  def through(params: PyTree, fixed: PyTree, part: PyTree) -> PyTree:
    part, cotangents = part
    _, vjp = jax.vjp(lambda params: encode(params, fixed, part), params)
    return vjp(cotangents)[0]

  sums = _summed(
    through,
    params,
    fixed,
    (parts, cotangents),
    devices,
    devices and devices.specs,
  )
  return Gradients(_add(grads, sums), *aux)


def _sam(
  loss: Callable[..., tuple[jax.Array, tuple[PyTree, Metrics]]],
  sam: optim.Sam,
  params: PyTree,
  fixed: _Fixed,
  replicas: tuple[PyTree, jax.Array],
  devices: _Devices | None,
) -> Gradients:
  """Mean over replicas [R, rows, ...] of the gradients at w + e_r."""

  def of_replica(params: PyTree, fixed: _Fixed, replica: PyTree) -> Gradients:
    plain = _at_once(loss, params, fixed, replica)
    perturbed = _add(params, sam.perturbation(plain.grads, fixed.step))
    sharp = _at_once(loss, perturbed, fixed, replica)
    return _with_perturbed_loss(plain, sharp)

  R = replicas[1].shape[0]
  specs = devices and Gradients(devices.specs, P(), P())
  sums = _summed(of_replica, params, fixed, replicas, devices, specs)
  return jax.tree.map(lambda x: x / R, sums)


def _cached_sam(
  encode: Callable[[PyTree, PyTree, PyTree], PyTree],
  loss: Callable[[PyTree, PyTree], tuple[jax.Array, tuple[PyTree, Metrics]]],
  sam: optim.Sam,
  params: PyTree,
  fixed: _Fixed,
  replicas: tuple[PyTree, jax.Array],
  devices: _Devices | None,
) -> Gradients:
  """The same for a coupled loss: cached gradients, replica by replica."""

  def loss_of_all(
    params: PyTree, outputs: PyTree
  ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    # [R, rows, ...] -> [B, ...]
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return loss(params, outputs)

  def perturbed_encode(moving: PyTree, around: PyTree, part: PyTree) -> PyTree:
    params, fixed = around
    replica, cotangents = part
    _, vjp = jax.vjp(lambda params: encode(params, fixed, replica), params)
    moved = _add(moving, sam.perturbation(*vjp(cotangents), fixed.step))
    return encode(moved, fixed, replica)

  outputs = _stacked(encode, params, fixed, replicas, devices)
  (grads, cotangents), aux = jax.grad(
    loss_of_all, argnums=(0, 1), has_aux=True
  )(params, outputs)
  sharp = _cached(
    perturbed_encode,
    loss_of_all,
    params,
    (params, fixed),
    (replicas, cotangents),
    devices,
  )
  return _with_perturbed_loss(Gradients(grads, *aux), sharp)


def _with_perturbed_loss(plain: Gradients, sharp: Gradients) -> Gradients:
  """The gradients at w + e with the metrics and the model state at w."""
  perturbed_loss = sharp.metrics["loss"]
  return Gradients(
    sharp.grads,
    plain.model_state,
    {**plain.metrics, "perturbed_loss": perturbed_loss},
  )


def _replicas(tree: PyTree, rows: int) -> PyTree:
  """[B, ...] -> [B / rows, rows, ...], neighbours together."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // rows, rows, *x.shape[1:]), tree
  )


def _divided_by(
  mesh: Mesh | None, sharding: partitioning.Rules, params: PyTree, count: int
) -> _Devices | None:
  """The mesh, if each of its batch shards gets as many of `count` replicas."""
  if mesh is None or count % partitioning.num_batch_shards(mesh):
    return None
  shapes = {name: x.shape for name, x in trees.flatten(params).items()}
  specs = partitioning.param_specs(shapes, sharding, mesh)
  return _Devices(
    mesh,
    jax.tree_util.tree_map_with_path(
      lambda path, _: specs[".".join(trees.path_names(path))], params
    ),
  )


def _stacked(
  f: Callable[[PyTree, PyTree, PyTree], PyTree],
  params: PyTree,
  fixed: PyTree,
  parts: PyTree,
  devices: _Devices | None,
) -> PyTree:
  """f(params, fixed, part) of all parts [n, ...], one after another: [n, ...].

  With devices, each does this to its own parts. `f` may close over no array:
  inside and outside `jax.shard_map` arrays are of different kinds.
  """

  def own(params: PyTree, fixed: PyTree, parts: PyTree) -> PyTree:
    return jax.lax.map(functools.partial(f, params, fixed), parts)

  if devices is not None:
    own = _by_devices(own, devices.mesh, P(partitioning.BATCH_AXES))
  return own(params, fixed, parts)


def _summed(
  f: Callable[[PyTree, PyTree, PyTree], PyTree],
  params: PyTree,
  fixed: PyTree,
  parts: PyTree,
  devices: _Devices | None,
  specs: PyTree | None,
) -> PyTree:
  """The sum of what `_stacked` would give, without ever stacking it.

  Args:
    specs: with devices, a prefix of the sum's tree: how it lies on the mesh, of
      which the axes of the batch are heeded.
  """

  def own(params: PyTree, fixed: PyTree, parts: PyTree) -> PyTree:
    of_part = functools.partial(f, params, fixed)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first)
    )
    sums, _ = jax.lax.scan(
      lambda sums, part: (_add(sums, of_part(part)), None), zeros, parts
    )
    return sums

  if devices is None:
    return own(params, fixed, parts)
  specs = jax.tree.map(_of_batch, specs)

  def scattered(*args: PyTree) -> PyTree:
    sums = own(*args)
    return jax.tree.map(_scatter, sums, jax.tree.broadcast(specs, sums))

  return _by_devices(scattered, devices.mesh, specs)(params, fixed, parts)


def _of_batch(spec: P) -> P:
  """What a spec says of the axes that the batch is split over."""
  entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
  kept = [
    tuple(name for name in entry if name in partitioning.BATCH_AXES)
    for entry in entries
  ]
  return P(*(names or None for names in kept))


def _scatter(x: jax.Array, spec: P) -> jax.Array:
  """A device's part of the sum over all devices."""
  left = partitioning.BATCH_AXES
  for dimension, names in enumerate(spec):
    if names is not None:
      x = jax.lax.psum_scatter(
        x, names, scatter_dimension=dimension, tiled=True
      )
      left = tuple(name for name in left if name not in names)
  return jax.lax.psum(x, left)


def _by_devices(
  own: Callable[[PyTree, PyTree, PyTree], PyTree],
  mesh: Mesh,
  out_specs: PyTree,
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
  """own(params, fixed, parts) by each device, of the parts that it has.

  The arrays of a device lie nowhere on the mesh.
  """

  def traced(*args: PyTree) -> PyTree:
    with axes.use(None, {}):
      return own(*args)

  return jax.shard_map(
    traced,
    mesh=mesh,
    in_specs=(P(), P(), P(partitioning.BATCH_AXES)),
    out_specs=out_specs,
    check_vma=False,
  )


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
