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
# # 3. The decoder, and what can be done to pictures
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/03_decoder_and_manipulations.ipynb)
#
# The decoder draws a picture from a CLIP embedding z_i, a caption, or both
# (Ramesh et al. 2022, section 2.1). With the noise x_T from which it draws a
# given picture back, z_i makes a latent of two parts: what CLIP sees, and all
# the rest (section 3). All manipulations of the paper are paths through them,
# and methods of the pipeline.
#
# `MODELS` is a folder with trained stages, such as `make quickstart` leaves in
# `runs/quickstart`, or a model folder. Where there is none, all stages are
# trained on the spot for all of these notebooks: with `SIZE = "smoke"` for two
# steps, in a minute, and every figure is then that of an untrained model; with
# `SIZE = "quick"` for a quarter of an hour.

# %%
import os
import pathlib
import sys

MODELS = os.environ.get("UNCLIP_NOTEBOOK_MODELS", "runs/quickstart")
SIZE = os.environ.get("UNCLIP_NOTEBOOK_SIZE", "smoke")

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

from notebooks import common

folders = common.folders(MODELS, SIZE)

# %% [markdown]
# ## Embeddings as pictures
#
# Decoded from the embeddings of true pictures, without a caption: what is lost
# between the rows is what CLIP forgot, or the decoder did not learn. A second
# seed shows what is left to chance.

# %%
from unclip_jax.pipelines import UnCLIPPipeline

pipe = UnCLIPPipeline.from_parts(folders)
data = pipe.data()
batch = next(iter(data.eval_batches("train", 64)))
some = range(0, 64, 8)
infos = [data.example_info(i, "train") for i in some]
prompts = [info["captions"][0] for info in infos]
pictures = batch["image"][some] / 2 + 0.5
image_embed = pipe.encode_image(batch["clip_image"][some])
common.show(
  {
    "true": pictures,
    "decoded": pipe.decode(image_embed).images,
    "another seed": pipe.decode(image_embed, seed=1).images,
  },
  prompts,
)

# %% [markdown]
# ## Three decodings
#
# Section 5.1, Fig. 8: the same decoder from the caption alone; with the
# caption's embedding z_t as if it were that of a picture; and with the
# embedding that the prior draws, which is the whole model. The paper's decoder
# makes something of the first two as well, since both conditions are dropped
# now and then in training.

# %%
decodings = pipe.three_decodings(prompts)
common.show({name: out.images for name, out in decodings.items()}, prompts)

# %% [markdown]
# ## Variations
#
# Section 3.1, Fig. 3: from z_i and x_T of a picture, DDIM with eta 0 draws it
# back; with more, details change, and what CLIP sees stays.

# %%
import numpy as np
import PIL.Image

image = pictures[2]
rows = {
  f"eta {eta:g}": [image, *pipe.variations(image, num_images=8, eta=eta).images]
  for eta in (0.0, 1.0)
}
common.show(rows, ["the picture"])

# %% [markdown]
# ## Interpolations
#
# Section 3.2, Fig. 4: both parts move along great circles, so that the ends
# are the pictures themselves; or x_T is the same all along, and only the
# content moves.

# %%
ends = [pictures[0], pictures[5]]
rows = {
  label: pipe.interpolate(ends, num_images=8, fixed_noise=fixed).images
  for label, fixed in (("own x_T", False), ("one x_T for all", True))
}
common.show(rows, [prompts[0], *[""] * 6, prompts[5]])

# %% [markdown]
# ## Text diffs
#
# Section 3.3, Fig. 5: z_i is turned towards the difference of two captions'
# embeddings; the farther, the more the picture becomes the other one.

# %%
rows = {
  f"to {prompts[k]}": pipe.text_diff(
    pictures[2], prompts[k], base_prompt=prompts[2], num_images=8
  ).images
  for k in (5, 6)
}
common.show(rows, [f"theta {x:.2f}" for x in np.linspace(0, 0.5, 8)])

# %% [markdown]
# ## Fewer principal components
#
# Section 4, Fig. 7: embeddings with all but their first components cut off.
# What comes first is what CLIP holds to be important.

# %%
dims = np.geomspace(1, image_embed.shape[1], 8).round().astype(int).tolist()
rows = {
  prompts[i]: pipe.pca_reconstructions(
    pictures[i], dims=dims, num_examples=300
  ).images
  for i in (2, 5)
}
common.show(rows, [f"the first {k}" for k in dims])

# %% [markdown]
# ## Inpainting
#
# What the mask leaves black stays, bit for bit, in every stage. A decoder that
# was not trained for it (`model.inpainting`) sees the known part only through
# x_t; `num_resamples` (RePaint) makes the two fit better, for more steps.

# %%
side = pipe.image_size
mask = np.zeros((side, side), np.uint8)
mask[side // 2 :] = 255
shown = pictures[2].copy()
shown[mask > 0] = 0.5
rows = {}
for k in (2, 5):
  output = pipe.inpaint(
    pictures[2], PIL.Image.fromarray(mask), prompts[k], num_images=4
  )
  rows[f"as {prompts[k]}"] = [shown, *output.images]
common.show(rows, ["what is known"])

# %% [markdown]
# ## Samplers and steps
#
# The decoder alone, without the upsampler, from one x_T. Without fresh noise a
# sampler solves an ordinary differential equation, and more steps are nearer
# to its one solution; here, how near to that of 64 steps of `heun`, which
# calls the network twice a step. `ddpm`, with fresh noise at every step, draws
# other pictures, and the paper gives it 250 steps (Table 3).

# %%
import matplotlib.pyplot as plt


def draw(image_embed, **options):
  """Pictures of embeddings and the captions, as the decoder gives them."""
  batch = {**pipe.tokenize(prompts), "image_embed": image_embed}
  return pipe.draw(batch, {"decoder": options}).images


STEPS = (3, 6, 12)
drawn = {
  name: [
    draw(image_embed, sampler=name, num_sample_steps=steps) for steps in STEPS
  ]
  for name in ("ddim", "dpmpp_2m")
}
solution = draw(image_embed, sampler="heun", num_sample_steps=64)
common.show(
  {name: [x[7] for x in [*xs, solution]] for name, xs in drawn.items()},
  [*(f"{steps} steps" for steps in STEPS), "64 steps of heun"],
)

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, xs in drawn.items():
  errors = [np.sqrt(np.mean((x - solution) ** 2)) for x in xs]
  axes.plot(STEPS, errors, "o-", label=name)
axes.set(xscale="log", yscale="log", xlabel="steps")
axes.set(ylabel="distance to the solution")
axes.set_xticks(STEPS, STEPS)
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# ## Guidance
#
# Section 2.1: with a scale above 1, what the caption and the embedding ask for
# is drawn more, and the rest less: clearer, more alike, in the end glaring.
# What it buys and costs is measured in notebook 4.

# %%
drawn_embed = decodings["prior"].image_embeds
rows = {
  f"guidance {scale:g}": draw(drawn_embed, guidance_scale=scale)
  for scale in (1.0, 3.0, 8.0)
}
common.show(rows, prompts)
