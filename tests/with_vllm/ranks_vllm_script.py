"""One of two processes that train with an engine each: ``ranks_vllm_script.py MODEL OUT STRATEGY MORE``."""

import json
import sys
from pathlib import Path

from test_vllm_training import run


def main(model: str, out: str, strategy: str, more: str) -> None:
    records = run(Path(model), Path(out), hardware={"num_gpus": 2, "strategy": strategy}, **json.loads(more))
    steps = [record.values for record in records if record.kind == "metrics" and "reward" in record.values]
    if steps:
        (Path(out) / "metrics.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
