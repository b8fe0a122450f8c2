from __future__ import annotations

import html.parser
import io
import json
import pathlib
import re

import pytest
import rich.console

from attacks.analysis import analyse
from attacks.errors import AttackInputError
from attacks.reporting import panels, report
from tests.browser import browse, framed, needs_browser, run_browser


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, and whether the tags nest."""

    VOID = frozenset({"meta", "link", "br", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action", "data"}
        ]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def words(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def shown(run: pathlib.Path) -> Page:
    page = Page((run / report.INDEX_PATH).read_text())
    assert page.open == []
    return page


def render(run: pathlib.Path) -> Page:
    report.write_report(run)
    return shown(run)


def test_the_page_says_what_was_claimed_and_what_was_found(analysed):
    run = analysed(100, shift=0.0, epsilon=1.0)
    found = words(render(run))
    results = json.loads((run / analyse.ATTACKS_PATH).read_text())
    headline = results["results"]["token_mean"]
    for fact in (
        "Privacy unit one user",
        "add or remove one",
        "60 planned, 60 released",
        "Noise multiplier 0.8",
        "probability 0.05 per step",
        "norm 1, flat",
        "31.40 before, 22.05 after",
        f"AUROC {headline['auroc']:.3f}",
        f"{headline['bootstrap']['interval'][0]:.3f} to {headline['bootstrap']['interval'][1]:.3f}",
        f"Cap {results['cap']['auroc_used']:.4f}",
        f"Ceiling {results['ceiling']['interval'][0]:.3f}",
        "Verdict consistent",
        "What this does not show",
        "not evidence of privacy",
        "Pre-training may have seen",
        "single training run",
        "not covered by ε",
        "Hyper-parameters chosen on private rows.",
    ):
        assert fact in found, fact
    assert "NOT PRIVATE" not in found


def test_the_page_asks_for_nothing_outside_itself(reported):
    run = reported()
    page = shown(run)
    assert [reference for reference in page.references if not reference.startswith(("#", "data:"))] == []
    text = (run / report.INDEX_PATH).read_text()
    assert "<script" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert "default-src 'none'" in text


def test_figures_refer_to_their_own_parts(reported):
    page = shown(reported())
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def test_no_user_appears_in_anything_public(reported):
    run = reported(60, rich=True)
    assert {path.name for path in (run / "report").iterdir()} == {
        "index.html",
        "report.json",
        "report.md",
        "attacks.json",
    }
    for path in (run / "report").iterdir():
        assert "pseudonym" not in path.read_text(), path
        assert "doc-" not in path.read_text(), path


def test_a_run_that_is_not_private_says_so_first(analysed):
    run = analysed(
        30, private=False, epsilon=None, not_private_reasons=["noise_multiplier is 0", "<script>alert(1)</script>"]
    )
    page = render(run)
    found = words(page)
    assert found.index("NOT PRIVATE") < found.index("Privacy statement")
    assert "noise_multiplier is 0" in found
    assert "<script>alert(1)</script>" in found
    assert "<script" not in (run / report.INDEX_PATH).read_text()
    assert "allowed by" not in found


def test_a_run_that_claims_nothing_says_what_was_achieved(analysed):
    run = analysed(60, shift=0.5, private=False, epsilon=None, not_private_reasons=["noise_multiplier is 0"])
    found = words(render(run))
    facts = json.loads((run / analyse.ATTACKS_PATH).read_text())
    assert facts["verdict"] == facts["panels"]["audit"]["verdict"] == "no claim"
    assert len(facts["achieved"]) == 2
    assert "What the attack achieved. Fresh documents tell who was trained on" in found
    assert "guesses were right" in found or "were right; so ε per user is at least" in found
    assert "The attempt succeeded better than guessing does. The audit below guessed who took part" in found
    assert "uninformative" not in found


def test_a_quiet_run_achieves_nothing(analysed):
    run = analysed(60, shift=0.0, epsilon=1.0)
    assert json.loads((run / analyse.ATTACKS_PATH).read_text())["achieved"] == []
    assert "Nothing that the declared tests can tell from chance" in words(render(run))


def test_canaries_that_were_seen_are_no_users_that_were_told(analysed, monkeypatch):
    monkeypatch.setattr(analyse.auditing, "achieved", lambda findings: ["Of 9 canary users 9 of 9 guesses were right."])
    found = words(render(analysed(10, shift=0.0)))
    assert "The attempt did not succeed better than guessing does. The audit below guessed who took part" in found


def test_the_page_says_which_run_it_is_about(analysed):
    run = analysed()
    (run / "config.yaml").write_text("model: {name_or_path: some/base}")
    found = words(render(run))
    for fact in (f"Run {run.name}", "Base model some/base", "Released model, digest", "Analysed on 20", "privtrain 0."):
        assert fact in found, fact
    assert found.index("Which run") < found.index("In plain words") < found.index("Privacy statement ε")


def test_a_guarantee_for_examples_shows_no_cap(analysed):
    found = words(render(analysed(40, unit="example")))
    assert "Cap none" in found
    assert "vacuous" in found


def test_the_same_facts_give_the_same_page(analysed):
    run = analysed()
    first = report.write_report(run).read_bytes()
    assert report.write_report(run).read_bytes() == first


def test_the_json_holds_the_facts_of_the_page(reported):
    run = reported()
    facts = json.loads((run / report.REPORT_PATH).read_text())
    assert facts["schema"] == "privtrain/report/3"
    assert facts["privacy"] == json.loads((run / "privacy.json").read_text())
    assert facts["attacks"] == json.loads((run / analyse.ATTACKS_PATH).read_text())
    assert facts["held_out_perplexity"] == {"before": 31.4, "after": 22.05}


def test_results_of_another_plan_are_refused(analysed):
    run = analysed()
    statement = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps(statement | {"plan_fingerprint": "00" * 32}))
    with pytest.raises(AttackInputError, match="run next: attacks analyse"):
        report.write_report(run)


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [(7.99, "7.990"), (7.9901, "7.991"), (1.0, "1.000"), (0.00001, "0.001"), (None, "∞"), (0.0, "0.000")],
)
def test_epsilon_is_never_shown_below_what_was_released(epsilon, shown):
    assert report.format_epsilon(epsilon) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (1e-4, "1e-4"), (1.25e-6, "1.25e-6"), (0.05, "0.05"), (9.999e-5, "1e-4")]
)
def test_small_numbers_are_readable(value, shown):
    assert panels.scientific(value) == shown


def summary(run: pathlib.Path) -> str:
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(report.summary_table(run))
    return console.file.getvalue()


def test_the_summary_has_the_numbers(analysed):
    text = summary(analysed(100, shift=0.0, epsilon=1.0))
    for fact in ("1.000", "1e-4", "user, add_or_remove_one", "60", "31.40", "22.05", "0.7311", "consistent"):
        assert fact in text
    assert re.search(r"user-inference AUROC +│ 0\.\d{3}  \(95 % interval 0\.\d{3} to 0\.\d{3}\)", text)


def test_summary_admits_what_was_not_released_and_not_private(analysed):
    text = summary(analysed(30, perplexity=False, private=False, not_private_reasons=["fixed seed"]))
    assert "NOT PRIVATE: fixed seed" in text
    assert text.count("not released") == 2


@needs_browser
@pytest.mark.parametrize("width", [1100, 400])
def test_a_browser_finds_no_fault(reported, tmp_path, width):
    path = reported(60, rich=True) / report.INDEX_PATH
    assert path.read_text().count("<figure") == 9
    # It reports its width: here scripts are let in.
    probe = (
        "<script>onload = () => { document.querySelectorAll('details').forEach(e => e.open = true);"
        " parent.postMessage([document.documentElement.scrollWidth,"
        " document.querySelectorAll('figure svg path').length,"
        " Math.max(...[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth))],"
        " '*')}</script></body>"
    )
    text = re.sub(r"<meta http-equiv=[^>]*>", "", path.read_text()).replace("</body>", probe)
    dom, log = browse(framed(text, width, tmp_path), tmp_path / "profile-probe")
    found = re.search(r'data-found="(\d+),(\d+),(\d+)"', dom)
    assert found, log
    assert int(found[1]) <= width
    assert int(found[2]) > 20
    assert int(found[3]) == 0, "a table is wider than the page"
    # The page as shipped: its policy would turn any request outside it, and any inline script, into a console message.
    dom, log = browse(path.as_uri(), tmp_path / "profile-page")
    assert "What this does not show" in dom
    assert "CONSOLE" not in log
    assert "Refused to" not in log


def printed_pages(page: pathlib.Path, directory: pathlib.Path) -> int:
    """Prints a page as the browser's own style for paper says; counts the sheets of A4."""
    out = directory / "page.pdf"
    run_browser(directory / "profile-print", "--no-pdf-header-footer", f"--print-to-pdf={out}", page.as_uri())
    return len(re.findall(rb"/Type\s*/Page\b", out.read_bytes()))


