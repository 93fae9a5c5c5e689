"""A real browser that opens a report."""

from __future__ import annotations

import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, tmp_path, *arguments: str, query: str = "") -> subprocess.CompletedProcess:
    """A headless Chromium opens the page; what it complains about is an error of the page."""
    quiet = ("background-networking", "component-update", "sync")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         *(f"--disable-{name}" for name in quiet), f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1200,2600", "--virtual-time-budget=4000", "--enable-logging=stderr", *arguments,
         f"{page.as_uri()}{query}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to look at the page with")
