"""A vLLM server that is not there, is something else, or takes no adapters: said by name, at once."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from erpo_core.errors import RunError
from erpo_core.generation.vllm_server import VLLMServer


class Plain(BaseHTTPRequestHandler):
    """Knows one model, as a server without ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` does, and nothing else."""

    def do_GET(self):
        card = {"id": "base", "parent": None, "max_model_len": 64}
        self._answer(200, {"data": [card]} if self.path == "/v1/models" else {})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(404, {"detail": "Not Found"})

    def _answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Other(Plain):
    """Something else on that port."""

    def do_GET(self):
        self._answer(200, {"hello": "world"})


class Short(Plain):
    """Has a limit of its own: four tokens."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {"choices": [{"index": 0, "token_ids": [5, 6, 7, 8], "logprobs": None}]})


class Impatient(Short):
    """Has just ended a connection that was idle for some time when the next request comes."""

    protocol_version = "HTTP/1.1"
    used_at = float("inf")

    def do_POST(self):
        if time.monotonic() - self.used_at > 1.2:
            self.close_connection = True
            return
        super().do_POST()
        self.used_at = time.monotonic()


@pytest.fixture
def serve():
    servers = []

    def serve(handler) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunError, match=f"no vLLM server answers at {url}") as caught:
        VLLMServer(url, timeout=0)
    assert caught.value.code == "engine_unavailable"


def test_something_else_answers(serve):
    with pytest.raises(RunError, match=r"no vLLM server answers.*hello"):
        VLLMServer(serve(Other), timeout=60)


def test_a_server_that_takes_no_adapters_says_how_to_start_it(serve, tmp_path):
    server = VLLMServer(serve(Plain), timeout=60)
    with pytest.raises(RunError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and `vllm serve") as caught:
        server.load_adapter(tmp_path, "erpo-1")
    assert caught.value.code == "engine_unavailable"
    with pytest.raises(RunError, match="refuses: 404"):
        server.generate([[1, 2]], max_new_tokens=4, stop_ids=[])
    with pytest.raises(ValueError, match=r"max_model_len \(64\)"):
        server.generate([[1, 2]], max_new_tokens=63, stop_ids=[])
    server.close()


def test_answers_that_a_server_cuts_by_a_limit_of_its_own_are_refused(serve):
    server = VLLMServer(serve(Short), timeout=60)
    for call in ({"max_new_tokens": 4, "stop_ids": []}, {"max_new_tokens": 9, "stop_ids": [8]}):
        assert len(server.generate([[1, 2]], **call)[0][0].token_ids) == 4
    with pytest.raises(RunError, match="after 4 of 9 tokens") as caught:
        server.generate([[1, 2]], max_new_tokens=9, stop_ids=[2])
    assert caught.value.code == "engine_unavailable"
    server.close()


def test_a_connection_that_the_server_may_be_about_to_end_is_not_used_again(serve):
    server = VLLMServer(serve(Impatient), timeout=60)
    for _ in range(3):
        assert server.generate([[1, 2]], max_new_tokens=4, stop_ids=[])
        time.sleep(1.3)
    server.close()
