"""The pages in a real browser, on the real API and a real database."""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from erpo_core.analysis.given_logprobs import run_given_logprobs
from erpo_core.analysis.perturbation_summary import summarise
from erpo_core.codec import encode_trace
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Checkpoint, Completions, Metrics, Progress, Resolved, Result, Trace
from erpo_core.specs import BranchSpec, EntropySpec, ErpoTrainSpec, PerturbationSpec
from erpo_core.specs.common import JobOptions
from service.app import create_app
from service.cli.up import free_port
from service.db import claims, jobs, records
from service.db.engine import Database
from service.settings import Settings

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"the pages need a browser at {CHROMIUM}")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

EVIL = "<img src=x onerror='window.hacked=1'>"
TOKENS = ["28", " +", " 47", " =", " 75", ".", "\n", " é", "", EVIL, "</script>", " The", " answer"]
PIVOTS = [3, 9, 11]
ENTROPIES = [1.9 if i in PIVOTS else 0.05 * (i % 4) for i in range(len(TOKENS))]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A served database with one training and one analysis: (base URL, run ids by kind)."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("pages"), broker_url="")
    settings.data_dir.mkdir(exist_ok=True)
    database = Database(settings.database_url)
    database.migrate()
    runs = {"train": _training(database), "entropy": _analysis(database), "other": _analysis(database, shift=0.75)}
    runs |= {"perturbation": _perturbation(database), "branch": _branch(database), "bounded": _bounded(database)}
    runs["evaluated"] = _evaluated_training(database)
    runs["queued"] = _submit(database, "train", _train_spec(), "Waiting").run_id
    port = free_port("127.0.0.1")
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), port=port, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", runs
    server.should_exit = True
    thread.join(10)
    database.dispose()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A fresh page; a test fails on any message of error in its console."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.set_default_timeout(15_000)
    troubles = []
    opened.on(
        "console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    yield opened
    opened.close()
    assert troubles == []


def _train_spec() -> ErpoTrainSpec:
    return ErpoTrainSpec(model="smollm2-135m", dataset="reasoning-gym:chain_sum")


def _submit(database: Database, kind: str, spec, name: str):
    with database.write() as session:
        body = spec.model_dump(mode="json", exclude={"job"})
        job = jobs.create_job(session, kind=kind, spec=body, options=JobOptions(name=name).model_dump(mode="json"))
        session.flush()
        session.expunge(job)
        return job


def _run(database: Database, kind: str, spec, name: str, stored: list) -> str:
    job = _submit(database, kind, spec, name)
    with database.write() as session:
        claim = claims.claim_next(session, queues=["default"], worker_id="test", lease_seconds=60)
        assert claim.job_id == job.id
        claims.mark_running(session, job.id, claim.attempt)
    with database.write() as session:
        records.apply_records(session, job_id=job.id, run_id=job.run_id, attempt=claim.attempt, records=stored)
    with database.write() as session:
        claims.finish_attempt(session, job.id, claim.attempt, outcome="succeeded")
    return job.run_id


def _training(database: Database) -> str:
    rows = [
        {
            **{"prompt_id": "p0", "group": 0, "sample": sample, "prompt": "What is 28 + 47?", "gold": "75"},
            **{"completion": EVIL + " \\boxed{75}", "rewards": {"accuracy": 1.0}, "reward": 1.0, "advantage": 0.5},
            **{"verdict": "right", "boxed": True, "truncated": False, "num_tokens": 12},
        }
        for sample in range(4)
    ]
    stored: list = [Resolved({"device": "cpu", "torch": "2.13.0"})]
    stored += [
        Metrics(step, {"reward": step / 10, "entropy": 0.5 / step, "erpo/progress_std": 0.01 * step})
        for step in range(1, 9)
    ]
    stored += [Progress("train", 8, 8, {"reward": 0.8}), Completions(8, rows), _trace(8, training=True)]
    stored += [Checkpoint(8, "/nowhere", [{"path": "adapter_model.safetensors", "size": 4, "sha256": "0" * 64}])]
    return _run(database, "train", _train_spec(), f"Training {EVIL}", [*stored, Result({"steps": 8})])


def _evaluated_training(database: Database) -> str:
    accuracies = {0: 0.0, 4: 1.0, 8: 1.0}
    stored = [Metrics(step, {"reward": 0.5}) for step in range(1, 9)]
    stored += [Metrics(step, {"eval/amc23/acc": acc, "eval/amc23/mean_length": 9}) for step, acc in accuracies.items()]
    return _run(database, "train", _train_spec(), "Evaluated", stored)


def _analysis(database: Database, shift: float = 0.0) -> str:
    spec = EntropySpec(model="smollm2-135m", prompts=("What is 28 + 47?",))
    stored = [_trace(0, shift=shift), _trace(0, sample=1, shift=shift), Result({"num_tokens": len(TOKENS)})]
    return _run(database, "entropy", spec, "Analysis", stored)


def _bounded(database: Database) -> str:
    top = [{"token": EVIL, "logprob": -0.3}, {"token": " no", "logprob": -3.0}]
    content = [{"token": text, "logprob": -0.3, "top_logprobs": top} for text in TOKENS if text]
    given = {"vocab_size": 1000, "texts": [{"prompt": EVIL, "content": content}]}
    spec = EntropySpec(model="an engine", logprobs=given)
    inputs, sent = JobInputs("j", "r", 1, Path("w"), Path("c"), ModelInput("an engine")), []
    run_given_logprobs(spec, inputs, SimpleNamespace(emit=sent.append), SimpleNamespace(requested=False))
    return _run(database, "entropy", spec, "Given", sent)


def _perturbation(database: Database) -> str:
    spec = PerturbationSpec(model="smollm2-135m", dataset="reasoning-gym:chain_sum")
    rows = [
        {"prompt_id": f"{g}/{arm}/3/5>6", "sample": 0, "verdict": "right", "truncated": False} | {"completion": EVIL}
        for g in range(8)
        for arm in spec.arms
        if arm != "high" or g < 6
    ]
    rows += [row | {"prompt_id": f"{g}/high/3/5>6", "truncated": True} for g in (6, 7) for row in rows[:1]]
    edit = {"position": 3, "progress": 0.2, "entropy": 1.5, "token": EVIL, "replacement": None, "surprisal": 4.0}
    result = summarise(rows, [{"group": 0, "arm": arm, "edits": [edit]} for arm in spec.arms], spec)
    result |= {"num_tried": 20, "num_solved": 9, "num_too_short": 1, "solve_rate": 0.4}
    return _run(database, "perturbation", spec, "Perturbation", [Completions(0, rows), Result(result)])


def _branch(database: Database) -> str:
    spec = BranchSpec(model="smollm2-135m", sequence="seq_" + "0" * 32, position=3)
    one = {"token": EVIL, "token_id": 5, "logp": -0.5, "is_written": True, "num": 8, "truncated": 1, "right": 6}
    one |= {"rate": {"value": 0.75, "low": 0.41, "high": 0.93}, "answers": [{"answer": EVIL, "count": 8}]}
    result = {"prompt": EVIL, "prefix": "28 + 47", "position": 3, "entropy": 1.9, "gold": "75"}
    branches = [one | {"examples": [EVIL]}, one | {"examples": [], "token": " no", "is_written": False, "right": 2}]
    return _run(database, "branch", spec, "Branches", [Result(result | {"branches": branches})])


def _trace(step: int, *, sample: int = 0, training: bool = False, shift: float = 0.0) -> Trace:
    size = len(TOKENS)
    columns = {
        "token_ids": np.arange(100, 100 + size, dtype=np.uint32),
        "entropy": np.array(ENTROPIES, dtype=np.float32) + np.float32(shift),
        "logp": np.linspace(-2, 0, size, dtype=np.float16),
        "progress": np.linspace(-1, 1, size, dtype=np.float16),
        "rank": np.zeros(size, dtype=np.uint16),
    }
    if training:
        for name in ("gate", "normalized_progress", "psi", "advantage", "leverage"):
            columns[name] = np.linspace(0 if name in ("gate", "leverage") else -1, 1, size, dtype=np.float16)
    alternatives = [{"token": EVIL, "token_id": 109, "logp": -0.5}, {"token": " no", "token_id": 5, "logp": -1.5}]
    meta = {
        **{"prompt_id": "p0", "group": 0, "sample": sample, "prompt": f"Prompt {EVIL}", "completion": "".join(TOKENS)},
        **{"num_tokens": size, "reward": 1.0, "advantage": 0.5, "histogram": [size] + [0] * 63, "group_stats": {}},
        "stats": {"h_mean": 0.3, "h_p50": 0.1, "h_p95": 1.9, "h_max": 1.9},
        "tokens": TOKENS,
        "pivots": [
            {"position": p, "entropy": 1.9, "token": TOKENS[p], "logp": -0.5, "alternatives": alternatives}
            for p in PIVOTS
        ],
        **{"model_digest": "m", "adapter_digest": None, "tokenizer_digest": "t", "temperature": 1.0},
        **{"dtype": "float32", "head_dtype": "float32", "exact": True, "verdict": "wrong" if sample else "right"},
    }
    return Trace(step, meta, encode_trace(columns))


def _current(page) -> int:
    """Position of the token in focus."""
    return int(page.evaluate("document.activeElement.dataset.first ?? -1"))


def test_the_list_links_to_every_run(service, page):
    base, runs = service
    page.goto(base)
    page.locator(f"a[href='/runs/{runs['train']}']").wait_for()
    assert page.locator(f"a[href='/analyze/perturbation/{runs['perturbation']}']").count() == 1
    assert page.locator(f"a[href='/analyze/entropy/{runs['entropy']}']").count() == 1
    assert page.locator("#jobs tbody tr").count() == len(runs)
    page.get_by_role("button", name="Entropy").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(3)


def test_a_run_shows_curves_answers_traces_and_configuration(service, page):
    base, runs = service
    page.goto(f"{base}/runs/{runs['train']}")
    page.locator("#charts .chart svg .line").first.wait_for()
    assert page.locator("#charts .chart-title").all_text_contents()[:2] == ["Reward", "Entropy, nats"]
    assert page.locator("#status").inner_text() == "succeeded"
    page.locator("#completions tbody tr").first.wait_for()
    assert page.locator("#completions tbody tr").count() == 4
    assert page.locator(f"#traces a[href='/runs/{runs['train']}/traces/0']").count() == 1
    assert "num_generations" in page.locator("#config").inner_text()
    assert "2.13.0" in page.locator("#resolved").inner_text()
    page.locator("#checkpoints", has_text="Step 8").wait_for()
    page.locator("#events", has_text="job.status").wait_for()


def test_smoothing_keeps_the_raw_curve(service, page):
    base, runs = service
    page.goto(f"{base}/runs/{runs['train']}")
    page.locator("#charts .chart svg .line").first.wait_for()
    assert page.locator("#charts .raw").count() == 0
    page.locator("#smoothing").fill("60")
    page.locator("#charts .chart svg .raw").first.wait_for(state="attached")
    assert page.locator("#charts .line").count() == page.locator("#charts .raw").count()


def test_evaluations_on_the_way_are_drawn_as_an_average_over_what_was_measured(service, page):
    base, runs = service
    page.goto(f"{base}/runs/{runs['evaluated']}")
    chart = page.locator("#charts .chart", has_text="eval/amc23/acc (EMA 0.2)")
    chart.locator(".line").wait_for()
    assert chart.locator(".chart-value").inner_text() == "0.36", "0, then 0.2, then 0.36"
    assert chart.locator(".raw").count() == 1
    assert chart.locator(".dot.pale").count() == 3
    assert page.locator("#charts .chart-title").all_text_contents()[0] == "Reward"
    assert page.locator("#charts .raw").count() == 2, "the reward is drawn as it is"


def test_a_queued_job_can_be_cancelled_from_its_page(service, page):
    base, runs = service
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"{base}/runs/{runs['queued']}")
    page.get_by_role("button", name="Cancel").click()
    page.locator("#status .is-cancelled").wait_for()


