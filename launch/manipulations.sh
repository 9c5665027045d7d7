#!/usr/bin/env bash
# Every manipulation of `unclip edit`, on pictures that the model itself drew.
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
unclip sample --model "$model" --out "$out/given" \
  --prompt "frog" --prompt "red apple" --prompt "tiger face"
frog=$out/given/00000.png apple=$out/given/00001.png
tiger=$out/given/00002.png
python - "$out/mask.png" <<'PYTHON'
import sys

from PIL import Image

mask = Image.new("L", (64, 64), 0)
mask.paste(255, (0, 32, 64, 64))  # the lower half is drawn anew
mask.save(sys.argv[1])
PYTHON

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
edit outpaint --image "$tiger" --prompt "tiger face" --padding 32
