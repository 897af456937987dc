"""Who may do what, what stands open, what the API says about itself, and that it loads no machine-learning library."""

import json
import re
import subprocess
import sys

import pytest
from db_rows import call, job_of
from fastapi.routing import APIRoute

from service.app import create_app
from service.db import keys
from service.settings import Settings

TRAIN = {"model": "smollm2-135m", "dataset": "data:sums.jsonl"}
OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/session"), ("DELETE", "/session")}
NO_JOB, NO_RUN = "job_" + "0" * 32, "run_" + "0" * 32


@pytest.fixture
def database(sqlite_database):
    """Rights do not depend on the database."""
    return sqlite_database


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> list[tuple[str, str]]:
    """(method, path) of every documented route."""
    found = create_app(Settings(data_dir=tmp_path_factory.mktemp("routes"))).routes
    documented = [route for route in found if isinstance(route, APIRoute) and route.include_in_schema]
    return [(method, route.path) for route in documented for method in sorted(route.methods)]


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    """The OpenAPI document as it is sent."""
    return json.loads(json.dumps(create_app(Settings(data_dir=tmp_path_factory.mktemp("document"))).openapi()))


@pytest.fixture
def key(database):
    """Makes a key; its header."""

    def make(scope: str, owner: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {call(database, keys.create_key, scope=scope, owner=owner)[1]}"}

    return make


IDS_IN_QUERY = ("/evaluations/compare", "/evaluations/report")


def refused(response, status: int, code: str) -> dict:
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), (response.request.url, body)
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    return body


def send(client, method: str, route: str, headers: dict, job_id: str = NO_JOB, run_id: str = NO_RUN):
    """A request that is right but for its rights and ids."""
    path = route.format(job_id=job_id, run_id=run_id, n=0, step=0)
    if route == "/datasets" and method == "POST":
        return client.post(path, headers=headers, files={"file": ("a.jsonl", b'{"problem": "1 + 1?", "answer": "2"}')})
    bodies = {"/jobs/train": TRAIN, "/jobs/evaluate": TRAIN, "/session": {"key": "none"}}
    bodies["/analyze/entropy"] = {"model": "smollm2-135m", "prompts": ["1 + 1?"]}
    bodies["/analyze/perturbation"] = TRAIN
    body = {} if method == "PATCH" else bodies.get(route) if method == "POST" else None
    return client.request(method, path, headers=headers, json=body)


def test_without_a_key_only_what_is_meant_to_be_open_is_open(api, key, routes):
    valid = key("admin")
    for wrong in ({}, {"Authorization": "Bearer erpo_none"}, {"Authorization": valid["Authorization"][:-1]}):
        for method, route in routes:
            if (method, route) not in OPEN:
                refused(send(api, method, route, wrong), 401, "unauthenticated")
    for scheme in ("Basic", "Bearer2"):
        header = {"Authorization": valid["Authorization"].replace("Bearer", scheme)}
        refused(api.get("/jobs", headers=header), 401, "unauthenticated")
    assert api.get("/jobs", headers=valid).json()["data"] == []


def test_health_and_description_stand_open(api, key):
    key("admin")
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/style.css"):
        assert api.get(path).status_code == 200, path


def test_a_key_for_reading_changes_nothing(api, key, routes):
    reader = key("read")
    for method, route in routes:
        if (method, route) in OPEN:
            continue
        response = send(api, method, route, reader)
        if method == "GET":
            # 422: the ids stand in the query, see test_api_evaluations.
            assert response.status_code == 422 if route in IDS_IN_QUERY else response.status_code in (200, 404), route
        else:
            assert "submit" in refused(response, 403, "insufficient_scope")["detail"]
    assert api.get("/jobs", headers=reader).json()["data"] == []


def test_a_revoked_key_opens_nothing_at_once(api, database, key):
    kept, header = key("read"), key("admin")
    assert api.get("/jobs", headers=header).status_code == 200
    with database.read() as session:
        newest = keys.list_keys(session)[0]
    call(database, keys.revoke_key, newest.id)
    refused(api.get("/jobs", headers=header), 401, "unauthenticated")
    refused(api.post("/session", json={"key": header["Authorization"].split()[1]}), 401, "unauthenticated")
    assert api.get("/jobs", headers=kept).status_code == 200


def test_without_keys_this_machine_alone_is_trusted(serve):
    assert serve().get("/session").json() == {"scope": "admin", "owner": None, "auth_required": False}
    exposed = serve(host="0.0.0.0")
    refused(exposed.get("/session"), 401, "unauthenticated")
    refused(exposed.post("/jobs/train", json=TRAIN), 401, "unauthenticated")


def test_what_somebody_else_owns_does_not_exist(api, key, routes):
    ann, bob, admin = key("submit", "ann"), key("submit", "bob"), key("admin", "eve")
    job = api.post("/jobs/train", json=TRAIN, headers=ann).json()
    place = {"job_id": job["id"], "run_id": job["run_id"]}
    unknown = {NO_JOB: job["id"], NO_RUN: job["run_id"]}
    for method, route in routes:
        if "_id}" in route:
            # The answer is the one for an id that names nothing, word for word.
            hidden = refused(send(api, method, route, bob, **place), 404, "not_found")["detail"]
            missing = send(api, method, route, bob).json()["detail"]
            assert hidden == re.sub("|".join(unknown), lambda match: unknown[match[0]], missing)
    for path in ("/jobs", "/runs"):
        assert api.get(path, headers=bob).json()["data"] == []
        for header in (ann, admin):
            assert len(api.get(path, headers=header).json()["data"]) == 1
    assert api.get(f"/jobs/{job['id']}", headers=ann).json()["status"] == "queued"
    assert api.post(f"/jobs/{job['id']}/cancel", headers=admin).json()["status"] == "cancelled"