@needs_browser
def test_a_full_report_prints_on_two_to_six_pages(reported, tmp_path):
    path = reported(60, rich=True) / report.INDEX_PATH
    assert 2 <= printed_pages(path, tmp_path) <= 6
    plain = tmp_path / "plain.html"
    plain.write_text(path.read_text().replace("@media print", "@media none"))
    assert printed_pages(plain, tmp_path) > 6, "the style for paper is what does it"


def test_the_page_shows_every_panel(reported):
    run = reported(60, rich=True)
    found = words(shown(run))
    facts = json.loads((run / analyse.ATTACKS_PATH).read_text())
    for fact in (
        "What it depends on, and whom it accuses",
        "AUROC by documents of each user that the attacker holds",
        "AUROC by distinctness",
        "Without any model",
        "bag of words",
        "Sensitive against other tokens",
        "excess on sensitive",
        "min_k_plus_plus_records",
        "needs shadow models",
        "The whole privacy curve of the same mechanism allows",
        "can be accused at a false discovery rate of 5 %",
        "only if at least 20 users score above all of them",
    ):
        assert fact in found, fact
    assert len(facts["user_inference"]["by_num_documents"]) == 2


def test_a_confounded_split_is_said_over_the_curve(analysed):
    run = analysed(60, rich=True, shifted=True)
    found = words(render(run))
    assert found.index("CONFOUNDED") < found.index("ROC, both axes logarithmic")
    assert "Verdict confounded" in found
    markdown = (run / report.MARKDOWN_PATH).read_text()
    assert "**confounded**" in markdown
    assert "| bag of words |" in markdown


def test_the_markdown_has_a_row_for_every_statistic(reported):
    run = reported()
    lines = (run / report.MARKDOWN_PATH).read_text().splitlines()
    facts = json.loads((run / analyse.ATTACKS_PATH).read_text())
    for name in facts["results"]:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
    widths = {line.count("|") for line in lines if line.startswith("| token_mean")}
    assert widths == {8}
