"""A real browser, where one is installed: what it makes of a page, at the width of a phone and of a screen."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium", path="/usr/bin")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="/usr/bin/chromium is not installed")
_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def run_browser(profile: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def browse(address: str, profile: pathlib.Path, *flags: str) -> tuple[str, str]:
    """Opens a page; gives its DOM after loading and the browser's log."""
    window = ("--enable-logging=stderr", "--dump-dom", "--window-size=1400,1000")
    done = run_browser(profile, *window, *flags, address)
    return done.stdout, done.stderr


def framed(page: str, width: int, directory: pathlib.Path) -> str:
    """The address of a page that holds another in a frame, and what that posts in ``data-found``.

    A headless window cannot be as narrow as a phone; a frame can.
    """
    (directory / "inner.html").write_text(page)
    outer = directory / f"outer-{width}.html"
    outer.write_text(
        '<!DOCTYPE html><body><script>onmessage = e => document.body.setAttribute("data-found", e.data)</script>'
        f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe></body>'
    )
    return outer.as_uri()