def test_the_keyboard_alone_walks_through_an_answer(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".token").first.wait_for()
    assert page.locator(".token[tabindex='0']").count() == 1
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "n", "n", "n", "n", "p", "End", "Home"):
        page.keyboard.press(key)
        seen.append(_current(page))
    assert seen == [0, 1, 0, 3, 9, 11, 3, 11, 12, 0]
    assert page.locator(".token[tabindex='0']").count() == 1


def test_the_card_tells_channels_and_alternatives(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}#n=0&t=9")
    card = page.locator("#card")
    card.get_by_text("It could have been").wait_for()
    text = card.inner_text()
    assert "pivot" in text
    assert "1.9" in text
    assert page.locator(".alternatives li").count() == 2
    assert page.locator(".alternatives .is-written").count() == 1


def test_pivots_carry_a_shape_and_cells_their_colours(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".token").first.wait_for()
    assert page.locator("#tokens .is-pivot").count() == len(PIVOTS)
    marks = page.evaluate("getComputedStyle(document.querySelector('#tokens .is-pivot'), '::before').content")
    assert marks == '"▲"'
    colours = page.eval_on_selector_all("#tokens .token", "cells => cells.map(c => c.style.backgroundColor)")
    assert colours[3] == colours[8] != colours[0]


def test_tokens_of_one_character_share_a_cell(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".token").first.wait_for()
    assert page.locator("#tokens .token").count() == len(TOKENS) - 1
    assert page.locator(".token[data-first='7']").inner_text().strip() == "é"