def test_the_same_idempotency_key_of_two_callers_is_two_orders(api, key):
    once = {"Idempotency-Key": "one"}
    jobs = {
        api.post("/jobs/train", json=TRAIN, headers=key("submit", who) | once).json()["id"] for who in ("ann", "bob")
    }
    assert len(jobs) == 2


def test_an_order_cannot_name_what_somebody_else_owns(api, key):
    ann, bob = key("submit", "ann"), key("submit", "bob")
    run = api.post("/jobs/train", json=TRAIN, headers=ann).json()["run_id"]
    upload = {"file": ("a.jsonl", b'{"problem": "1 + 1?", "answer": "2"}\n' * 2)}
    data = api.post("/datasets", files=upload, headers=ann).json()["id"]
    for change, pointer in (
        ({"model": {"run": run}}, "/model/run"),
        ({"job": {"depends_on": [run]}}, "/job/depends_on/0"),
        ({"dataset": data}, "/dataset"),
        ({"dataset": f"data:uploads/{data}.jsonl"}, "/dataset"),
    ):
        for header, status in ((bob, 422), (ann, 422 if "uploads/" in str(change) else 202)):
            response = api.post("/jobs/train", json=TRAIN | change, headers=header)
            assert response.status_code == status, (change, response.json())
            assert status == 202 or response.json()["errors"][0]["pointer"] == pointer
    assert api.get("/datasets", headers=bob).json()["data"] == []


def test_keys_of_one_owner_share_its_jobs_and_a_key_without_owner_is_its_own(api, database, key):
    first, second, single, other = key("submit", "ann"), key("read", "ann"), key("submit"), key("submit")
    job = api.post("/jobs/train", json=TRAIN, headers=first).json()
    assert api.get(f"/jobs/{job['id']}", headers=second).json() == job
    alone = api.post("/jobs/train", json=TRAIN, headers=single).json()["id"]
    assert job_of(database, alone).owner.startswith("key_")
    assert [len(api.get("/jobs", headers=header).json()["data"]) for header in (single, other, second)] == [1, 0, 1]


def test_jobs_from_before_the_first_key_are_the_admins(api, key):
    job = api.post("/jobs/train", json=TRAIN).json()["id"]
    admin, submitter = key("admin"), key("submit")
    refused(api.get(f"/jobs/{job}", headers=submitter), 404, "not_found")
    assert api.get(f"/jobs/{job}", headers=admin).status_code == 200


def test_a_session_cookie_has_the_rights_of_its_key(api, key):
    reader = key("read", "ann")
    opened = api.post("/session", json={"key": reader["Authorization"].split()[1]})
    assert opened.json() == {"scope": "read", "owner": "ann", "auth_required": True}
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert api.get("/session").json()["owner"] == "ann"
    assert api.get("/jobs").status_code == 200
    refused(api.post("/jobs/train", json=TRAIN), 403, "insufficient_scope")
    assert api.delete("/session").status_code == 204
    refused(api.get("/jobs"), 401, "unauthenticated")


def test_pages_of_other_sites_change_nothing(api):
    for headers, status, code in (
        ({"Sec-Fetch-Site": "cross-site"}, 403, "cross_site"),
        ({"Origin": "http://evil.example"}, 403, "cross_site"),
        ({"Origin": "null"}, 403, "cross_site"),
        ({"Host": "evil.example"}, 421, "unknown_host"),
    ):
        refused(api.post("/jobs/train", json=TRAIN, headers=headers), status, code)
    assert api.get("/jobs").json()["data"] == []


def test_the_same_origin_may_change_things_and_every_answer_is_guarded(api):
    origin = {"Origin": str(api.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    answers = (api.post("/jobs/train", json=TRAIN, headers=origin), api.get("/nothing"), api.get("/healthz"))
    assert [answer.status_code for answer in answers] == [202, 404, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


HEAVY = ("torch", "transformers", "trl", "peft", "vllm", "accelerate", "datasets")
LOOK = f"""
import sys
from service.app import create_app
from service.settings import Settings
app = create_app(Settings())
app.openapi()
from erpo_core.data.datasets import check_dataset
assert check_dataset("reasoning-gym:chain_sum?size=7", None) == 7
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_the_service_loads_no_machine_learning_library(tmp_path):
    environment = {"ERPO_DATA_DIR": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def operations(document: dict) -> list[tuple[str, str, dict]]:
    return [(method, path, found) for path, item in document["paths"].items() for method, found in item.items()]


def test_the_document_is_whole(document):
    assert document["openapi"].startswith("3.1")
    ids = [found["operationId"] for _, _, found in operations(document)]
    assert len(set(ids)) == len(ids) > 35
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= document["components"]["schemas"].keys()
    for _, path, found in operations(document):
        named = {item["name"] for item in found.get("parameters", []) if item["in"] == "path"}
        assert named == set(re.findall(r"\{(\w+)\}", path))
        assert found["description"]
        assert all(answer["description"] for answer in found["responses"].values())


def test_every_error_is_documented_as_a_problem(document):
    for method, path, found in operations(document):
        answers = found["responses"]
        for status, answer in answers.items():
            if status >= "400" and (path, status) != ("/readyz", "503"):
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (path, status)
        closed = (method.upper(), path) not in OPEN
        names = {item["name"] for item in found.get("parameters", [])}
        expected = {
            *({"401"} if closed else ()),
            *({"403"} if closed and method != "get" else ()),
            *({"404"} if "_id}" in path else ()),
            *({"400"} if "cursor" in names else ()),
            *({"409"} if "idempotency-key" in names else ()),
        }
        assert expected <= answers.keys(), (method, path)
