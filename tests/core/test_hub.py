"""Models and data sets from a hub: the real clients against a server that speaks the hub's protocol."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tiny_model import make_tiny_model

COMMIT = "0" * 40
CARD = """---
configs:
- config_name: main
  data_files:
  - split: test
    path: main/test.jsonl
---
"""
REFUSED = {"org/none": (404, "RepoNotFound"), "org/gated": (403, "GatedRepo"), "org/moved": (404, "RevisionNotFound")}
_ASK = """
import json, sys
from pathlib import Path
from erpo_core.data.datasets import load_problems
from erpo_core.data.store import fetch_benchmark
from erpo_core.errors import RunError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import policy_info, prepare_model

folder, found = Path(sys.argv[1]), []


def base(name):
    inputs = JobInputs("job", "run", 1, folder, folder, ModelInput(name))
    return policy_info(inputs, prepare_model(name, cache_dir=folder), dtype="float32", device="cpu")["base"]


asks = {
    "model": lambda name: str(prepare_model(name, cache_dir=folder)),
    "base": base,
    "data set": lambda name: len(load_problems(name, data_root=None, cache_dir=folder)),
    "benchmark": lambda name: str(fetch_benchmark(name, folder / "data", cache_dir=folder).path),
}
for kind, name in json.loads(sys.argv[2]):
    try:
        found.append([None, asks[kind](name)])
    except RunError as error:
        found.append([error.code, error.message])
print(json.dumps(found))
"""


class StandIn(BaseHTTPRequestHandler):
    """Repositories of files, ``datasets/org/name`` or ``org/name``, each of one commit."""

    repositories: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        for name, refusal in REFUSED.items():
            if name in path:
                return self._refuse(*refusal)
        for name, files in self.repositories.items():
            api = f"api/{name if name.startswith('datasets/') else f'models/{name}'}"
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                return self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith(f"{api}/tree/"):
                rows = [{"type": "file", "path": file, "size": len(files[file]), "oid": COMMIT} for file in files]
                return self._answer(json.dumps(rows).encode())
            if path.startswith(f"{name}/resolve/"):
                file = path.removeprefix(f"{name}/resolve/").partition("/")[2]
                return self._answer(files[file]) if file in files else self._refuse(404, "EntryNotFound")
        return self._refuse(404, "")

    do_HEAD = do_GET

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def hub(tiny):
    rows = [{"question": f"{i} + 1?", "answer": f"One more than {i}.\n#### {i + 1}"} for i in range(1319)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    StandIn.repositories = {
        "datasets/openai/gsm8k": {"README.md": CARD.encode(), "main/test.jsonl": lines.encode()},
        "org/tiny": {file.name: file.read_bytes() for file in tiny.iterdir()},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint, folder, *wanted):
    """(code, message or what came) of each; in a process of its own, for the clients read their settings on import."""
    unset = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", _ASK, str(folder), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_and_a_benchmark_come_whole(hub, tiny, tmp_path):
    found = ask(hub, tmp_path, ("model", "org/tiny"), ("model", f"org/tiny@{COMMIT}"), ("benchmark", "gsm8k"))
    assert [code for code, _ in found] == [None] * 3
    [here, pinned, benchmark] = [Path(path) for _, path in found]
    assert here == pinned
    assert (here / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in benchmark.read_text().splitlines()]
    assert len(rows) == 1319
    assert (rows[7]["problem"], rows[7]["answer"]) == ("7 + 1?", "8")


def test_what_came_from_a_hub_is_named_with_its_commit(hub, tmp_path):
    found = ask(hub, tmp_path, ("base", "org/tiny"), ("base", f"org/tiny@{COMMIT[:7]}"), ("base", f"org/tiny@{COMMIT}"))
    assert found[0] == [None, f"org/tiny@{COMMIT}"]
    assert found[2] == [None, f"org/tiny@{COMMIT}"]
    assert found[1] == [None, f"org/tiny@{COMMIT[:7]}"], "it says which one already"


def test_a_refusal_says_what_to_mend(hub, tmp_path):
    wanted = [("model", "org/none"), ("model", "org/gated"), ("model", "org/moved@0123456"), ("data set", "org/none")]
    found = ask(hub, tmp_path, *wanted)
    assert [code for code, _ in found] == [*["model_unavailable"] * 3, "dataset_unavailable"]
    mends = ("mend the name", "accept its terms", "no such revision", "mend the name")
    for (_, message), said in zip(found, mends, strict=True):
        assert said in message, message


def test_a_hub_out_of_reach_says_what_to_do_without_it(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        [(_, of_model), (_, of_dataset)] = ask(endpoint, tmp_path, ("model", "org/none"), ("data set", "org/none"))
    assert "out of reach" in of_model
    assert "ERPO_MODEL_ROOTS" in of_model
    assert "erpo data import" in of_dataset