def test_another_answer_is_one_key_away(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".pick[aria-current]").wait_for()
    assert [mark.get_attribute("aria-label") for mark in page.locator(".pick .verdict").all()[:2]] == ["right", "wrong"]
    page.keyboard.press("]")
    expect(page).to_have_url(re.compile("#n=1"))


def test_the_credit_microscope_switches_channels(service, page):
    base, runs = service
    page.goto(f"{base}/runs/{runs['train']}/traces/0")
    page.locator(".token").first.wait_for()
    names = page.locator("#channels button").all_text_contents()
    assert names == [
        *("Entropy", "Log-prob", "Progress", "KL", "Gate", "Norm. progress", "Shift", "Advantage", "Leverage", "Rank")
    ]
    before = page.locator(".token").first.get_attribute("style")
    page.get_by_role("button", name="Advantage").click()
    assert page.locator(".token").first.get_attribute("style") != before
    assert "≤ −" in page.locator("#legend-ends").inner_text()


def test_another_analysis_of_the_same_tokens_is_a_difference(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}#n=0&t=3")
    page.locator("#card .values").wait_for()
    page.locator("#other").select_option(runs["other"])
    page.locator("#channels").get_by_text("ΔH").wait_for()
    expect(page.locator("#card")).to_contain_text("ΔH")
    assert "0.75" in page.locator("#card").inner_text()
    assert f"vs={runs['other']}" in page.url
    page.reload()
    page.locator("#channels [aria-pressed='true']", has_text="ΔH").wait_for()


