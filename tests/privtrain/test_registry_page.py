"""The read-only page: what it shows, whom it lets in, and what a real browser makes of it."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import httpx
import pytest
from starlette.testclient import TestClient

from privtrain.registry import web
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.store import Registry
from privtrain.registry.web import create_app, is_loopback
from tests.browser import browse, framed, needs_browser
from tests.privtrain.registry_work import request


@pytest.fixture
def filled(tmp_path) -> Registry:
    registry = Registry(str(tmp_path / "registry.db"))
    registry.set_budget("mail", epsilon=8, delta=1e-6, period_seconds=365 * 86400, population="<b>people</b>")
    registry.set_budget("chat", epsilon=3, delta=1e-6, scope="dataset", population="<b>people</b>")
    for index in range(5):
        registry.reserve(request(f"<i>run</i>-{index}", dataset="mail"))
    users = {f"{user:032x}": (user + 1, 2 * user + 2) for user in range(3)}
    registry.settle("<i>run</i>-0", LedgerEvidence(900, "h"), contributions=users)
    registry.forget(f"{1:032x}")
    return registry


def client(registry: Registry, **kwargs) -> TestClient:
    reader = Registry(str(registry.database.url.database), read_only=True)
    return TestClient(create_app(reader.database, **kwargs), base_url="http://127.0.0.1:8765")


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.S).split())


def test_the_page_shows_budgets_and_runs(filled):
    page = client(filled).get("/")
    assert page.status_code == 200
    text = text_of(page.text)
    for fact in (
        "Each user of &lt;b&gt;people",
        "of 8 at δ 1e-06 in any 365 days",
        "5 runs, 4 not ended",
        "Data set chat",
    ):
        assert fact in text, fact
    assert "(1.603, 1e-05) for one user" in text
    assert "noise 73, prob 1, 900 steps" in text
    assert "<i>" not in page.text, "names are escaped"
    assert page.text.count("<svg") == 2


def test_a_user_is_looked_up_by_pseudonym(filled):
    text = text_of(client(filled).get("/user", params={"pseudonym": f"{1:032x}"}).text)
    assert "On the do-not-train list since" in text
    assert "(1.603, 1e-05)-DP for one user" in text
    assert "run&lt;/i&gt;-4 (open)" in text
    assert "None that has finished" in text_of(client(filled).get("/user", params={"pseudonym": "f" * 32}).text)
    assert "is no pseudonym" in text_of(client(filled).get("/user", params={"pseudonym": "alice"}).text)


def test_the_page_only_reads_and_asks_for_nothing_outside(filled):
    http = client(filled)
    assert all(http.request(method, "/").status_code == 405 for method in ("POST", "PUT", "DELETE"))
    for page in (http.get("/"), http.get("/user")):
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"
        assert "<script" not in page.text
        assert re.findall(r"(?:src|href|url)\W+https?:", page.text) == []


def test_other_host_names_are_refused_on_loopback(filled):
    assert client(filled).get("/", headers={"host": "evil.example"}).status_code == 400


def test_every_address_of_loopback_answers_under_its_own_name(filled, monkeypatch):
    apps = []
    monkeypatch.setattr(web.uvicorn, "Config", lambda app, **_: apps.append(app))
    monkeypatch.setattr(
        web.uvicorn, "Server", lambda _: types.SimpleNamespace(run=lambda listeners: listeners[0].close())
    )
    web.run_server(filled.database, host="127.0.0.2", port=0)
    http = TestClient(apps[0], base_url="http://127.0.0.2")
    assert http.get("/").status_code == 200
    assert http.get("/", headers={"host": "evil.example"}).status_code == 400


def test_a_token_is_asked_for_and_leaves_the_address(filled):
    http = client(filled, token="s3cret", hosts=["*"])
    assert http.get("/", headers={"host": "registry.internal"}).status_code == 401
    assert http.get("/?token=guess").status_code == 401
    assert http.get("/", headers={"authorization": "Bearer s3cret"}).status_code == 200
    answer = http.get("/?token=s3cret", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert http.get("/").status_code == 200


def test_a_database_that_is_gone_is_an_error_not_an_empty_page(filled):
    http = client(filled)
    pathlib.Path(str(filled.database.url.database)).unlink()
    assert http.get("/").status_code == 503


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False)],
)
def test_only_loopback_needs_no_token(host, local):
    assert is_loopback(host) is local


@pytest.fixture
def served(filled) -> Iterator[str]:
    """The page as the command serves it."""
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "privtrain",
            "ledger",
            "serve",
            "--port",
            "0",
            "--registry",
            str(filled.database.url.database),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(pathlib.Path.cwd()),
            "PYTHONUNBUFFERED": "1",
            "HOME": "/nonexistent",
        },
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(found[0], timeout=60)
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield found[0]
        process.terminate()


#: Contrast of every text with what is behind it, by WCAG 2's formula; the width that the page needs; the scheme.
_PROBE = """<script>onload = () => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  let least = 99;
  for (const e of document.querySelectorAll('body *')) {
    if (e.tagName === 'SCRIPT' || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(numbers(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
    least = Math.min(least, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  const paths = document.querySelectorAll('svg path').length;
  parent.postMessage([document.documentElement.scrollWidth, paths, least.toFixed(2),
    matchMedia('(prefers-color-scheme: dark)').matches], '*');
}</script></body>"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_finds_it_legible_at_both_widths(filled, tmp_path, scheme):
    page = client(filled).get("/").text.replace("</body>", _PROBE)
    for width in (1280, 400):
        flag = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
        dom, log = browse(framed(page, width, tmp_path), tmp_path / "profile", flag)
        found = re.search(r'data-found="(\d+),(\d+),([\d.]+),(true|false)"', dom)
        assert found, log
        assert int(found[1]) <= width
        assert int(found[2]) >= 6
        assert float(found[3]) >= 4.5, "text that is hard to read"
        assert found[4] == ("true" if scheme == "dark" else "false")


@needs_browser
def test_a_browser_finds_no_fault_with_the_page_as_served(served, tmp_path):
    dom, log = browse(served, tmp_path / "profile")
    assert "Privacy budgets" in dom
    assert "5 runs, 4 not ended" in dom
    assert "CONSOLE" not in log
    assert "Refused to" not in log
