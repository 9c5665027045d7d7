#!/usr/bin/env bash
# Every manipulation of `unclip edit`, on three emoji.
#
#   launch/manipulations.sh [MODEL [OUT]]
#
# In the environment of `make venv` (`. .venv/bin/activate`). MODEL is a model
# folder, by default that of `make quickstart`; OUT gets a sheet for each verb:
# what was given, then what was drawn.
set -euo pipefail
model=${1:-runs/quickstart/model}
out=${2:-runs/quickstart/manipulations}
steps=100

unclip() { python -m unclip_jax "$@"; }
mkdir -p "$out"
python - "$model" "$out" "frog" "red apple" "tiger face" <<'PYTHON'
import pathlib
import sys

from PIL import Image

from unclip_jax.pipelines import UnCLIPPipeline, to_pil

model, out, *captions = sys.argv[1:]
out = pathlib.Path(out)
data = UnCLIPPipeline.from_pretrained(model).data()
for batch in data.eval_batches("train", 16):
  for image, index in zip(batch["image"], batch["index"]):
    name = data.example_info(int(index), "train")["name"]
    if name in captions:
      to_pil(image / 2 + 0.5).save(out / f"{name.replace(' ', '_')}.png")

mask = Image.new("L", (64, 64), 0)
mask.paste(255, (0, 32, 64, 64))  # the lower half is drawn anew
mask.save(out / "mask.png")
PYTHON
frog=$out/frog.png apple=$out/red_apple.png tiger=$out/tiger_face.png

edit() {
  local verb=$1
  shift
  unclip edit "$verb" --model "$model" --out "$out/$verb.png" "$@"
}
edit reconstruct --image "$frog" --image "$apple" --image "$tiger" \
  --decoder_steps $steps
edit variations --image "$frog" --decoder_steps $steps
edit interpolate --image "$frog" --image "$apple" --decoder_steps $steps
edit text_diff --image "$frog" --prompt "red apple" --base_prompt "frog" \
  --decoder_steps $steps
edit pca_reconstructions --image "$tiger"
edit typographic_attack --image "$apple" --prompt "frog" \
  --label "red apple" --label "frog"
edit three_decodings --prompt "frog" --prompt "red apple" --prompt "tiger face"
edit image_to_image --image "$frog" --prompt "red apple"
edit inpaint --image "$frog" --mask "$out/mask.png" --prompt "frog"
edit inpaint --image "$frog" --mask "$out/mask.png" --prompt "frog" \
  --num_resamples 5 --out "$out/inpaint_by_resampling.png"
edit outpaint --image "$tiger" --prompt "tiger face" --padding 32