def test_bounds_are_drawn_as_bounds(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['bounded']}#n=0&t=3")
    page.locator("#card .values").wait_for()
    expect(page.locator("#inexact")).to_contain_text("Not exact")
    assert page.locator("#channels [aria-pressed='true']").inner_text() == "Entropy, at least"
    assert page.locator("#curve .band").count() == 1
    assert "H ≥" in page.locator(".pick").first.inner_text()
    assert "entropy at least" in page.locator(".token").first.get_attribute("aria-label")
    card = page.locator("#card").inner_text()
    assert "Entropy, at least" in card
    assert "Entropy, at most" in card
    assert page.locator("#other").is_hidden()
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".token").first.wait_for()
    assert page.locator("#inexact").is_hidden()


def test_b_on_a_token_orders_its_branches_once(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
    page.locator(".token").first.wait_for()
    for _ in range(2):
        page.keyboard.press("n")
        page.keyboard.press("b")
        page.wait_for_url("**/analyze/branch/*")
        expect(page.locator("#status")).to_have_text("queued")
        address = page.url
        page.go_back()
        page.goto(f"{base}/analyze/entropy/{runs['entropy']}")
        page.locator(".token").first.wait_for()
    spec = httpx.get(address).json()["spec"]
    assert (spec["position"], spec["model"]) == (PIVOTS[0], "smollm2-135m")
    found = httpx.get(f"{base}/runs", params={"kind": "branch"}).json()["data"]
    assert len([run for run in found if run["spec"]["position"] == PIVOTS[0] and run["status"] == "queued"]) == 1


def test_a_perturbation_shows_effects_and_gives_its_figure_away(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/perturbation/{runs['perturbation']}")
    page.locator("#figure svg").wait_for()
    label = page.locator("#figure svg").get_attribute("aria-label")
    assert "high entropy replaced 75.0%" in label
    assert "low entropy replaced 100.0%" in label
    first = page.locator("#contrasts tbody tr").first.inner_text()
    assert "+25.0" in first
    assert "McNemar, exact: 2 against 0" in first
    for name, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("Summary, JSON", b"{")):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert download.value.path().read_bytes().startswith(start)
    with page.expect_download() as download:
        page.get_by_role("link", name="All outcomes, CSV").click()
    assert download.value.path().read_text().count("/") == 0


def test_a_tree_of_branches_tells_where_each_token_leads(service, page):
    base, runs = service
    page.goto(f"{base}/analyze/branch/{runs['branch']}")
    page.locator("#branches > li").first.wait_for()
    assert page.locator("#branches > li").count() == 2
    assert page.locator("#branches > .is-written").count() == 1
    text = page.locator("#branches").inner_text()
    assert "6 of 8 right" in text
    assert "41.0% – 93.0%" in text


def test_a_saved_page_works_without_a_service(service, page, tmp_path):
    base, runs = service
    saved = tmp_path / "page.html"
    saved.write_bytes(httpx.get(f"{base}/analyze/entropy/{runs['entropy']}/export?format=html").content)
    page.route("http://**/*", lambda route: route.abort())
    page.goto(saved.as_uri())
    page.locator(".token").first.wait_for()
    seen = []
    for key in ("ArrowRight", "n", "n", "b", "]"):
        page.keyboard.press(key)
        seen.append(_current(page))
    assert seen[:4] == [0, 3, 9, 9]
    expect(page.locator(".pick[aria-current]")).to_contain_text("#1")
    assert page.evaluate("window.hacked") is None
    page.get_by_role("button", name="Rank").click()
    page.locator("#palette").select_option("cividis")
    assert page.locator(".token").first.get_attribute("style")


@pytest.mark.parametrize("place", ["list", "run", "analysis", "bounded", "trace", "perturbation", "branch"])
def test_what_a_model_wrote_stays_text(service, page, place):
    base, runs = service
    path, ready = {
        "list": ("/", "#jobs tbody tr"),
        "run": (f"/runs/{runs['train']}", "#completions tbody tr"),
        "analysis": (f"/analyze/entropy/{runs['entropy']}#n=0&t=9", ".alternatives li"),
        "bounded": (f"/analyze/entropy/{runs['bounded']}#n=0&t=9", ".token"),
        "trace": (f"/runs/{runs['train']}/traces/0#t=9", ".alternatives li"),
        "perturbation": (f"/analyze/perturbation/{runs['perturbation']}", "#examples tbody tr"),
        "branch": (f"/analyze/branch/{runs['branch']}", "#branches > li"),
    }[place]
    page.goto(base + path)
    page.locator(ready).first.wait_for()
    page.locator("main", has_text="onerror").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img").count() == 0


def test_pages_are_for_browsers_and_documents_for_clients(service):
    base, runs = service
    for path in (f"/runs/{runs['train']}", f"/analyze/entropy/{runs['entropy']}"):
        page = httpx.get(base + path, headers={"Accept": "text/html,*/*;q=0.8"})
        assert page.headers["content-type"].startswith("text/html")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe-inline" not in page.headers["content-security-policy"]
        assert page.headers["vary"] == "Accept"
        document = httpx.get(base + path)
        assert document.headers["content-type"].startswith("application/json")
        assert document.json()["id"] in path


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "service/dashboard/static").glob("*.js")))
def test_scripts_never_write_markup(path):
    text = path.read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text
