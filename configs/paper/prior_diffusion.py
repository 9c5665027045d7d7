"""The paper's diffusion prior, 1.3 billion parameters.

  unclip train --config configs/paper/prior_diffusion.py \
    --workdir runs/paper/prior --config.frozen.clip.path=runs/paper/clip

Quoted are the rows of Table 3 (Ramesh et al. 2022), column "Diffusion prior".
Their "Model size 1B" is 1,225,927,680 in Karlo's layout, where a CLIP's text
states come in; here, as in the paper, the transformer encodes the caption's
tokens itself. Emoji stand in for the data: configs/paper/data.py.

On many devices: `--config.mesh.fsdp=8`. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip
from configs.paper import data, stage
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = stage.base()
  config.name = "prior"
  config.data = data.pairs(
    smoke=arg.smoke, image_size=64, clip_image_size=32 if arg.smoke else 256
  )
  config.frozen.clip = stage.clip()

  config.task_name = "unclip_jax.tasks.prior_diffusion"
  config.task = dict(
    process=dict(
      num_timesteps=1000,  # "Diffusion steps"
      schedule="cosine",  # "Noise schedule"
      prediction="x_start",  # section 2.2, eq. 2
      # "Sampling variance" analytic; estimated after the training by
      # `unclip convert --fit_variance prior`.
      variance="analytic",
    ),
    embedding_space="scaled",  # by 17.2, Appendix C
    text_drop_prob=0.1,  # section 2.2
    sample_options=dict(
      sampler="ddpm",
      num_sample_steps=64,  # "Sampling steps"
      guidance_scale=1.0,  # "guiding the prior hurt results", section 5.5
      num_candidates=2,  # section 2.2
    ),
  )
  config.model_name = "unclip_jax.models.prior"
  config.model = dict(
    embed_dim=1024,  # section 2.2
    text_width=None,
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,  # "Text enc. context" 256
    width=2048,  # "Text enc. width"
    depth=24,  # "Text enc. depth"
    num_heads=32,  # "Text enc. heads"
    dropout=0.0,  # "Dropout" -
    remat="full",
    scan=True,
    dtype="bfloat16",
  )

  config.num_steps = 600_000  # "Iterations" 600K
  config.batch_size = 4096  # "Batch size"
  config.ema_decay = 0.9999  # "EMA decay"
  config.optim.learning_rate = 1.1e-4  # "Learning rate"
  config.optim.weight_decay = 6.0e-2  # "Weight decay"
  config.optim.b2 = 0.96  # "Adam b2"
  config.optim.eps = 1e-6  # "Adam eps"

  report = dict(
    type="unclip_jax.evaluators.prior_report", pred="sample", max_examples=256
  )
  config.evals = dict(
    loss=dict(type="unclip_jax.evaluators.mean", pred="loss", max_examples=256),
    report=report,
    report_train=dict(report, split="train"),
  )

  if arg.smoke:
    upstream = clip.get_config("smoke")
    config.model.embed_dim = upstream.model.embed_dim
    config.model.vocab_size = 1024
    config.model.context_length = config.data.preprocess.context_length
    config.model.width = 16
    config.model.depth = 1
    config.model.num_heads = 2
    config.task.sample_options.num_sample_steps = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
