"""Configs: what a user may type, and what a file keeps."""

import dataclasses
import sys
import textwrap

import flax.linen as nn
import ml_collections
import pytest

from unclip_jax.utils import config as config_lib
from unclip_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float
  betas: tuple[float, float] = (0.9, 0.99)
  options: dict | None = None


class Network(nn.Module):
  width: int
  channel_mult: tuple[int, ...] = (1, 2)


@pytest.fixture
def config():
  return ml_collections.ConfigDict(
    {
      "optim": {"learning_rate": 1e-3, "betas": (0.9, 0.99), "nesterov": False},
      "total_steps": 100,
      "name": "base",
      "mult": (1, 2),
      "max_examples": None,
    }
  ).lock()


@pytest.fixture
def config_file(tmp_path, monkeypatch):
  # `load` puts the root of this config on the path: not for other tests.
  monkeypatch.setattr("sys.path", list(sys.path))
  folder = tmp_path / "configs" / "emoji"
  folder.mkdir(parents=True)
  path = folder / "clip.py"
  path.write_text(
    textwrap.dedent("""
      from ml_collections import ConfigDict
      from unclip_jax.utils import config as config_lib

      def get_config(arg=None):
        arg = config_lib.parse_arg(arg, quick=False, image_size=64)
        return ConfigDict(dict(quick=arg.quick, image_size=arg.image_size))
    """)
  )
  return path


class TestLoad:
  def test_argument_reaches_get_config(self, config_file):
    config = config_lib.load(f"{config_file}:quick,image_size=32")
    assert config.to_dict() == {"quick": True, "image_size": 32}
    assert config.is_locked

  def test_without_argument(self, config_file):
    assert config_lib.load(str(config_file)).image_size == 64

  def test_derived_config_imports_from_the_configs_root(
    self, config_file, monkeypatch
  ):
    # A name of its own: `configs` itself may be imported already.
    root = config_file.parents[2]
    (root / "only_in_this_root.py").write_text("SIZE = 7")
    derived = config_file.with_name("derived.py")
    derived.write_text(
      "from only_in_this_root import SIZE\n"
      "def get_config():\n  return dict(size=SIZE)\n"
    )
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert config_lib.load(str(derived)).size == 7

  def test_argument_to_a_config_that_takes_none(self, config_file):
    config_file.write_text("def get_config(): return {}")
    with pytest.raises(UserError, match="takes no argument"):
      config_lib.load(f"{config_file}:quick")

  def test_missing_file_names_the_nearest(self, config_file):
    with pytest.raises(UserError, match=r"did you mean 'clip\.py'"):
      config_lib.load(str(config_file.with_name("clpi.py")))

  def test_file_without_get_config(self, config_file):
    config_file.write_text("x = 1")
    with pytest.raises(UserError, match="get_config"):
      config_lib.load(str(config_file))


class TestJson:
  def test_round_trip(self, config):
    back = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.diff(config, back) == []
    assert back.optim.betas == (0.9, 0.99)
    assert back.mult == (1, 2)
    assert isinstance(back.optim, ml_collections.ConfigDict)
    assert back.is_locked
    assert isinstance(back.total_steps, int)

  def test_nested_lists_become_nested_tuples(self):
    config = {"sharding": [["a", "fsdp"], ["b", "replicate"]]}
    back = config_lib.from_json(config_lib.to_json(config))
    assert back.sharding == (("a", "fsdp"), ("b", "replicate"))

  def test_references_are_resolved(self):
    config = ml_collections.ConfigDict({"a": 3})
    config.b = config.get_ref("a") * 2
    assert config_lib.from_json(config_lib.to_json(config)).b == 6

  def test_other_values_are_refused_by_name(self):
    with pytest.raises(UserError, match=r"config\.model\.dtype"):
      config_lib.to_json({"model": {"dtype": object()}})

  def test_text_that_is_no_config(self):
    with pytest.raises(UserError, match="JSON"):
      config_lib.from_json("{")
    with pytest.raises(UserError, match="object"):
      config_lib.from_json("[1]")


