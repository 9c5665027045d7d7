"""BERT in the folders of transformers: the same outputs, and there and back."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from unclip_jax import inference  # noqa: E402
from unclip_jax.data import tokenizers  # noqa: E402
from unclip_jax.interop import bert_hf  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402

L = 12
VOCAB = [
  *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
  *("a", "red", "frog", "##s", "un", "##aff", "##able", "!", "naive", "owl"),
]
TEXTS = ("A red Frogs!", "", "unaffable naïve owl, owl owl owl owl owl owl owl")


def make(cls="BertModel", **fields):
  """A BERT with random weights; no parameter is 0 or 1."""
  config = transformers.BertConfig(
    vocab_size=len(VOCAB) + 2,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=L + 3,
    attn_implementation="eager",
    **fields,
  )
  model = getattr(transformers, cls)(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
      parameter.normal_(std=std, generator=generator)
      parameter += float(parameter.ndim == 1)
  return model


def save(model, folder: pathlib.Path) -> str:
  model.save_pretrained(folder)
  (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
  return str(folder)


@pytest.fixture(scope="module")
def model():
  return make()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  return save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture
def copy(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "copy")
  return tmp_path / "copy"


def test_outputs_and_maps_are_those_of_transformers(model, folder, tmp_path):
  bert_hf.convert_in(folder, str(tmp_path / "bert"))
  bert = inference.load(str(tmp_path / "bert"))
  text_tokens, mask = tokenizers.load(bert.assets_dir).encode(TEXTS, L)
  types = np.arange(L) % 2 * mask
  ours, out = jax.jit(bert.task.model.apply)(
    bert.variables, text_tokens, mask, types
  )
  with torch.no_grad():
    theirs = model(
      torch.tensor(text_tokens).long(),
      torch.tensor(mask).long(),
      torch.tensor(types).long(),
      output_attentions=True,
    )
  hidden = theirs.last_hidden_state.numpy()
  np.testing.assert_allclose(ours[mask], hidden[mask], atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(
    out["text_embed"], theirs.pooler_output.numpy(), atol=1e-5
  )
  for found, expected in zip(
    out["attention_maps"], theirs.attentions, strict=True
  ):
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)
  # And the task says the same of texts of one type.
  batch = {"text_tokens": text_tokens, "text_mask": mask}
  embed = bert.task.predict_fns()["embed"](bert.variables, {}, batch, None)
  with torch.no_grad():
    plain = model(
      torch.tensor(text_tokens).long(), torch.tensor(mask).long()
    ).pooler_output.numpy()
  np.testing.assert_allclose(embed["text_embed"], plain, atol=1e-5)


def test_there_and_back_is_the_same_to_the_bit(model, folder, tmp_path):
  part, back = str(tmp_path / "bert"), str(tmp_path / "back")
  bert_hf.convert_in(folder, part)
  bert_hf.convert_out(part, back)
  again, info = transformers.BertModel.from_pretrained(
    back, output_loading_info=True
  )
  assert not any(info.values())
  before, after = model.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(tensor, after[name]), name
  for name, (theirs, _) in bert_hf._SIZES.items():
    del name
    assert getattr(again.config, theirs) == getattr(model.config, theirs)
  assert pathlib.Path(back, "vocab.txt").read_text().split() == VOCAB


def test_heads_of_pretraining_are_left_out(folder, tmp_path):
  """BertForMaskedLM has no pooler, and "bert." before its names."""
  whole = make("BertForMaskedLM")
  part = bert_hf.read(save(whole, tmp_path / "mlm"))
  assert not part.config.model.has_pooler
  expected = whole.bert.embeddings.word_embeddings.weight.detach().numpy()
  np.testing.assert_array_equal(
    part.arrays["params.text_encoder.token_embed"].load(), expected
  )
  names = bert_hf.read(folder).arrays.keys()
  assert {x for x in names if "pooler" not in x} == part.arrays.keys()


@pytest.mark.parametrize("lowercase", [True, False])
def test_token_ids_are_those_of_transformers(copy, lowercase):
  (copy / "tokenizer_config.json").write_text(
    json.dumps({"do_lower_case": lowercase, "tokenizer_class": "BertTokenizer"})
  )
  ours = tokenizers.load(str(copy))
  theirs = transformers.BertTokenizer.from_pretrained(copy)
  texts = [*TEXTS, "a [MASK] frog", "[SEP] a\u0000b \ud800 日本 un aff able"]
  found, mask = ours.encode(texts, 20)
  for row, row_mask, text in zip(found, mask, texts, strict=True):
    text = text.encode("utf-8", "ignore").decode()
    assert row[row_mask].tolist() == theirs(text).input_ids, text
  assert ours.vocab_size == len(VOCAB)
  assert (ours.pad_id, ours.bos_id, ours.eos_id) == (0, 2, 3)
  assert ours.decode(found[:1]) == (
    ["a red frogs!"] if lowercase else ["[UNK] red [UNK]!"]
  )


class TestRefused:
  def _config(self, folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  @pytest.mark.parametrize(
    ("fields", "words"),
    [
      ({"model_type": "roberta"}, "'roberta', not a BERT"),
      ({"hidden_act": "relu"}, "only 'gelu' is known"),
      ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
      ({"num_hidden_layers": "2"}, "one whole number"),
      ({"num_hidden_layers": 3}, "encoder.layer.2.attention.self.query.weight"),
      ({"vocab_size": 9}, "another shape"),
    ],
  )
  def test_other_configs(self, copy, fields, words):
    self._config(copy, **fields)
    with pytest.raises(UserError, match=words):
      bert_hf.read(str(copy))

  def test_pickled_weights(self, model, copy):
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
      bert_hf.read(str(copy))

  def test_no_tokenizer_or_a_larger_one(self, copy):
    with open(copy / "vocab.txt", "a") as f:
      f.write("\n".join(f"new{i}" for i in range(9)))
    with pytest.raises(UserError, match="another model's"):
      bert_hf.read(str(copy))
    (copy / "vocab.txt").write_text("just\nwords\n")
    with pytest.raises(UserError, match=r"lacks the token \[PAD\]"):
      tokenizers.load(str(copy)).encode(["a"], 4)
    (copy / "vocab.txt").unlink()
    with pytest.raises(UserError, match="there is no tokenizer"):
      bert_hf.read(str(copy))

  def test_another_model_is_not_written(self, folder, tmp_path):
    part = bert_hf.read(folder)
    with part.config.unlocked():
      part.config.model_name = "unclip_jax.models.clip"
    bert_hf.parts.write(str(tmp_path / "bert"), part)
    with pytest.raises(UserError, match="not a BERT"):
      bert_hf.convert_out(str(tmp_path / "bert"), str(tmp_path / "out"))
