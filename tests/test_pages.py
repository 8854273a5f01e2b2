"""Standalone pages in a real browser: that the harness sees what goes wrong, and that the pages of the
package are clean and accessible."""

import random
from pathlib import Path

import pandas as pd
import pytest

import outside
from cbnb.cli import main
from cbnb.report.figures import PANELS, report_page
from lab.pageharness import Pages, axe_source

FIXTURES = Path(__file__).parent / "fixtures"
THEMES = ("light", "dark")


def page_of(body, head=""):
    return (
        "<!DOCTYPE html><html "
        f'lang="en"><head><title>t</title>{head}</head><body><main><h1>t</h1>{body}</main></body></html>'
    )


def show(pages, text, framed):
    return (pages.framed if framed else pages.open)(text)


# --- the harness ---


@pytest.mark.parametrize("framed", [False, True])
def test_a_sound_page_passes(pages, framed):
    page = show(
        pages,
        page_of(
            '<p id="p">text</p><img alt="dot" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'
            "<script>fetch(URL.createObjectURL(new Blob(['a']))).then(r => r.text()).then(t => { "
            "p.textContent = t })</script>"
        ),
        framed,
    )
    page.wait_for_function("p.textContent === 'a'")
    assert pages.violations(page) == []
    pages.assert_clean()


SCRIPTS = {
    "throw new Error('boom')": "boom",
    "console.error('said')": "said",
    "Promise.reject(new Error('refused'))": "refused",
    "setTimeout(() => late(), 50)": "late is not defined",
    "alert('hostile')": "hostile",
}


@pytest.mark.parametrize("framed", [False, True])
def test_errors_of_scripts_are_seen(pages, framed):
    show(pages, page_of("".join(f"<script>{script}</script>" for script in SCRIPTS)), framed)
    pages.settle()
    seen = [[text for text in pages.console if words in text] for words in SCRIPTS.values()]
    # no dialog in a frame, but the attempt is told
    if framed:
        seen[-1] = [text for text in pages.console if "alert()" in text and "sandboxed" in text]
    assert len(pages.console) == len(SCRIPTS) and all(len(texts) == 1 for texts in seen), pages.console
    with pytest.raises(AssertionError, match="boom"):
        pages.assert_clean()
    pages.clear()
    pages.assert_clean()


REQUESTS = {
    '<img alt="" src="http://image.example/a.png">': "http://image.example/a.png",
    '<script src="https://script.example/a.js"></script>': "script.example",
    '<style>@import "http://style.example/a.css"; p { background: url(http://ground.example/b.png) '
    "}</style><p>a</p>": "http://style.example/a.css",
    "<p>b</p>": "http://ground.example/b.png",
    "<script>fetch('https://fetch.example/').catch(() => 0)</script>": "fetch.example",
    "<script>navigator.sendBeacon('https://beacon.example/', 'a')</script>": "beacon.example",
    "<script>new WebSocket('wss://socket.example/').onerror = () => 0</script>": "socket.example",
}


@pytest.mark.parametrize("framed", [False, True])
def test_requests_to_other_machines_are_seen(pages, framed):
    show(pages, page_of("".join(REQUESTS)), framed)
    pages.settle()
    missed = [address for address in REQUESTS.values() if not any(address in seen for seen in pages.outside)]
    assert not missed, f"{missed} not in {pages.outside}"
    # most are told in the console as well
    with pytest.raises(AssertionError, match="errors in the page"):
        pages.assert_clean()
    pages.console.clear()
    with pytest.raises(AssertionError, match="requests out of the page"):
        pages.assert_clean()


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("address", ["http://127.0.0.1:8765/", "other.png"])
def test_requests_to_this_machine_are_seen(pages, address, framed):
    "A server beside the page, a file beside the page: on the reader's machine there is none."
    show(pages, page_of(f'<img alt="" src="{address}">'), framed)
    with pytest.raises(AssertionError):
        pages.assert_clean()
    assert any(address in text for text in pages.outside + pages.console), (pages.outside, pages.console)


VIOLATIONS = {
    '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">': "image-alt (critical, WCAG)",
    '<p style="color: #aaa; background: #fff">pale</p>': "color-contrast (serious, WCAG)",
    "<button></button>": "button-name (critical, WCAG)",
    '<div role="slider" aria-label="s" tabindex="0"></div>': "aria-required-attr (critical, WCAG)",
    '<p tabindex="3">first</p>': "tabindex (serious, best practice)",
}


@pytest.mark.parametrize("framed", [False, True])
def test_serious_violations_are_seen(pages, framed):
    page = show(pages, page_of("".join(VIOLATIONS)), framed)
    found = pages.violations(page)
    for body, rule in VIOLATIONS.items():
        (text,) = [v for v in found if v.startswith(f"{rule}: ")]
        assert body[:12] in text, text
    assert len(found) == len(VIOLATIONS), found
    assert pages.violations(page, impacts=("minor",)) == []


QUERIES = ("prefers-color-scheme: dark", "forced-colors: active", "prefers-reduced-motion: reduce")


def test_settings_reach_the_page(pages):
    def media(**settings):
        page = pages.open(page_of(""), **settings)
        return [page.evaluate(f"matchMedia('({query})').matches") for query in QUERIES]

    assert media() == [False, False, True] and media(
        theme="dark", forced_colors=True, reduced_motion=False
    ) == [True, True, False]


def test_a_page_that_refuses_scripts_can_be_checked(pages):
    policy = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""  # noqa: E501
    assert len(pages.violations(pages.open(page_of('<p style="color: #aaa">pale</p>', policy)))) == 1
    pages.assert_clean()


def test_another_text_than_axe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "CACHE", tmp_path)
    (tmp_path / "axe" / "package").mkdir(parents=True)
    (tmp_path / "axe" / "package" / "axe.min.js").write_text(
        "window.axe = {run: async () => ({violations: []})}"
    )
    with pytest.raises(ValueError, match="is not that of axe-core@"):
        axe_source()


def test_one_browser_for_all(pages):
    with Pages() as others:
        assert others.browser is pages.browser
        others.open(page_of("<script>boom()</script>"))
        with pytest.raises(AssertionError, match="boom"):
            others.assert_clean()
    pages.open(page_of(""))
    pages.assert_clean()


# --- the pages of the package ---


def a_report():
    rng = random.Random(0)
    rows = [
        {key: rng.uniform(0.01, 1) for _, _, lines, _ in PANELS for key in lines} | {"step": step, "lr": 1e-3}
        for step in range(1, 41)
    ]
    table = pd.DataFrame(
        {"before": [1.0, 0.0], "after": [0.0123, None]}, index=["attack_success", "heldout_kl in_domain"]
    )
    return report_page("a run", rows, table, {"beta_kl": 0.3, "model": "<b>m</b>"}, notes=["a note"])


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "masks.html"
    assert main(["masks", str(FIXTURES / "agent.jsonl"), "--model", "tinyagent", "--html", str(path)]) == 0
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["report", "audit"])
def test_pages_are_clean_and_accessible(pages, entry, name, theme):
    text = a_report() if name == "report" else entry
    for page in (
        pages.open(text, theme=theme),
        pages.open(text, theme=theme, forced_colors=True),
        pages.framed(text, theme=theme),
    ):
        assert page.locator("h1").count() == 1 and pages.violations(page) == []
    pages.assert_clean()