def test_diff_names_each_leaf():
  a = {
    "optim": {"lr": 1e-3, "b": (1, 2)},
    "seed": 0,
    "gone": 1,
    "nan": float("nan"),
  }
  b = {
    "optim": {"lr": 3e-4, "b": [1, 2]},
    "seed": 0,
    "new": "x",
    "nan": float("nan"),
  }
  assert config_lib.diff(a, b) == [
    "gone: 1 -> (absent)",
    "new: (absent) -> 'x'",
    "optim.lr: 0.001 -> 0.0003",
  ]


class TestParseArg:
  def test_types_follow_the_defaults(self):
    arg = config_lib.parse_arg(
      "quick, size=tiny,steps=1e3,lr=3,mult=(1,2,4),limit=8,upto=None",
      quick=False,
      size="base",
      steps=5,
      lr=0.1,
      mult=(1,),
      limit=None,
      upto=3,
      other=9,
    )
    assert arg.to_dict() == {
      "quick": True,
      "size": "tiny",
      "steps": 1000,
      "lr": 3.0,
      "mult": (1, 2, 4),
      "limit": 8,
      "upto": None,
      "other": 9,
    }
    assert isinstance(arg.lr, float) and isinstance(arg.steps, int)

  @pytest.mark.parametrize("arg", [None, ""])
  def test_nothing_given(self, arg):
    assert config_lib.parse_arg(arg, quick=False).quick is False

  def test_unknown_key_names_the_nearest(self):
    with pytest.raises(UserError, match=r"'quik'.*did you mean 'quick'"):
      config_lib.parse_arg("quik", quick=False, size="base")


