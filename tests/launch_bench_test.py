"""The benchmark: who is timed when, what is made of it, and tiny real cases."""

import json
import sys
import types

import pytest

from launch import bench, bench_cases, bench_peers


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def race(rounds, runs, warmup, seconds, given=False):
  """Contenders that take so many seconds a run, and the order of their runs."""
  clock, order = Clock(), []

  def contender(name, durations):
    durations = iter(durations)

    def run():
      order.append(name)
      duration = next(durations)
      clock.now += 1000 if given else duration
      return duration if given else None

    return bench_cases.Contender(run, 8, 5)

  times = bench.race(
    {name: contender(name, x) for name, x in seconds.items()},
    rounds,
    runs,
    warmup,
    clock,
    lambda: 2 * clock(),
  )
  return times, "".join(order)


@pytest.mark.parametrize("given", [False, True])
def test_rounds_are_interleaved_and_warm_up_does_not_count(given):
  seconds = {"a": [100, 50, 1, 3, 2, 2], "b": [90, 40, 4, 4, 6, 2]}
  times, order = race(2, 2, 1, seconds, given)
  assert order == "ababaabbbbaa"
  assert times["a"].first_seconds == 100
  assert times["a"].seconds == [2, 2]
  assert times["b"].seconds == [4, 4]
  if not given:
    assert times["b"].cpu_seconds == [8, 8]


def test_ratios_are_of_the_same_round():
  # Round 2 was slow for both, as when another program runs.
  times, _ = race(3, 1, 0, {"a": [9, 1, 4, 1], "b": [9, 2, 12, 2.5]})
  figures = bench.summary(times)["b"]
  assert figures["ratio"] == figures["ratio_of_cpu"] == 2.5
  assert figures["ratio_of_min"] == 2
  assert figures["seconds_median"] == 2.5
  assert figures["spread"] == (12 - 2) / 2.5
  assert figures["examples_per_second"] == 8 / 2.5
  assert figures["num_params"] == 5


def test_a_peer_that_is_missing_is_skipped_with_a_line(monkeypatch, capsys):
  def missing(*args):
    raise ImportError("No module named 'x'")

  # torch itself may be missing.
  torch = types.SimpleNamespace(
    set_num_threads=lambda n: None, manual_seed=lambda n: None
  )
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(bench_peers._PEERS, "prior", {"x": missing})
  options = bench_cases.Options("tiny", "float32", 1, True, False)
  assert bench_peers.contenders("prior", options) == {}
  assert capsys.readouterr().out == "prior: x is skipped: No module named 'x'\n"


def test_the_program_keeps_what_earlier_calls_measured(run_python, tmp_path):
  common = ["launch/bench.py", "--tiny", "--nopeers", f"--out={tmp_path}"]
  common += ["--rounds=2", "--runs=1", "--warmup=0"]
  run_python(*common, "--only=data")
  process = run_python(*common, "--only=prior", "--threads=1")
  results = json.loads((tmp_path / "bench.json").read_text())
  assert list(results) == ["data, tiny, float32", "prior, tiny, float32"]
  prior = results["prior, tiny, float32"]
  assert prior["threads"] == 1
  assert prior["contenders"]["ours"]["num_params"] > 10_000
  assert "jax" in prior["versions"]
  text = (tmp_path / "bench.md").read_text()
  assert process.stdout.strip() in text
  assert text.count("| ours |") == 2


def test_every_case_is_described():
  for case in bench_cases.CASES:
    assert f"\n  {case} " in bench.__doc__
