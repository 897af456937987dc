"""The erpo command."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from service.cli.demo import question_of, training_spec
from service.cli.main import app

runner = CliRunner()


def test_help_loads_neither_server_nor_database():
    code = (
        "import sys\nfrom service.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'fastapi', 'sqlalchemy', 'httpx', 'torch', 'uvicorn', 'celery', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_help_text():
    for command in (["up"], ["demo"], ["serve"], ["worker"], ["train"], ["data", "import"], ["jobs"], ["keys"], ["db"]):
        result = runner.invoke(app, [*command, "--help"])
        assert result.exit_code == 0, command


@pytest.mark.parametrize(
    "arguments",
    [[], ["--body", "no json"], ["--body", "[]"], ["--body", '{"model": "m"}'], ["-f", "/nowhere.json"]],
    ids=["nothing", "no json", "no object", "no dataset", "no file"],
)
def test_a_training_without_a_proper_body_is_refused(arguments):
    assert runner.invoke(app, ["train", *arguments]).exit_code == 2


def test_a_service_that_is_not_there_is_told_in_one_line():
    result = runner.invoke(app, ["jobs", "list", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "Traceback" not in result.output


def test_a_key_is_shown_once_and_can_be_revoked(tmp_path, monkeypatch):
    monkeypatch.setenv("ERPO_DATA_DIR", str(tmp_path / "a folder"))
    made = runner.invoke(app, ["keys", "create", "--scope", "submit", "--owner", "ann"])
    assert made.exit_code == 0
    key_id, secret = sorted(made.output.split(), key=lambda word: word.startswith("erpo_"))
    listed = runner.invoke(app, ["keys", "list"]).output
    assert key_id in listed
    assert "ann" in listed
    assert secret not in listed
    assert runner.invoke(app, ["keys", "revoke", key_id]).exit_code == 0
    assert "revoked" in runner.invoke(app, ["keys", "list"]).output
    assert runner.invoke(app, ["keys", "revoke", "key_none"]).exit_code == 1


def test_upgrading_the_database_twice_is_harmless(tmp_path, monkeypatch):
    monkeypatch.setenv("ERPO_DATA_DIR", str(tmp_path))
    assert [runner.invoke(app, ["db", "upgrade"]).exit_code for _ in range(2)] == [0, 0]


def test_the_demo_orders_a_valid_training():
    from erpo_core.specs import parse_spec

    spec = parse_spec("train", json.loads(json.dumps(training_spec(3))))
    assert spec.max_steps == 3
    assert len(spec.prompt.worked_examples) == 2


def test_the_question_is_what_the_last_turn_says():
    prompt = "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    prompt += "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert question_of(prompt) == "What is 2 + 3?"
    assert question_of("What is 2 + 3?") == "What is 2 + 3?"
