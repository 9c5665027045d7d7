"""Turn trained run folders into one model folder that can be shared.

  unclip convert --from runs --src runs/emoji --out runs/emoji/model
  unclip convert --from lora --src runs/lora --out models/mine/decoder

SRC holds a run folder for each part: clip, prior, decoder, upsampler_SIZE; no
prior where the decoder was trained on text embeddings. With `--from lora` SRC
is one run of adapters (configs/lora.py), and OUT the part of a model that they
make of the one that they adapt. `--from runs` takes such runs too.
`--fit_variance prior` adds what Analytic-DPM, the paper's sampler of the prior,
must know.
"""

from __future__ import annotations

import os

from absl import flags

from unclip_jax import inference, pipelines
from unclip_jax.utils import errors, programs

FROM = flags.DEFINE_enum("from", "runs", ["runs", "lora"], "What SRC holds.")
SRC = flags.DEFINE_string("src", None, "Folder to read.", required=True)
OUT = flags.DEFINE_string("out", None, "Model folder to write.", required=True)
FIT_VARIANCE = flags.DEFINE_multi_string(
  "fit_variance",
  [],
  "A part whose ddpm sampler gets the analytic variance, estimated from its "
  "training data; may be repeated.",
)


def run_folders(src: str) -> dict[str, str]:
  """The parts in the order of the pipeline: name -> run folder.

  Raises:
    UserError: SRC lacks a part that every model has.
  """
  if not os.path.isdir(src):
    raise errors.UserError(f"there is no folder '{src}'")
  found = sorted(
    name
    for name in os.listdir(src)
    if os.path.exists(os.path.join(src, name, "config.json"))
  )
  upsamplers = sorted(
    (name for name in found if name.startswith("upsampler_")),
    key=lambda name: int(name.rpartition("_")[2]),
  )
  missing = [name for name in ("clip", "decoder") if name not in found]
  if missing:
    raise errors.UserError(
      f"'{src}' lacks the run folder '{missing[0]}': train it with --workdir "
      f"{os.path.join(src, missing[0])}"
    )
  names = [x for x in ("clip", "prior", "decoder") if x in found]
  return {name: os.path.join(src, name) for name in [*names, *upsamplers]}


def main() -> None:
  if FROM.value == "lora":
    pipelines.save_part(inference.load(SRC.value), OUT.value)
    print(f"the part is in {OUT.value}")
    return
  pipe = pipelines.UnCLIPPipeline.from_parts(run_folders(SRC.value))
  for name in FIT_VARIANCE.value:
    pipe.fit_variance(name)
  pipe.save_pretrained(OUT.value)
  print(f"the model is in {OUT.value}")


if __name__ == "__main__":
  programs.run(main)
