"""What every config starts from: the trainer's fields with their defaults."""

from __future__ import annotations

import ml_collections

# Where the parameters of all networks lie (unclip_jax/partitioning.py). Over
# `tensor` the first layer of a pair is split by its outputs and the second by
# its inputs, so that one sum a pair is communicated (Shoeybi et al. 2019, arXiv
# 1909.08053, section 3).
SHARDING = (
  (
    r"\.(query|key|value|context_key|context_value|dense_1)\.kernel$",
    ("fsdp", "tensor"),
  ),
  (
    r"\.(query|key|value|context_key|context_value|dense_1)\.bias$",
    ("tensor",),
  ),
  (r"(attn\.out|\.dense_2)\.kernel$", (("tensor", "fsdp"),)),
  (r"\.conv_1\.kernel$", (None, None, "fsdp", "tensor")),
  (r"\.conv_1\.bias$", ("tensor",)),
  (r"\.conv_2\.kernel$", (None, None, "tensor", "fsdp")),
  # Too small to be worth a collective of their own.
  (r"(^|\.)(bias|scale)$", "replicate"),
  (r".*", "fsdp"),
)


def base() -> ml_collections.ConfigDict:
  """The fields that trainer.py and its parts read; a config changes lines."""
  config = ml_collections.ConfigDict()
  config.name = "run"  # shown beside the progress bar
  config.seed = 0
  config.num_steps = 10_000
  config.batch_size = 256  # of all devices together
  config.num_microbatches = 1  # parts of a batch whose gradients are averaged
  config.ema_decay = 0.9999
  config.max_nonfinite_updates = 100  # more of them stop the run
  config.step_timeout = 0  # seconds until a stuck step ends the run; 0 = never

  config.log_every_steps = 50
  config.eval_every_steps = 1000
  config.eval_batch_size = 64
  config.prepare_examples = 4096  # for tables computed once from data
  # Beside the newest the best step is kept, by a metric such as
  # "eval/loss/loss"; see unclip_jax/best.py.
  config.checkpoint = dict(
    every_steps=1000, keep=2, best=dict(metric="", mode="min", patience=0)
  )

  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.parallel = "jit"  # or "pmap": a replica on each device
  config.sharding = SHARDING
  config.optimizer_sharding = None  # rules of its own, or as the parameters
  config.axis_rules = dict(  # of activations (unclip_jax/utils/axes.py)
    batch=("data", "fsdp"), heads="tensor", mlp="tensor", channels="tensor"
  )

  config.optim = dict(
    name="adamw",
    learning_rate=1e-4,
    schedule="cosine",
    warmup_steps=100,
    end_factor=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    rules=(),
  )
  # A trained model to start with (unclip_jax/init_from.py); "" = from scratch
  config.init_from = dict(path="", names=".*")
  config.frozen = ml_collections.ConfigDict()
  config.evals = ml_collections.ConfigDict()
  return config


def size(arg: ml_collections.ConfigDict) -> str | None:
  """The argument that asks another config for the same size."""
  return "smoke" if arg.smoke else "quick" if arg.quick else None


def diffusion_evals(parts: tuple[str, ...]) -> ml_collections.ConfigDict:
  """Held-out loss, and a grid of drawn pictures with the given columns."""
  return ml_collections.ConfigDict(
    dict(
      loss=dict(
        type="unclip_jax.evaluators.mean", pred="loss", max_examples=256
      ),
      samples=dict(
        type="unclip_jax.evaluators.sample_grid",
        pred="sample",
        split="train",
        max_examples=16,
        batch_size=16,
        parts=parts,
      ),
    )
  )


def evaluate_on(config: ml_collections.ConfigDict, split: str) -> None:
  """Lets every evaluator see one split."""
  for name in config.evals:
    config.evals[name].split = split


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Two steps on synthetic data; everything that a run does is done once."""
  config.num_steps = 2
  config.batch_size = 8
  config.eval_batch_size = 8
  config.prepare_examples = 16
  config.log_every_steps = 1
  config.eval_every_steps = 2
  config.checkpoint.every_steps = 1
  config.optim.warmup_steps = 1
  for name in config.evals:
    config.evals[name].max_examples = 8
    config.evals[name].batch_size = 8
  return config
