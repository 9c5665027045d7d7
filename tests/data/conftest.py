import pytest

from unclip_jax.data import emoji


@pytest.fixture(scope="session")
def emoji_source(tmp_path_factory) -> emoji.Source:
  """48 plain emoji at 32 pixels, a fifth of them held out."""
  data_dir = str(tmp_path_factory.mktemp("unclip_data"))
  return emoji.Source(data_dir=data_dir, image_size=32, limit=48, holdout=20.0)
