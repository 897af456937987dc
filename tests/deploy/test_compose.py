"""compose.yaml is run, not read: each container's command and environment, as processes, on PostgreSQL and Valkey."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from service.client import ErpoClient
from tiny_model import make_tiny_model

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose.yaml"
PASSWORD = "secret"


def services() -> dict:
    """The services with compose's variables put in, as compose does it: in the texts of the parsed file."""
    return interpolate(yaml.safe_load(COMPOSE.read_text())["services"])


def interpolate(value):
    if isinstance(value, dict):
        return {key: interpolate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item) for item in value]
    if isinstance(value, str):
        value = re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", PASSWORD, value)
        return re.sub(r"\$\{\w+:-(\[[^]]*\]|[^}]*)\}", r"\1", value)
    return value


def test_every_variable_is_resolved_and_every_service_has_a_health_gate():
    found = services()
    assert "${" not in json.dumps(found)
    assert found["api"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert found["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in ("postgres", "redis", "api"):
        assert found[name]["healthcheck"]["test"], name
    for name in ("api", "migrate", "worker-cpu"):
        assert found[name]["user"] == "10001:10001", name


def test_the_containers_run_as_non_root_with_the_folders_they_write(tmp_path):
    for image in ("api", "worker-cpu", "worker-gpu"):
        text = (COMPOSE.parent / f"Dockerfile.{image}").read_text()
        assert "USER 10001" in text
        for folder in ("data", "artifacts", "datasets", "models", "cache"):
            assert f"/var/lib/erpo/{folder}" in text


@contextmanager
def process(command: list[str], env: dict[str, str], log: Path):
    command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    with log.open("wb") as output:
        child = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds: float, what: str, log: Path):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{what} did not happen in {seconds} s:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture
def stack(tmp_path, postgres_url, valkey_url):
    """The environment of compose.yaml with only hosts and folders replaced by local ones."""
    found = services()
    port = free_port()

    def environment(name: str) -> dict[str, str]:
        env = {key: str(value) for key, value in found[name]["environment"].items()}
        for key, value in env.items():
            env[key] = value.replace("/var/lib/erpo", str(tmp_path))
        env["ERPO_DATABASE_URL"] = postgres_url
        env["ERPO_BROKER_URL"] = valkey_url
        return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **env}

    def command(name: str) -> list[str]:
        swap = {"0.0.0.0": "127.0.0.1", "8000": str(port)}
        return [swap.get(word, word) for word in found[name]["command"]]

    for folder in ("data", "artifacts", "cache", "datasets", "models"):
        (tmp_path / folder).mkdir(exist_ok=True)
    with ExitStack() as running:
        migrate_log = tmp_path / "migrate.log"
        with process(command("migrate"), environment("migrate"), migrate_log) as migrate:
            assert migrate.wait(60) == 0, migrate_log.read_text()
        running.enter_context(process(command("api"), environment("api"), tmp_path / "api.log"))
        running.enter_context(process(command("worker-cpu"), environment("worker-cpu"), tmp_path / "worker.log"))
        yield f"http://127.0.0.1:{port}", tmp_path


@pytest.mark.postgres
@pytest.mark.timeout(300)
def test_the_compose_stack_trains_a_tiny_model_on_postgresql(stack):
    url, home = stack
    make_tiny_model(home / "models" / "tiny")
    client = ErpoClient(url, timeout=120)
    wait_until(lambda: ready(client), 60, "readiness", home / "api.log")
    job = client.train(
        model=str(home / "models" / "tiny"),
        dataset="reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=16",
        num_generations=2,
        generation_batch_size=4,
        max_completion_length=8,
        max_length=256,
        max_steps=2,
        preflight=False,
        trace_every=1,
    )
    job.wait(timeout=180)
    assert job.status == "succeeded", (job.status, (home / "worker.log").read_text(errors="replace")[-3000:])
    metrics = client.runs.metrics(job.run_id)
    assert metrics["series"]["reward"]["step"] == [1, 2]
    assert list((home / "artifacts").rglob("adapter_model.safetensors"))


def ready(client: ErpoClient) -> bool:
    import httpx

    try:
        return httpx.get(f"{client.base_url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
