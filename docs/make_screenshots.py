"""Write the pictures of docs/images from a service after a demo; perturbation.png and branch.png where one has ended.

    python docs/make_screenshots.py http://127.0.0.1:8000

Needs Playwright and a Chromium (``--chromium``).
"""

import argparse
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from service.client import ErpoClient

IMAGES = Path(__file__).parent / "images"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    with ErpoClient(arguments.url) as client:
        training, analysis = newest(client, "train"), newest(client, "entropy")
        perturbations, branches = (
            client.jobs.list(kind=kind, status="succeeded", limit=1)["data"] for kind in ("perturbation", "branch")
        )
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 860}, color_scheme="light")
        take_run(page, f"{arguments.url}/runs/{training}")
        take_entropy(page, f"{arguments.url}/analyze/entropy/{analysis}")
        for job in perturbations:
            take_perturbation(page, f"{arguments.url}/analyze/perturbation/{job['run_id']}")
        for job in branches:
            take_branch(page, f"{arguments.url}/analyze/branch/{job['run_id']}")
        browser.close()


def newest(client: ErpoClient, kind: str) -> str:
    """The run of the newest finished job of a kind.

    Raises:
        SystemExit: there is none.
    """
    jobs = client.jobs.list(kind=kind, status="succeeded", limit=1)["data"]
    if not jobs:
        raise SystemExit(f"no finished job of kind {kind}: run `erpo demo` first")
    return jobs[0]["run_id"]


def take_run(page: Page, address: str) -> None:
    """Curves and configuration of a training."""
    page.goto(address)
    page.locator("#charts .chart svg .line").first.wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "run.png")


def take_entropy(page: Page, address: str) -> None:
    """A coloured answer with its first pivot in focus."""
    page.goto(address)
    page.locator(".token").first.wait_for()
    page.keyboard.press("n")
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "entropy.png")


def take_perturbation(page: Page, address: str) -> None:
    """Accuracy by arm and the contrasts."""
    page.goto(address)
    page.locator("#figure svg").wait_for()
    page.screenshot(path=IMAGES / "perturbation.png")


def take_branch(page: Page, address: str) -> None:
    """The alternatives of a token and how often each came to the right answer."""
    page.goto(address)
    page.locator("#branches li").first.wait_for()
    page.screenshot(path=IMAGES / "branch.png")


if __name__ == "__main__":
    main()
