"""What the API refuses: the field, what is wrong, what to write instead; and nothing is left behind."""

import json
import shutil

import pytest
from db_rows import claim, finish, store, submit
from sqlalchemy import func, select

from erpo_core.records import Checkpoint
from service.db.engine import Database
from service.db.models import Dataset, IdempotencyKey, Job, JobEvent, Run
from service.settings import Settings

TRAIN = {"model": "smollm2-135m", "dataset": "data:sums.jsonl"}
EVAL = {"eval_every": 5, "eval_benchmarks": ["data:sums.jsonl"]}
SFT = {"algorithm": "sft", "dataset": "data:solved.jsonl"}
ENTROPY = {"model": "smollm2-135m", "texts": [{"prompt": "1 + 1?", "response": "2"}]}
NO_RUN = "run_" + "0" * 32
JSON = {"Content-Type": "application/json"}


def count_rows(database) -> dict[str, int]:
    with database.read() as session:
        tables = (Job, Run, JobEvent, Dataset, IdempotencyKey)
        return {table.__tablename__: session.scalar(select(func.count()).select_from(table)) for table in tables}


@pytest.fixture(scope="module")
def stack(serving, sqlite_template, tmp_path_factory):
    """(client, database, settings) of a service that stores nothing in these tests."""
    home = tmp_path_factory.mktemp("refusals")
    settings = Settings(
        data_dir=home, model_roots=(home / "models",), max_body_bytes=100_000, vllm_servers=("http://gpu-7:8000",)
    )
    shutil.copy(sqlite_template, home / "erpo.db")
    database = Database(settings.database_url)
    with serving(settings) as client:
        (settings.data_root / "empty.jsonl").write_text("\n\n")
        (settings.data_root / "broken.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": \n')
        (settings.data_root / "solved.jsonl").write_text('{"problem": "1 + 1?", "answer": "2", "solution": "2"}\n')
        (settings.data_root / "no-answer.jsonl").write_text('{"problem": "1 + 1?"}\n')
        (home / "outside.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
        (settings.data_root / "link.jsonl").symlink_to(home / "outside.jsonl")
        (home / "models").mkdir()
        (home / "models" / "away").symlink_to("/etc")
        (home / "models" / "pickled").mkdir()
        yield client, database, settings
    database.dispose()


@pytest.fixture
def refusing(stack):
    """The client; after the test there is no row of any kind, and no uploaded file."""
    client, database, settings = stack
    yield client
    assert set(count_rows(database).values()) == {0}
    assert not (settings.data_root / "uploads").exists()


def refused(response, status: int = 422) -> dict:
    """The problem document, of which everything that all have in common is right."""
    body = response.json()
    assert (response.status_code, body["status"]) == (status, status), body
    assert response.headers["content-type"] == "application/problem+json"
    assert body["instance"] == response.request.url.path
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["type"].endswith(body["code"])
    assert body["title"]
    assert body["detail"]
    return body


def names(body: dict, pointer: str, mend: str) -> None:
    """The problem has one entry, for this field, and its mend says this."""
    (error,) = body["errors"]
    assert error["pointer"] == pointer
    assert error["mend"]
    assert mend in error["mend"]
    assert error["message"]


SERVER = {"use_vllm": True, "vllm_mode": "server"}
SERVED = SERVER | {"vllm_server_base_url": "http://gpu-7:8000"}
CORRECTED = {"use_vllm": True, "vllm_importance_sampling_correction": True}
BOUNDS_OF_ONE = {"vllm_importance_sampling_clip_min": 1, "vllm_importance_sampling_clip_max": 1}
TRAININGS = [
    ({"model": "nope"}, "/model", "smollm2-135m"),
    ({"model": ""}, "/model", "at least 1 character"),
    ({"model": None}, "/model", "write a string"),
    ({"model": "/etc"}, "/model", "ERPO_MODEL_ROOTS"),
    ({"model": "../../etc"}, "/model", "ERPO_MODEL_ROOTS"),
    ({"model": "org/../secret"}, "/model", "hub id"),
    ({"model": {"run": NO_RUN}}, "/model/run", "GET /runs"),
    ({"model": {"run": "job_1"}}, "/model/run", "^run_"),
    ({"model": {"run": NO_RUN, "checkpoint": -1}}, "/model/checkpoint", "at least 0"),
    ({"dataset": "data:empty.jsonl"}, "/dataset", '"problem"'),
    ({"dataset": "data:broken.jsonl"}, "/dataset", '"problem"'),
    ({"dataset": "data:no-answer.jsonl"}, "/dataset", '"answer"'),
    ({"dataset": "data:../outside.jsonl"}, "/dataset", "data:sums.jsonl"),
    ({"dataset": "data:link.jsonl"}, "/dataset", "data:sums.jsonl"),
    ({"dataset": "data:/etc/passwd"}, "/dataset", "data:sums.jsonl"),
    ({"dataset": "/etc/passwd"}, "/dataset", "data:<file>.jsonl"),
    ({"dataset": "ds_" + "0" * 32}, "/dataset", "GET /datasets"),
    ({"num_generations": 1}, "/num_generations", "at least 2"),
    ({"num_generations": "eight"}, "/num_generations", "an integer"),
    ({"num_generations": 2.5}, "/num_generations", "an integer"),
    ({"generation_batch_size": 20}, "/generation_batch_size", "write 16"),
    ({"generation_batch_size": 32}, "/generation_batch_size", "lower it to 24"),
    ({"max_steps": 0}, "/max_steps", "write -1"),
    ({"algorithm": "sft", "max_steps": 0}, "/max_steps", "write -1"),
    ({"max_steps": -2}, "/max_steps", "at least -1"),
    ({"max_steps": 10**400}, "/max_steps", "at most 2147483647"),
    ({"model": {"run": NO_RUN, "checkpoint": 10**400}}, "/model/checkpoint", "at most 2147483647"),
    ({"temperature": -0.5}, "/temperature", "above 0"),
    ({"num_generation": 8}, "/num_generation", "`num_generations`"),
    ({"trust_remote_code": True}, "/trust_remote_code", "remove"),
    ({"algorithm": "ppo"}, "/algorithm", "'erpo', 'grpo', 'sft'"),
    ({"algorithm": ["erpo"]}, "/algorithm", "'erpo', 'grpo', 'sft'"),
    ({"algorithm": "grpo", "num_buckets": 5}, "/num_buckets", "algorithm `erpo`"),
    ({"algorithm": "sft", "num_buckets": 5}, "/num_buckets", "algorithm `erpo`"),
    ({"algorithm": "sft", "num_generations": 8}, "/num_generations", "algorithm `erpo` and `grpo`"),
    ({"algorithm": "sft", "rewards": [{"name": "accuracy"}]}, "/rewards", "algorithm `erpo` and `grpo`"),
    ({"train_batch_size": 8}, "/train_batch_size", "algorithm `sft`"),
    ({"algorithm": "sft"}, "/dataset", '"solution"'),
    ({"algorithm": "sft", "dataset": "reasoning-gym:chain_sum"}, "/dataset", '"solution"'),
    ({"dataset": "data:sums.jsonl?level=4"}, "/dataset", "levels there: none"),
    ({"dataset": "data:sums.jsonl?level=5-3"}, "/dataset", "level=3-5"),
    ({"max_completion_length": 1024, "max_prompt_length": 1200}, "/max_completion_length", "below max_length"),
    ({"lora": {"r": 0}}, "/lora/r", "at least 1"),
    ({"lora": {"rank": 8}}, "/lora/rank", "remove"),
    ({"lora": {"target_modules": "q_proj"}}, "/lora/target_modules", "write a list"),
    ({"lora": {"target_modules": "q_proj,v_proj"}}, "/lora/target_modules", "write a list"),
    ({"lora": {"target_modules": "layers.0.mlp.up_proj"}}, "/lora/target_modules", "write a list"),
    ({"lora": {"target_modules": ["q_proj,v_proj"]}}, "/lora/target_modules", "a list of names"),
    ({"lora": {"target_modules": [r".*\.q_proj"]}}, "/lora/target_modules", "as a string"),
    ({"lora": {"target_modules": ["all-linear"]}}, "/lora/target_modules", 'write "all-linear"'),
    ({"lora": {"target_modules": ["model.lm_head"]}}, "/lora/target_modules", "leave it out"),
    ({"lora": {"target_modules": ".*"}}, "/lora/target_modules", "leave it out"),
    ({"lora": {"target_modules": r".*\.q_proj|lm_head"}}, "/lora/target_modules", "leave it out"),
    ({"lora": {"target_modules": r".*\.(q_proj"}}, "/lora/target_modules", "a regular expression"),
    ({"rewards": []}, "/rewards", "at least 1 item"),
    ({"rewards": [{"name": "accuracy"}, {"name": "vibes"}]}, "/rewards/1/name", "'boxed_format'"),
    ({"rewards": [{"name": "vibes"}]}, "/rewards/0/name", "'boxed_format'"),
    ({"rewards": [{"name": "accuracy", "args": {"x": 1}}]}, "/rewards/0/args", "no arguments"),
    ({"rewards": [{"name": "accuracy"}, {"name": "regex", "args": {"pattern": "("}}]}, "/rewards/1/args", "pattern"),
    (
        {"rewards": [{"name": "regex", "args": {"pattern": "(?i)" + "[\u0100-\uffff]" * 3000}}]},
        "/rewards/0/args",
        "1000",
    ),
    ({"outcome_reward": "regex"}, "/outcome_reward", "add it"),
    ({"max_length": 100, "max_completion_length": 100}, "/max_completion_length", "below max_length"),
    (SERVED | {"lora": None}, "/vllm_mode", "keep `lora`"),
    ({"eval_every": 5}, "/eval_benchmarks", "eval_every 0"),
    ({"eval_benchmarks": ["data:sums.jsonl"]}, "/eval_every", "the steps between"),
    ({"eval_every": -1}, "/eval_every", "at least 0"),
    (EVAL | {"eval_benchmarks": ["data:sums.jsonl", "amc24"]}, "/eval_benchmarks/1", "aime24, aime25, amc23"),
    (EVAL | {"eval_benchmarks": ["amc23"]}, "/eval_benchmarks/0", "erpo data fetch amc23"),
    (EVAL | {"eval_benchmarks": ["data:broken.jsonl"]}, "/eval_benchmarks/0", '"problem"'),
    (EVAL | {"eval_benchmarks": ["ds_" + "0" * 32]}, "/eval_benchmarks/0", "GET /datasets"),
    (EVAL | {"eval_benchmarks": ["data:sums.jsonl"] * 2}, "/eval_benchmarks", "name each once"),
    (EVAL | SFT | {"eval_benchmarks": ["x"]}, "/eval_benchmarks/0", "amc23"),
    (EVAL | {"eval_num_samples": 0}, "/eval_num_samples", "at least 1"),
    (EVAL | {"eval_sampling": {"max_completion_length": 2048}}, "/eval_sampling/max_completion_length", "max_length"),
    (EVAL | {"eval_sampling": {"temprature": 0}}, "/eval_sampling/temprature", "`temperature`"),
    ({"use_vllm": True, "vllm_mode": "server"}, "/vllm_server_base_url", "all three"),
    ({"vllm_server_base_url": "http://10.0.0.1:8000"}, "/vllm_server_base_url", "all three"),
    (SERVER | {"vllm_server_base_url": "http://169.254.169.254"}, "/vllm_server_base_url", "http://gpu-7:8000"),
    (SERVER | {"vllm_server_base_url": "http://gpu-7:8000@evil"}, "/vllm_server_base_url", "^https?"),
    (SERVER | {"vllm_server_base_url": "http://gpu-7:8000/../x"}, "/vllm_server_base_url", "^https?"),
    (SERVED | {"vllm_importance_sampling_correction": True, "temperature": 0.7}, "/temperature", "write 1"),
    (CORRECTED | {"vllm_importance_sampling_clip_max": None}, "/vllm_importance_sampling_clip_max", "write one"),
    (BOUNDS_OF_ONE, "/vllm_importance_sampling_clip_min", "lower it"),
    (CORRECTED | BOUNDS_OF_ONE, "/vllm_importance_sampling_clip_min", "lower it"),
    ({"hardware": {"strategy": "fsdp"}}, "/hardware/strategy", "'fsdp2'"),
    ({"hardware": {"num_gpus": 2}}, "/hardware/strategy", "write one"),
    ({"load_in_4bit": True, "hardware": {"num_gpus": 2, "strategy": "fsdp2"}}, "/load_in_4bit", "ddp"),
    ({"load_in_4bit": True, "hardware": {"num_gpus": 2, "strategy": "zero2"}}, "/load_in_4bit", "ddp"),
    ({"hardware": {"num_gpus": 1, "strategy": "zero3"}}, "/hardware/strategy", "2 or more"),
    ({"hardware": {"num_gpus": 1, "strategy": "fsdp2"}}, "/hardware/strategy", "2 or more"),
    ({"hardware": {"num_gpus": 3, "strategy": "ddp"}}, "/generation_batch_size", "a multiple"),
    ({"algorithm": "sft", "hardware": {"num_gpus": 3, "strategy": "ddp"}}, "/train_batch_size", "a multiple"),
    ({"job": {"priority": 10}}, "/job/priority", "at most 9"),
    ({"job": {"depends_on": [NO_RUN]}}, "/job/depends_on/0", "GET /runs"),
    ({"job": {"name": "a\0b"}}, "/job/name", "NUL"),
]


@pytest.mark.parametrize(("change", "pointer", "mend"), TRAININGS, ids=lambda value: str(value)[:40])
def test_a_wrong_training_is_refused(refusing, change, pointer, mend):
    names(refused(refusing.post("/jobs/train", json=TRAIN | change)), pointer, mend)
    names(refused(refusing.post("/jobs/train", json=TRAIN | change, params={"dry_run": True})), pointer, mend)


ANALYSES = [
    ({"detector": {"kind": "vibes"}}, "/detector/kind", "'transient'"),
    ({"detector": {"fraction": 0}}, "/detector/fraction", "above 0"),
    ({"detector": {"fraction": 1.5}}, "/detector/fraction", "at most 1"),
    ({"detector": {"min_entropy": -1}}, "/detector/min_entropy", "at least 0"),
    ({"detector": {"kind": "absolute", "threshold": "high"}}, "/detector/threshold", "a number"),
    ({"detector": {"quantile": 0.05}}, "/detector/quantile", "remove"),
    ({"model": {"run": NO_RUN}}, "/model/run", "GET /runs"),
    ({"temperature": 0}, "/temperature", "above 0"),
    ({"prompts": ["1 + 1?"]}, "/prompts", "either"),
    ({"texts": []}, "/prompts", "either"),
    ({"texts": "2"}, "/texts", "a list"),
    ({"texts": [{"prompt": "1 + 1?", "response": ""}]}, "/texts/0/response", "at least 1"),
    ({"texts": [{"prompt": "1 + 1?"}]}, "/texts/0/response", "add `response`"),
    ({"hardware": {"num_gpus": 2, "strategy": "ddp"}}, "/hardware/num_gpus", "write 1"),
]


@pytest.mark.parametrize(("change", "pointer", "mend"), ANALYSES, ids=lambda value: str(value)[:40])
def test_a_wrong_analysis_is_refused(refusing, change, pointer, mend):
    names(refused(refusing.post("/analyze/entropy", json=ENTROPY | change)), pointer, mend)


@pytest.mark.parametrize(
    ("change", "pointer", "mend"),
    [
        ({"num_samples": 0}, "/num_samples", "at least 1"),
        ({"sampling": {"temperature": -1}}, "/sampling/temperature", "at least 0"),
        ({"sampling": {"top_p": 0}}, "/sampling/top_p", "above 0"),
        ({"engine": "magic"}, "/engine", "'transformers' or 'vllm'"),
        ({"hardware": {"num_gpus": 2}}, "/hardware/num_gpus", "engine `vllm`"),
        ({"hardware": {"num_gpus": 2, "strategy": "ddp"}}, "/hardware/num_gpus", "engine `vllm`"),
        ({"limit": "all"}, "/limit", "an integer"),
        ({"dataset": "data:broken.jsonl"}, "/dataset", '"problem"'),
        ({"model": "nope"}, "/model", "smollm2-135m"),
    ],
    ids=str,
)
def test_a_wrong_evaluation_is_refused(refusing, change, pointer, mend):
    names(refused(refusing.post("/jobs/evaluate", json=TRAIN | change)), pointer, mend)


def test_a_server_that_the_operator_has_named_is_taken(refusing):
    assert refusing.post("/jobs/train", json=TRAIN | SERVED, params={"dry_run": True}).status_code == 200


def test_every_wrong_field_is_named_at_once(refusing):
    body = refused(refusing.post("/jobs/train", json={"dataset": 5, "temperature": -1, "lora": {"r": "big"}}))
    pointers = {error["pointer"] for error in body["errors"]}
    assert pointers == {"/model", "/dataset", "/temperature", "/lora/r"}
    assert all(error["mend"] for error in body["errors"])


def test_a_broken_file_is_named_by_its_line(refusing):
    body = refused(refusing.post("/jobs/train", json=TRAIN | {"dataset": "data:broken.jsonl"}))
    assert (body["code"], "line 2" in body["detail"]) == ("invalid_dataset", True)


@pytest.mark.parametrize("folder", ["away", "pickled", "none"])
def test_a_folder_is_a_model_only_below_a_root_and_with_safetensors(stack, refusing, folder):
    folder = f"{stack[2].data_dir}/models/{folder}"
    names(refused(refusing.post("/jobs/train", json=TRAIN | {"model": folder})), "/model", "the model")


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 422),
        (b"{", JSON, 422),
        (b"[]", JSON, 422),
        (b'"train"', JSON, 422),
        (b"[" * 20_000, JSON, 400),
        (b"\xff{}", JSON, 400),
        (json.dumps(TRAIN).encode(), {}, 415),
        (json.dumps(TRAIN).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(TRAIN | {"pad": "x" * 100_000}).encode(), JSON, 413),
        (json.dumps(TRAIN)[:-1].encode() + b', "temperature": NaN}', JSON, 422),
        (json.dumps(TRAIN)[:-1].encode() + b', "learning_rate": 1e999}', JSON, 422),
        (json.dumps(TRAIN)[:-1].encode() + b', "job": {"name": "\\ud800"}}', JSON, 422),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_body_that_is_no_order_is_refused(refusing, content, headers, status):
    refused(refusing.post("/jobs/train", content=content, headers=headers), status)


def test_broken_json_is_located(refusing):
    [error] = refused(refusing.post("/jobs/train", content=b'{"model": "m",\n "seed" 1}', headers=JSON), 422)["errors"]
    assert "line 2, column 9" in error["message"]
    assert error["mend"] == "send valid JSON"


def test_a_wrong_content_type_says_what_to_send(refusing):
    [error] = refused(refusing.post("/jobs/train", content=b"{}", headers={"Content-Type": "text/csv"}), 415)["errors"]
    assert error["pointer"] == "/header/content-type"
    assert "application/json" in error["mend"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(refusing):
    refused(refusing.post("/jobs/train", content=iter([b" " * 60_000] * 2), headers=JSON), 413)


UPLOADS = [
    (b"", "no problem"),
    (b"\n \n", "no problem"),
    (b'{"problem": "1 + 1?", "answer": "2"}\n\n{"problem"', "line 3"),
    (b'{"problem": "1 + 1?"}', "line 1"),
    (b'{"problem": "1 + 1?", "answer": ""}', "line 1"),
    (b'["1 + 1?", "2"]', "line 1"),
    (b'{"problem": "\\u0000", "answer": "2"}', "line 1"),
    (b"\xff\xff", "line 1"),
]


@pytest.mark.parametrize(("content", "message"), UPLOADS)
def test_a_broken_upload_is_refused_by_its_line_and_leaves_no_file(refusing, content, message):
    body = refused(refusing.post("/datasets", files={"file": ("sums.jsonl", content)}))
    names(body, "/file", "")
    assert message in body["detail"]


def test_an_upload_needs_a_file(refusing):
    names(refused(refusing.post("/datasets", files={"data": ("sums.jsonl", b"{}")})), "/file", "add `file`")


QUERIES = [
    ("/jobs", "limit", "0", "at least 1"),
    ("/jobs", "limit", "201", "at most 200"),
    ("/jobs", "limit", "many", "an integer"),
    ("/jobs", "status", "done", "'succeeded'"),
    ("/jobs", "kind", "sleep", "'entropy'"),
    ("/jobs", "created_after", "yesterday", "a time"),
    ("/jobs", "created_after", "2026-01-31T12:00:00", "zone"),
    ("/runs", "kind", "sleep", "'entropy'"),
    (f"/runs/{NO_RUN}/metrics", "max_points", "1", "at least 2"),
    (f"/runs/{NO_RUN}/metrics", "smoothing", "1", "below 1"),
    (f"/runs/{NO_RUN}/metrics", "step_min", "-1", "at least 0"),
    (f"/runs/{NO_RUN}/cdps", "top", "0", "at least 1"),
]


@pytest.mark.parametrize(("path", "name", "value", "mend"), QUERIES)
def test_a_wrong_query_is_refused(refusing, path, name, value, mend):
    names(refused(refusing.get(path, params={name: value})), f"/query/{name}", mend)


@pytest.mark.parametrize("path", ["/jobs", "/runs", "/datasets"])
@pytest.mark.parametrize("cursor", ["x", "%", "NQ", "bnVsbA", "é"])
def test_a_cursor_of_no_list_is_refused(refusing, path, cursor):
    body = refused(refusing.get(path, params={"cursor": cursor}), 400)
    assert body["code"] == "invalid_cursor"
    names(body, "/query/cursor", "next_cursor")


def test_a_checkpoint_that_does_not_exist_is_refused(api, database, job_in):
    evaluated, bare = job_in("succeeded", "evaluate").run_id, job_in("failed").run_id
    submit(database)
    owned = claim(database)
    store(database, owned, Checkpoint(8, "/nowhere", []))
    finish(database, owned, "succeeded")
    before = count_rows(database)
    for reference, pointer, mend in (
        ({"run": NO_RUN}, "/model/run", "GET /runs"),
        ({"run": evaluated}, "/model/run", "kind train"),
        ({"run": bare}, "/model/checkpoint", "saved a checkpoint"),
        ({"run": owned.run_id, "checkpoint": 9}, "/model/checkpoint", "[8]"),
    ):
        for path, body in (("/jobs/train", TRAIN), ("/jobs/evaluate", TRAIN), ("/analyze/entropy", ENTROPY)):
            names(refused(api.post(path, json=body | {"model": reference})), pointer, mend)
    assert count_rows(database) == before
    accepted = api.post("/analyze/entropy", json=ENTROPY | {"model": {"run": owned.run_id, "checkpoint": 8}})
    assert (accepted.status_code, accepted.json()["depends_on"]) == (202, [])
