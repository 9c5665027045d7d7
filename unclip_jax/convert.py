r"""Turn run folders or public weights into models of ours, and back.

  unclip convert --from runs --src runs/emoji --out runs/emoji/model
  unclip convert --from lora --src runs/lora --out models/mine/decoder
  unclip convert --from karlo --src DIR --out models/karlo --image_encoder DIR
  unclip convert --from clip-hf --src DIR --out models/clip
  unclip convert --from clip-openai --src ViT-L-14.pt --out models/clip
  unclip convert --from open-clip --src DIR --out models/clip
  unclip convert --from inception --src weights.pth --out models/inception
  unclip convert --from bert-hf --src DIR --out models/bert
  unclip convert --from word-vectors --src glove.txt --out models/vectors \
    --tokenizer runs/emoji/clip/assets
  unclip convert --to hf --src runs/emoji/clip --out DIR
  unclip convert --to bert-hf --src models/bert --out DIR
  unclip convert --to diffusers --src models/karlo --out DIR

runs: SRC holds a run folder for each part: clip, prior, decoder,
upsampler_SIZE; no prior where the decoder was trained on text embeddings. Of
the systems of configs/baselines SRC is the run that draws, or holds it as
`generator`, with upsampler_SIZE and a clip that ranks candidates where wanted;
or it is, or holds as `captioner`, the run that writes captions.
`--fit_variance prior` adds what Analytic-DPM, the paper's sampler of the prior,
must know. lora: SRC is one run of adapters (configs/lora.py), and OUT the part
of a model that they make of the one that they adapt; `--from runs` takes such
runs too. word-vectors: a text file of GloVe's or word2vec's form; OUT is what
`--config.init_from.path` of configs/baselines/cvae.py takes. karlo: the folder
of diffusers, or that of the original files. The others are described in
unclip_jax/interop/. A converted CLIP is what `--config.frozen.clip.path` takes,
a converted Inception what `unclip evaluate --inception` does. Nothing is
downloaded, and nothing that is in a file is run.
"""

from __future__ import annotations

import os

from absl import flags

from unclip_jax import inference, pipelines, stages
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, programs

# Modules with a `convert_in`, and with a `convert_out`; imported when asked
# for.
_READERS = {
  "karlo": "unclip_jax.interop.karlo",
  "clip-hf": "unclip_jax.interop.clip_hf",
  "clip-openai": "unclip_jax.interop.clip_openai",
  "open-clip": "unclip_jax.interop.open_clip",
  "inception": "unclip_jax.interop.inception",
  "bert-hf": "unclip_jax.interop.bert_hf",
}
_WRITERS = {
  "diffusers": "unclip_jax.interop.karlo",
  "hf": "unclip_jax.interop.clip_hf",
  "bert-hf": "unclip_jax.interop.bert_hf",
}

FROM = flags.DEFINE_enum(
  "from",
  None,
  ["runs", "lora", "word-vectors", *_READERS],
  "What SRC holds; default: runs.",
)
TO = flags.DEFINE_enum(
  "to", None, list(_WRITERS), "The way back: what OUT is to hold; SRC is ours."
)
SRC = flags.DEFINE_string("src", None, "Folder or file to read.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder",
  None,
  "Of karlo: folder of the vision tower (CLIPVisionModelWithProjection).",
)
TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "Of word-vectors: the tokenizer whose tokens get them, such as the assets"
  " folder of a run.",
)
VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size",
  None,
  "Of word-vectors: config.model.vocab_size, where it is more than the "
  "tokenizer's tokens.",
  1,
)
FIT_VARIANCE = flags.DEFINE_multi_string(
  "fit_variance",
  [],
  "Of runs: a part whose ddpm sampler gets the analytic variance, estimated "
  "from its training data; may be repeated.",
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
  missing = [name for name in ("clip", "decoder") if name not in found]
  if missing:
    raise errors.UserError(
      f"'{src}' lacks the run folder '{missing[0]}': train it with --workdir "
      f"{os.path.join(src, missing[0])}"
    )
  names = [x for x in ("clip", "prior", "decoder") if x in found]
  folders = {name: os.path.join(src, name) for name in names}
  return folders | stages.upsampler_folders(src)


def main() -> None:
  src, out = SRC.value, OUT.value
  if TO.value and FROM.value:
    raise errors.UserError("give --from or --to, not both: --to reads ours")
  if IMAGE_ENCODER.value and FROM.value != "karlo":
    raise errors.UserError("--image_encoder goes with --from karlo")
  if FIT_VARIANCE.value and (TO.value or FROM.value not in (None, "runs")):
    raise errors.UserError("--fit_variance goes with --from runs")
  if FIT_VARIANCE.value and stages.standalone_run(src):
    raise errors.UserError(
      "--fit_variance is for models with a CLIP and a prior"
    )
  if bool(TOKENIZER.value) != (FROM.value == "word-vectors"):
    raise errors.UserError(
      "--tokenizer goes with --from word-vectors, and is needed there"
    )
  if VOCAB_SIZE.value and not TOKENIZER.value:
    raise errors.UserError("--vocab_size goes with --from word-vectors")
  if os.path.realpath(src) == os.path.realpath(out):
    raise errors.UserError("SRC and OUT are one folder: write to another")
  if TO.value:
    config_lib.import_module(_WRITERS[TO.value]).convert_out(src, out)
  elif FROM.value == "karlo":
    karlo = config_lib.import_module(_READERS[FROM.value])
    names = karlo.convert_in(src, out, image_encoder=IMAGE_ENCODER.value)
    stages.write_index(out, names)
  elif FROM.value == "word-vectors":
    module = config_lib.import_module("unclip_jax.interop.word_vectors")
    module.convert_in(
      src, out, tokenizer=TOKENIZER.value, vocab_size=VOCAB_SIZE.value
    )
  elif FROM.value in _READERS:
    config_lib.import_module(_READERS[FROM.value]).convert_in(src, out)
  elif FROM.value == "lora":
    stages.save_part(inference.load(src), out)
  elif stages.standalone_run(src):
    pipelines.load_runs(src).save_pretrained(out)
  else:
    pipe = pipelines.UnCLIPPipeline.from_parts(run_folders(src))
    for name in FIT_VARIANCE.value:
      pipe.fit_variance(name)
    pipe.save_pretrained(out)
  print(f"the model is in {out}")


if __name__ == "__main__":
  programs.run(main)
