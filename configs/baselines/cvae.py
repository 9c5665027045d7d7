"""A conditional VAE with a recurrent text encoder on emoji, in four stages.

Kingma & Welling 2014; Sohn et al. 2015 (unclip_jax/models/cvae.py, and
unclip_jax/tasks/cvae.py for what each stage learns). Each stage starts with the
one before it, of which the last has everything:

  text     the text encoder alone, on the captions
  image    image encoder and decoder alone, on the pictures
  joint    everything, on pictures with captions
  decoder  the decoder alone: what it is given no longer changes

  for stage in text image joint decoder; do
    unclip train --config configs/baselines/cvae.py:stage=$stage \
      --workdir runs/baselines/cvae_$stage
  done

`joint` can start from nothing too: --config.init_from.path="". With
`:cell=gru` in all four stages the text encoder is a GRU. Word vectors of a
GloVe or word2vec file, converted by unclip_jax/interop/word_vectors.py, are
what `stage=text` starts with: --config.init_from.path=models/word_vectors.

`:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

# Stage -> objective, steps, what is frozen, and the stage that it starts with.
_STAGES = {
  "text": ("text", 1500, r"^(?!text_encoder|text_output)", None),
  "image": ("image", 4000, r"^(text_|prior_net)", "text"),
  "joint": ("elbo", 6000, r"^text_output", "image"),
  "decoder": ("elbo", 2000, r"^(?!decoder)", "joint"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, stage="joint", cell="lstm", smoke=False)
  if arg.stage not in _STAGES:
    raise errors.UserError(
      f"stage={arg.stage} is not one of {', '.join(_STAGES)}: choose one"
    )
  objective, num_steps, frozen, before = _STAGES[arg.stage]
  config = common.base()
  config.name = "cvae"
  config.data = data.emoji(
    quick=False, smoke=arg.smoke, image_size=32, random_flip=True
  )

  config.task_name = "unclip_jax.tasks.cvae"
  config.task = dict(
    objective=objective,
    kl_weight=1.0,
    kl_warmup_steps=1000 if arg.stage in ("image", "joint") else 0,
    free_bits=0.05,  # of each of the latent dimensions
    sample_options=dict(temperature=0.8) if objective != "text" else dict(),
  )
  config.model_name = "unclip_jax.models.cvae"
  config.model = dict(
    image_size=32,
    latent_dim=64,
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    word_width=100,  # as the smaller of GloVe's
    text_width=256,
    cell=arg.cell,
    channels=48,
    channel_mult=(1, 2, 4),  # 32 -> 16 -> 8 -> 4 px
    text_prior=True,
    init_stddev=0.5,
  )

  config.num_steps = num_steps
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 1e-3 if objective == "text" else 5e-4
  config.optim.rules = ((frozen, "freeze"),)
  if before is None:
    # Nothing, or converted word vectors.
    config.init_from.names = r"^params\.text_encoder\.token_embed\."
  else:
    config.init_from.path = f"runs/baselines/cvae_{before}"

  config.evals = common.diffusion_evals(("true", "drawn"))
  if objective == "text":
    del config.evals.samples
  else:
    config.evals.reconstructions = dict(
      config.evals.samples, pred="reconstruct", split="validation"
    )

  if arg.smoke:
    config.model.latent_dim = 8
    config.model.word_width = 8
    config.model.text_width = 16
    config.model.channels = 16
    config.model.channel_mult = (1, 2)
    config.init_from.path = ""
    common.smoke(config)
  return config
