"""Karlo's step rule: our ddpm against diffusers' UnCLIPScheduler."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_unclip  # noqa: E402

from tests.interop import torch_karlo  # noqa: E402
from unclip_jax.diffusion import gaussian, samplers, schedules  # noqa: E402

_KINDS = {
  "prior_scheduler": ("x_start", "fixed_small", 5.0),
  "decoder_scheduler": ("eps", "learned_range", 1.0),
  "super_res_scheduler": ("eps", "fixed_small", 1.0),
}
_RNG = np.random.default_rng(0)


def _normal(*shape: int) -> np.ndarray:
  return _RNG.standard_normal(shape).astype(np.float32)


def _scheduler(name: str, is_exact: bool) -> scheduling_unclip.UnCLIPScheduler:
  scheduler = torch_karlo.schedulers()[name]
  if is_exact:
    torch_karlo.make_exact(scheduler)
  return scheduler


def _fake_noise(monkeypatch, values) -> None:
  values = iter(values)
  monkeypatch.setattr(
    scheduling_unclip,
    "randn_tensor",
    lambda shape, **_: torch.tensor(next(values)),
  )


@pytest.mark.parametrize("is_exact, atol", [(True, 2e-6), (False, 1e-3)])
@pytest.mark.parametrize("num_steps", [1000, 50, 7])
@pytest.mark.parametrize("name", _KINDS)
def test_every_step_is_theirs(name, num_steps, is_exact, atol, monkeypatch):
  prediction, variance, clip = _KINDS[name]
  theirs = _scheduler(name, is_exact)
  theirs.set_timesteps(num_steps)
  ours = schedules.make_schedule("cosine").respace(num_steps)
  timesteps = theirs.timesteps.numpy()
  np.testing.assert_array_equal(timesteps, ours.timestep_map[::-1])

  outputs = 2 if variance == "learned_range" else 1
  model_output = _normal(num_steps, 1, outputs * 3, 2, 2)
  x_t, noise = _normal(num_steps, 1, 3, 2, 2), _normal(num_steps, 1, 3, 2, 2)
  _fake_noise(monkeypatch, noise)
  expected = [
    theirs.step(
      torch.tensor(model_output[i]),
      int(t),
      torch.tensor(x_t[i]),
      prev_timestep=int(timesteps[i + 1]) if i + 1 < num_steps else None,
    ).prev_sample.numpy()
    for i, t in enumerate(timesteps)
  ]
  indices = jnp.arange(num_steps)[::-1]
  last = [x[:, 0].transpose(0, 2, 3, 1) for x in (model_output, x_t, noise)]
  mean, log_variance, _ = gaussian.p_mean_variance(
    ours,
    last[0],
    last[1],
    indices,
    prediction=prediction,
    variance=variance,
    clip_x_start=clip,
  )
  is_noised = (indices > 0)[:, None, None, None]
  stepped = mean + is_noised * jnp.exp(log_variance / 2) * last[2]
  expected = np.stack(expected)[:, 0].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(stepped, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", _KINDS)
def test_a_whole_run_is_theirs(name, monkeypatch):
  prediction, variance, clip = _KINDS[name]
  theirs = _scheduler(name, is_exact=True)
  theirs.set_timesteps(25)
  outputs = 2 if variance == "learned_range" else 1
  weight = _normal(6, outputs * 6)

  def network(x, t):
    return x @ weight / 3 + t / 1000

  noise = _normal(26, 2, 6)
  _fake_noise(monkeypatch, noise[1:])
  x = torch.tensor(noise[0])
  timesteps = theirs.timesteps.tolist()
  for t, t_next in zip(timesteps, [*timesteps[1:], None]):
    output = torch.tensor(network(x.numpy(), t).astype(np.float32))
    x = theirs.step(output, t, x, prev_timestep=t_next).prev_sample
  ours = samplers.ddpm(
    lambda x, t: network(x, t[:, None]),
    schedules.make_schedule("cosine"),
    jnp.asarray(noise[0]),
    None,
    num_steps=25,
    prediction=prediction,
    variance=variance,
    clip_x_start=clip,
    noise=jnp.asarray(noise[1:]),
  )
  np.testing.assert_allclose(ours, x.numpy(), atol=1e-5)
