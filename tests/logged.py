"""What a run wrote to metrics.jsonl."""

import json


def values(workdir, metric="train/loss"):
  """Step -> value of a metric; {} where nothing is written yet."""
  path = workdir / "metrics.jsonl"
  rows = [json.loads(x) for x in path.open()] if path.exists() else []
  return {row["step"]: row[metric] for row in rows if metric in row}