class TestOverrides:
  def test_types_follow_the_values(self, config):
    config_lib.apply_overrides(
      config,
      {
        "optim.learning_rate": "1e-4",
        "optim.betas": "(0.5, 0.6)",
        "optim.nesterov": "true",
        "total_steps": "2e3",
        "name": "7",
        "mult": "4",
        "max_examples": "10",
      },
    )
    assert config.to_dict() == {
      "optim": {"learning_rate": 1e-4, "betas": (0.5, 0.6), "nesterov": True},
      "total_steps": 2000,
      "name": "7",
      "mult": (4,),
      "max_examples": 10,
    }

  @pytest.mark.parametrize(
    "name, meant",
    [
      ("optim.lerning_rate", "optim.learning_rate"),
      ("learning_rate", "optim.learning_rate"),
      ("total_step", "total_steps"),
    ],
  )
  def test_unknown_name_names_the_nearest(self, config, name, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
      config_lib.apply_overrides(config, {name: "1"})

  @pytest.mark.parametrize(
    "name, text",
    [
      ("total_steps", "2.5"),
      ("total_steps", "1e-3"),
      ("optim.learning_rate", "fast"),
      ("optim.nesterov", "maybe"),
      ("mult", "(1,"),
    ],
  )
  def test_wrong_type_names_the_field(self, config, name, text):
    with pytest.raises(UserError, match=f"config.{name} must be"):
      config_lib.apply_overrides(config, {name: text})

  def test_group_is_refused(self, config):
    with pytest.raises(UserError, match=r"optim\.betas, optim\.learn"):
      config_lib.apply_overrides(config, {"optim": "1"})

  def test_a_mapping_takes_the_place_of_a_group(self, config):
    overrides = {"optim": "{'name': 'lion', 'betas': [1, 2]}"}
    overrides["optim.name"] = "adam"  # in the order of the command line
    config_lib.apply_overrides(config, overrides)
    assert config.optim.to_dict() == {"name": "adam", "betas": (1, 2)}
    with pytest.raises(UserError, match=r"config\.optim must be"):
      config_lib.apply_overrides(config, {"optim": "{'name'"})


@dataclasses.dataclass(frozen=True)
class Pictures:
  path: str
  size: int = 64
  holdout: float = 10.0
  groups: tuple[str, ...] | None = None
  names: tuple[str, ...] = ("a",)
  flip: bool = False


class TestFieldsFromText:
  def test_types_follow_the_defaults(self):
    texts = dict(
      path="7", size="32", holdout="5", groups="('a', 'b')", names="b", flip="1"
    )
    fields = config_lib.fields_from_text(Pictures, texts, where="--source")
    assert fields == dict(
      path="7", size=32, holdout=5.0, groups=("a", "b"), names=("b",), flip=True
    )
    assert config_lib.fields_from_text(Pictures, {}, where="--source") == {}
    for text in ("a/b,c", "('a/b', 'c')"):
      fields = config_lib.fields_from_text(Pictures, {"names": text}, where="")
      assert fields == {"names": ("a/b", "c")}

  @pytest.mark.parametrize(
    "texts, message",
    [
      ({"sise": "1"}, r"--source has no field 'sise' \(did you mean 'size'"),
      ({"size": "large"}, r"--source\.size must be a whole number"),
    ],
  )
  def test_mistakes_are_named(self, texts, message):
    with pytest.raises(UserError, match=message):
      config_lib.fields_from_text(Pictures, texts, where="--source")


class TestConstruct:
  def test_containers_become_plain(self):
    fields = ml_collections.ConfigDict(
      {"learning_rate": 0.1, "betas": [1, [2]], "options": {"a": {"b": [1]}}}
    )
    built = config_lib.construct(Optimizer, fields, where="config.optim")
    assert built.betas == (1, (2,))
    assert type(built.options) is dict and type(built.options["a"]) is dict
    assert built.options == {"a": {"b": (1,)}}

  def test_unknown_field_names_the_nearest(self):
    with pytest.raises(UserError) as e:
      config_lib.construct(Optimizer, {"lerning_rate": 1}, where="config.optim")
    assert str(e.value) == (
      "config.optim has no field 'lerning_rate' (did you mean 'learning_rate'?)"
    )

  def test_missing_field(self):
    with pytest.raises(UserError, match=r"config\.optim lacks.*learning_rate"):
      config_lib.construct(Optimizer, None, where="config.optim")

  def test_extra_fields_are_not_for_the_config(self):
    built = config_lib.construct(
      Optimizer, {}, where="config.optim", learning_rate=0.5
    )
    assert built.learning_rate == 0.5
    with pytest.raises(UserError, match="set by the program"):
      config_lib.construct(
        Optimizer,
        {"learning_rate": 1},
        where="config.optim",
        learning_rate=0.5,
      )

  def test_linen_fields_only(self):
    fields = {"width": 8, "channel_mult": [1, 4]}
    built = config_lib.construct(Network, fields, where="config.model")
    assert built.channel_mult == (1, 4)
    hash(built)
    with pytest.raises(UserError, match="no field 'name'"):
      config_lib.construct(
        Network, {"width": 8, "name": "x"}, where="config.model"
      )

  def test_errors_inside_the_class_pass_through(self):
    def broken(width):
      raise TypeError(f"a bug with {width}")

    with pytest.raises(TypeError, match="a bug"):
      config_lib.construct(broken, {"width": 1}, where="config.model")


class TestInstantiate:
  def test_builds_what_is_named(self):
    built = config_lib.instantiate("fractions", "Fraction", {"numerator": 3})
    assert built == 3

  def test_unknown_module_names_the_nearest(self):
    with pytest.raises(UserError, match=r"mean 'unclip_jax\.utils\.config'"):
      config_lib.instantiate("unclip_jax.utils.confg", "Model", {})
    with pytest.raises(UserError, match=r"no module 'nowhere\.at\.all'"):
      config_lib.instantiate("nowhere.at.all", "Model", {})

  def test_unknown_name(self):
    with pytest.raises(UserError, match="has no 'Model'"):
      config_lib.instantiate("fractions", "Model", {})

  def test_missing_dependency_of_a_module_is_no_user_error(
    self, tmp_path, monkeypatch
  ):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
      config_lib.instantiate("needs_more", "Model", {})
