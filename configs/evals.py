"""What can be measured on a trained stage, beyond what its own config asks.

  unclip evaluate --run runs/emoji/decoder --out report.json \
    --config configs/evals.py:of=decoder,inception=models/inception

  of          prior, decoder or upsampler
  inception   folder of a converted Inception, for the FID and its like
  clip        folder of a CLIP, for the CLIP score and the CMMD; another one
              than the decoder stands on
  reference   .npz file with mu and sigma, which the FID is taken to
  split, examples, batch_size   of the data

The same entries may stand in the `evals` of any config, and are then run while
it trains. No numbers to expect: they depend on data and weights that do not
come with the package.
"""

from __future__ import annotations

import ml_collections

from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(
    arg,
    of="decoder",
    inception="",
    clip="",
    reference="",
    split="validation",
    examples=1000,
    batch_size=50,
  )
  if arg.of not in ("prior", "decoder", "upsampler"):
    raise errors.UserError(
      f"of={arg.of} is not prior, decoder or upsampler: choose one of them"
    )
  shared = dict(
    split=arg.split, max_examples=arg.examples, batch_size=arg.batch_size
  )

  def entry(name: str, pred: str = "sample", **fields: str) -> dict:
    module = f"unclip_jax.evaluators.{name}"
    return dict(type=module, pred=pred, **shared, **fields)

  evals = {"vlb": entry("vlb", "vlb")}
  if arg.of == "prior":
    evals["report"] = entry("prior_report")
  if arg.of == "upsampler":
    evals["psnr_ssim"] = entry("psnr_ssim")
  if arg.inception and arg.of != "prior":
    given = {"reference": arg.reference} if arg.reference else {}
    evals["fid"] = entry("fid", features=arg.inception, **given)
  if arg.clip and arg.of == "decoder":
    evals["clip_score"] = entry("clip_score", features=arg.clip)
  return ml_collections.ConfigDict({"evals": evals})
