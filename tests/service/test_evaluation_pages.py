"""The pages of evaluations in a real browser: numbers, problems, answers, comparisons."""

import httpx
import pytest
from playwright.sync_api import expect
from test_api_evaluations import evaluated
from test_pages import browser, page, pytestmark  # noqa: F401

RUNS = [("base", [0, 1, 2, 4]), ("trained", [4, 4, 3, 4])]


@pytest.fixture
def runs(sqlite_database):
    return [evaluated(sqlite_database, right, model=model) for model, right in RUNS]


@pytest.fixture
def base(serving, sqlite_database, tmp_path, runs):
    from service.settings import Settings

    with serving(Settings(data_dir=tmp_path, database_url=sqlite_database.url)) as client:
        yield str(client.base_url).rstrip("/")


def test_an_evaluation_shows_numbers_and_every_answer(base, runs, page):  # noqa: F811
    page.goto(f"{base}/evaluations/{runs[0]}")
    page.locator("#numbers tbody tr").first.wait_for()
    rows = page.locator("#numbers tbody th").all_inner_texts()
    assert rows[:4] == ["Acc", "Fmt", "pass@2", "pass@4"]
    assert any(name.startswith("Acc, level 1") for name in rows)
    assert page.locator("#numbers svg.interval").count() == len(rows)
    assert "43.8%" in page.locator("#tiles").inner_text()
    expect(page.locator("#problems .problem-open")).to_have_count(4)
    page.locator("#order").select_option("easy")
    assert "p/3" in page.locator("#problems tbody tr").first.inner_text()
    page.locator("#filter").fill("p/1")
    expect(page.locator("#problems .problem-open")).to_have_count(1)
    page.locator(".problem-open").click()
    expect(page.locator(".answer-box")).to_have_count(4)
    assert "unparsable" in page.locator(".answer-box summary").nth(1).inner_text()
    page.locator(".answer-box summary").nth(1).click()
    expect(page.locator(".answer-box").nth(1).locator(".answer-text")).to_contain_text("onerror=alert(1)")
    assert page.locator("main img").count() == 0


def test_a_comparison_shows_differences_and_the_problems_behind_them(base, runs, page):  # noqa: F811
    page.goto(f"{base}/evaluations/compare?evaluation={runs[0]}&evaluation={runs[1]}")
    table = page.locator(".benchmark table").first
    table.locator("tbody tr").nth(1).wait_for()
    assert "baseline" in table.locator("tbody tr").first.inner_text()
    told = table.locator("tbody tr").nth(1).inner_text()
    assert "+50.0" in told
    assert "3 / 1 / 0" in told
    page.locator(".differing summary").click()
    expect(page.locator(".differing tbody tr")).to_have_count(3)
    assert "+4" in page.locator(".differing tbody tr").first.inner_text()
    assert page.locator("main img").count() == 0
    page.locator(".differing tbody a").first.click()
    expect(page.locator(".answer-box")).to_have_count(4)


def test_evaluations_are_chosen_for_comparison(base, runs, page):  # noqa: F811
    page.goto(f"{base}/evaluations/compare?evaluation={runs[0]}")
    page.locator(f"#picker input[value='{runs[1]}']").check()
    page.locator("#compare").click()
    page.locator(".benchmark").wait_for()
    assert page.url.endswith(f"?evaluation={runs[0]}&evaluation={runs[1]}")


def test_a_report_is_no_page(base, runs):
    address = f"{base}/evaluations/report?evaluation={runs[0]}&format=markdown"
    answer = httpx.get(address, headers={"Accept": "text/html,*/*;q=0.8"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/markdown; charset=utf-8")
    assert "| base | 43.75" in answer.text
