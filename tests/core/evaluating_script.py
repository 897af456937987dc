"""One process of a distributed training with evaluations: ``evaluating_script.py FOLDER`` writes the evaluations.

FOLDER holds the model ``tiny`` and ``spec.json``; rank 0 writes ``evaluations.json``: the metrics ``eval/`` by step.
"""

import json
import os
import sys
from pathlib import Path

from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Metrics
from erpo_core.specs import parse_spec
from erpo_core.trainer.run import run_training
from workers.child.ranks import end_rank


class Sink:
    requested = False

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def emit(self, record) -> None:
        if isinstance(record, Metrics):
            values = {name: value for name, value in record.values.items() if name.startswith("eval/")}
            self.found.setdefault(record.step, {}).update(values)


def main(folder: Path) -> None:
    model, sink = folder / "tiny", Sink()
    roots = (folder, model.resolve().parent)
    inputs = JobInputs("job", "run", 1, folder / "work", folder, ModelInput(str(model)), model_roots=roots)
    spec = parse_spec("train", json.loads((folder / "spec.json").read_text()))
    run_training(spec, inputs, sink, sink)
    if os.environ.get("RANK", "0") == "0":
        (folder / "evaluations.json").write_text(json.dumps(sink.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank(leaves_group=True)
