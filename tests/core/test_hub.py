"""What a job says when the hub does not deliver, against a server that refuses as the hub does."""

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

_CODES = {"none": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "moved": (404, "RevisionNotFound")}
_ASK = """
import json, sys
from pathlib import Path
from erpo_core.data.datasets import load_problems
from erpo_core.errors import RunError
from erpo_core.models import prepare_model

found = []
for ref in json.loads(sys.argv[2]):
    try:
        if ref.startswith("data set "):
            load_problems(ref.removeprefix("data set "), data_root=None, cache_dir=Path(sys.argv[1]))
        else:
            prepare_model(ref, cache_dir=Path(sys.argv[1]))
    except RunError as error:
        found.append([error.code, error.message])
print(json.dumps(found))
"""


class Refusing(BaseHTTPRequestHandler):
    """The API of a hub that has none of the models of /api/models/org/NAME."""

    def do_GET(self) -> None:
        status, code = next((found for name, found in _CODES.items() if f"/org/{name}" in self.path), (404, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"refused: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint, folder, *references):
    """Codes and messages; in a process of its own, for the hub's client reads its settings when it is imported."""
    unset = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder)}
    command = [sys.executable, "-c", _ASK, str(folder), json.dumps(references)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_refusal_says_what_to_mend(hub, tmp_path):
    found = ask(hub, tmp_path, "org/none", "org/gated", "org/moved@0123456", "data set org/none")
    assert [code for code, _ in found] == [*["model_unavailable"] * 3, "dataset_unavailable"]
    wanted = ("mend the name", "accept its terms", "no such revision", "mend the name")
    for (_, message), said in zip(found, wanted, strict=True):
        assert said in message, message


def test_a_hub_out_of_reach_says_what_to_do_without_it(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        [(_, of_model), (_, of_dataset)] = ask(endpoint, tmp_path, "org/none", "data set org/none")
    assert "out of reach" in of_model
    assert "ERPO_MODEL_ROOTS" in of_model
    assert "erpo data import" in of_dataset
