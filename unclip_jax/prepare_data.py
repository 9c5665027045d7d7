r"""Prepare a dataset ahead of its first use: any source, or the emoji.

  unclip prepare_data --source unclip_jax.data.tar --source.path='tars/*.tar' \
    --out prepared [--min_size=64 --max_size=512]
  unclip prepare_data --embed prepared --clip runs/clip --out embedded \
    [--num_captions=5 --text_encodings --process_id=0 --num_processes=4]
  unclip prepare_data --image_size=64 [--styles] [--data_dir=DIR]

The first writes the records of a source (a module with a `Source`, whose fields
are --source.NAME=VALUE) to ArrayRecord shards, without those that cannot be
used; it says how many they are and why. To train on them, set
config.data.source_name to unclip_jax.data.prepared and config.data.source to
{'folder': OUT}. Killed, it goes on when it is called again.

The second puts a CLIP's embeddings into the records of a prepared folder
(unclip_jax/embeddings.py); training then takes them from there. Several
processes, anywhere, may share the work: the same call, another --process_id.

The third, without both, rasterises the emoji dataset, as its first use
would do too; with --styles that of emoji_styles: four more styles, which npm
fetches, or which --npm_dir holds.
"""

from __future__ import annotations

from absl import flags

from unclip_jax import embeddings
from unclip_jax.data import emoji, emoji_styles, preparing
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import programs
from unclip_jax.utils.errors import UserError

SOURCE = flags.DEFINE_string(
  "source", None, "Module of the source, such as unclip_jax.data.tar."
)
FIELDS = programs.FieldsFlag(
  "source", "NAME=VALUE; what --source.NAME=VALUE stands for."
)
OUT = flags.DEFINE_string("out", None, "Folder for the shards.")
SPLITS = flags.DEFINE_list("splits", ["train", "validation"], "Which to take.")
MIN_SIZE = flags.DEFINE_integer(
  "min_size", None, "Pixels that a picture's shorter side must have."
)
MAX_SIZE = flags.DEFINE_integer(
  "max_size", None, "Pixels to which a longer shorter side is reduced."
)
MAX_ASPECT_RATIO = flags.DEFINE_float(
  "max_aspect_ratio", None, "Most that the longer side is to the shorter."
)
DEDUPLICATE = flags.DEFINE_bool(
  "deduplicate", True, "Leave out pictures that were there before."
)
RECORDS_PER_SHARD = flags.DEFINE_integer(
  "records_per_shard", 4096, "Records a file, before any are left out."
)
PROCESSES = flags.DEFINE_integer(
  "processes", None, "That work at once; one for each core if unset.", 1
)

EMBED = flags.DEFINE_string(
  "embed", None, "Prepared folder whose records get embeddings."
)
CLIP = flags.DEFINE_string(
  "clip", None, "Of --embed: run folder or model part of the CLIP."
)
NUM_CAPTIONS = flags.DEFINE_integer(
  "num_captions", 1, "Of --embed: captions of a record that are kept.", 1
)
TEXT_ENCODINGS = flags.DEFINE_bool(
  "text_encodings", False, "Of --embed: store the states of captions too."
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Of --embed: records at once.", 1
)
PROCESS_ID = flags.DEFINE_integer(
  "process_id", 0, "Of --embed: which process this is.", 0
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 1, "Of --embed: how many there are.", 1
)

DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Where the emoji are kept; $UNCLIP_DATA_DIR or ~/.cache/unclip_jax if unset.",
)
IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", 64, "Side of the stored emoji in pixels."
)
LIMIT = flags.DEFINE_integer(
  "limit", None, "Prepare only so many emoji, for a trial; all if unset."
)
STYLES = flags.DEFINE_bool("styles", False, "Emoji in five styles, not one.")
NPM_DIR = flags.DEFINE_string(
  "npm_dir",
  None,
  "With --styles: a folder with what `npm pack` fetched; npm fetches if unset.",
)


def main() -> None:
  if EMBED.value is not None:
    embed()
    return
  if SOURCE.value is None:
    fields = dict(
      data_dir=DATA_DIR.value, image_size=IMAGE_SIZE.value, limit=LIMIT.value
    )
    if STYLES.value:
      source = emoji_styles.Source(**fields, npm_dir=NPM_DIR.value)
    else:
      source = emoji.Source(**fields)
    print(source.prepare())
    return
  for flag in (DATA_DIR, IMAGE_SIZE, LIMIT, STYLES, NPM_DIR):
    if flag.present:
      raise UserError(
        f"--{flag.name} is for the emoji: with --source say"
        f" --source.{flag.name}"
      )
  if OUT.value is None:
    raise UserError("--out=FOLDER is required beside --source")
  programs.check_folder("out", OUT.value)
  module = config_lib.import_module(SOURCE.value)
  plan = preparing.Plan(
    source_name=SOURCE.value,
    source=config_lib.fields_from_text(
      module.Source, FIELDS.value, where="--source"
    ),
    splits=SPLITS.value,
    min_size=MIN_SIZE.value,
    max_size=MAX_SIZE.value,
    max_aspect_ratio=MAX_ASPECT_RATIO.value,
    deduplicate=DEDUPLICATE.value,
    records_per_shard=RECORDS_PER_SHARD.value,
  )
  index = preparing.prepare(plan, OUT.value, num_processes=PROCESSES.value)
  print(preparing.report(index))


def embed() -> None:
  """Writes embeddings, or this process's part of them."""
  if CLIP.value is None or OUT.value is None:
    raise UserError("--clip=FOLDER and --out=FOLDER are required with --embed")
  if PROCESS_ID.value >= NUM_PROCESSES.value:
    raise UserError("--process_id must be below --num_processes")
  programs.check_folder("out", OUT.value)
  index = embeddings.write(
    EMBED.value,
    CLIP.value,
    OUT.value,
    num_captions=NUM_CAPTIONS.value,
    text_encodings=TEXT_ENCODINGS.value,
    batch_size=BATCH_SIZE.value,
    process_index=PROCESS_ID.value,
    process_count=NUM_PROCESSES.value,
  )
  if index is None:
    print("this part is done; whoever ends last writes the index")
  else:
    print(preparing.report(index))


if __name__ == "__main__":
  programs.run(main)
