# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # unclip_jax: quickstart
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/00_quickstart.ipynb)
#
# Trains the four stages of unCLIP (CLIP, the diffusion prior, the decoder, the
# upsampler), draws pictures from captions, and looks inside. With
# `SIZE = "smoke"` everything is tiny and random-looking, but done in two
# minutes on a CPU; with `SIZE = "quick"` it is what `make quickstart` does, in
# a quarter of an hour.

# %%
import os
import pathlib
import sys

SIZE = os.environ.get("UNCLIP_NOTEBOOK_SIZE", "smoke")
OUT = pathlib.Path(os.environ.get("UNCLIP_NOTEBOOK_OUT", "runs/notebook"))

if "google.colab" in sys.modules:
  # !git clone -q https://github.com/unclip-jax/unclip_jax
  # %cd unclip_jax
  # !pip install -q -e .
  pass

# The repository's root, wherever the notebook was started.
root = pathlib.Path.cwd()
while not (root / "configs").is_dir() and root != root.parent:
  root = root.parent
os.chdir(root)
sys.path.insert(0, str(root))

# %% [markdown]
# ## Train
#
# A config is a Python file with an argument; `trainer.train` is all that
# `unclip train` calls. Each run folder can be resumed and loaded.

# %%
from unclip_jax import trainer
from unclip_jax.utils import config as config_lib

STAGES = {
  "clip": "clip",
  "prior": "prior",
  "decoder": "decoder",
  "upsampler_64": "upsampler",
}
for name, file in STAGES.items():
  config = config_lib.load(f"configs/emoji/{file}.py:{SIZE}")
  if name in ("prior", "decoder"):
    with config.unlocked():
      config.frozen.clip = dict(path=str(OUT / "clip"))
  trainer.train(config, str(OUT / name))

# %% [markdown]
# ## Draw

# %%
from unclip_jax.pipelines import UnCLIPPipeline

pipe = UnCLIPPipeline.from_parts({name: str(OUT / name) for name in STAGES})
data = pipe.data()
infos = [data.example_info(i, "train") for i in range(8)]
prompts = [info["captions"][0] for info in infos]
output = pipe(prompts, seed=0)

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 8, figsize=(14, 4))
true = next(iter(data.eval_batches("train", 8, 8)))["image"] / 2 + 0.5
for i, prompt in enumerate(prompts):
  axes[0, i].imshow(output.images[i])
  axes[0, i].set_title(prompt, fontsize=8, wrap=True)
  axes[1, i].imshow(true[i])
axes[0, 0].set_ylabel("drawn")
axes[1, 0].set_ylabel("true")
for ax in axes.ravel():
  ax.set_xticks([])
  ax.set_yticks([])
plt.show()

# %% [markdown]
# ## Look inside
#
# Networks return `(output, out)` with named intermediates; nothing of them is
# computed unless it is read.

# %%
import jax.numpy as jnp

clip = pipe.parts["clip"]
text = pipe.tokenize(prompts)
_, text_out = clip.task.model.apply(
  clip.variables, **text, method=clip.task.model.encode_text
)
{k: getattr(v, "shape", type(v).__name__) for k, v in text_out.items()}

# %% [markdown]
# Cosines between the embeddings of captions (rows) and pictures (columns):

# %%
batch = next(iter(data.eval_batches("train", 8, 8)))
embeds = pipe.predict_fns()["embed"](batch)
cosines = embeds["text_embed"] @ embeds["image_embed"].T
plt.imshow(cosines, cmap="viridis")
plt.xlabel("picture")
plt.yticks(range(8), prompts, fontsize=7)
plt.colorbar(label="cosine")
plt.show()

# %% [markdown]
# ## Save and load
#
# A model folder holds JSON, safetensors and the tokenizer; nothing is pickled.

# %%
pipe.save_pretrained(str(OUT / "model"))
again = UnCLIPPipeline.from_pretrained(str(OUT / "model"))
same = again(prompts[:2], seed=0, output_type="np").images
jnp.abs(same - pipe(prompts[:2], seed=0, output_type="np").images).max()
