"""The token strip in a real browser: its standalone page, and the widget beside a kernel."""

import re
from dataclasses import replace

import numpy as np
import pytest

import helpers
from cbnb.masking.audit import Totals, audit, audit_page, terminal_lines
from cbnb.masking.masker import ChatMasker
from cbnb.masking.owned import mark_injection
from cbnb.masking.policies import Encoding, loss_mask
from cbnb.masking.turns import Segment
from cbnb.step.models import load_tokenizer
from cbnb.transcripts.record import Transcript
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets.masks import explore, explored_state, token_frame
from cbnb.widgets.strip import StillStrip, TokenStrip, token_strip

POLICIES = ("post_injection_only", "first_header", "assistant_only")
SHOW, A, B, SEARCH = (
    "[aria-label='what is shown']",
    "[aria-label='mask A']",
    "[aria-label='mask B']",
    "[aria-label='search in the text']",
)
HOSTILE = [*helpers.HOSTILE, "\\u003c"]


def by_hand(pieces, roles=("user",), messages=None, mask_title="by hand", **given):
    "A strip of the texts `pieces`, made without a tokenizer."
    ends = np.cumsum([len(p) for p in pieces]).astype(np.int32)
    messages = np.zeros(len(pieces), np.int16) if messages is None else np.array(messages, np.int16)
    encoding = Encoding(
        "".join(pieces),
        np.arange(len(pieces), dtype=np.int32),
        np.full(len(pieces), Segment.USER, np.uint8),
        messages,
        np.stack([ends - [len(p) for p in pieces], ends], axis=1).astype(np.int32),
        roles=tuple(roles),
    )
    return token_strip(encoding, None, given.pop("policies", ()), title=mask_title, **given)


@pytest.fixture(scope="module")
def masker():
    return ChatMasker(load_tokenizer("tinyagent"))


@pytest.fixture(scope="module")
def encoding(masker):
    t = make_transcripts("injection", 1)[0]
    return masker.encode(t.messages, t.tools, t.injection_spans, t.label)


@pytest.fixture(scope="module")
def html(encoding, masker):
    kl = np.where(loss_mask(encoding), np.linspace(1e-6, 2, len(encoding.input_ids)), np.nan)
    return (
        token_strip(encoding, masker.tokenizer, POLICIES, heats={"KL": (kl, "nats")}, title="injected")
        .static()
        .html
    )


def tokens(page):
    return page.locator(".cb-view .cb-t")


def about(page):
    return page.locator(".cb-about [role=status]").inner_text()


def chosen(page):
    return page.locator(".cb-t.sel").evaluate_all("spans => spans.map(s => Number(s.id.split('-')[1]))")


def test_all_tokens_are_shown_with_their_mask(pages, html, encoding):
    page = pages.open(html)
    assert tokens(page).count() == len(encoding.input_ids)
    inside = tokens(page).evaluate_all("spans => spans.map(s => s.classList.contains('in'))")
    assert inside == loss_mask(encoding, POLICIES[0]).tolist()
    assert page.locator(".cb-who b").all_inner_texts() == ["S", "U", "A", "T", "A"]
    assert f"in A: {sum(inside)}" in page.locator(".cb-key").inner_text()
    pages.assert_clean()


def test_a_token_says_why(pages, html, encoding):
    page = pages.open(html)
    at = int(np.flatnonzero(loss_mask(encoding, POLICIES[0]))[0])
    tokens(page).nth(at).click()
    assert chosen(page) == [at] and about(page).startswith(f"token {at} ")
    assert str(encoding.why(at, POLICIES[0])).split(" is ", 1)[1] in about(page)
    tokens(page).nth(3).hover()
    assert page.locator(".cb-hover").inner_text().startswith("token 3 ") and about(page).startswith(
        f"token {at} "
    )


def test_differences_are_marked_and_found(pages, html, encoding):
    page = pages.open(html)
    page.select_option(SHOW, "difference")
    a, b = (loss_mask(encoding, p) for p in POLICIES[:2])
    for name, wanted in (("plus", a & ~b), ("minus", b & ~a), ("in", a & b), ("out", ~a & ~b)):
        assert (
            tokens(page).evaluate_all(f"spans => spans.map(s => s.classList.contains('{name}'))")
            == wanted.tolist()
        ), name
    page.locator(".cb-view").focus()
    found = []
    for _ in range(3):
        page.keyboard.press("d"), found.extend(chosen(page))
    assert found == np.flatnonzero(a != b)[:3].tolist()
    page.keyboard.press("Shift+D")
    assert (
        chosen(page) == [found[1]]
        and POLICIES[1] in about(page)
        and "WRONG" in page.locator(".cb-key").inner_text()
    )
    page.select_option(A, POLICIES[1])
    assert page.locator(".cb-view .plus, .cb-view .minus").count() == 0


def test_a_sign_stands_once_for_a_run(pages, html, encoding):
    "Above its first token and, where it goes on, above the first one of each message; never inside the text."
    page = pages.open(html)
    page.select_option(SHOW, "difference")
    a, b = (loss_mask(encoding, p) for p in POLICIES[:2])
    only = b & ~a
    begins = np.append(True, encoding.message_index[1:] != encoding.message_index[:-1])
    begins[1:] |= ~only[:-1]
    signs = tokens(page).evaluate_all("spans => spans.map(s => s.dataset.sign ?? '')")
    assert [i for i, sign in enumerate(signs) if sign] == np.flatnonzero(only & begins).tolist()
    assert {*signs} == {"", "−"} and not re.search("[−+]", page.locator(".cb-view").inner_text())


def test_the_predicting_position_is_one_to_the_left(pages, html, encoding):
    page = pages.open(html)
    page.get_by_label("predicting position").check()
    inside = tokens(page).evaluate_all("spans => spans.map(s => s.classList.contains('in'))")
    assert inside == [*loss_mask(encoding, POLICIES[0])[1:].tolist(), False]
    at = inside.index(True)
    tokens(page).nth(at).click()
    assert f"predicts token {at + 1} " in about(page) and str(encoding.why(at + 1, POLICIES[0])).split(
        " is ", 1
    )[1] in about(page)
    tokens(page).last.click()
    assert "predicts nothing" in about(page)


def in_view(page, i):
    "Whether token `i` is in the page and in the part of the strip that is seen."
    token, view = page.locator(f".cb-view .cb-t[id$='-{i}']"), page.locator(".cb-view").bounding_box()
    if not token.count():
        return False
    box = token.bounding_box()
    return view["y"] <= box["y"] <= view["y"] + view["height"] - box["height"]


def test_it_opens_where_something_is_to_be_seen(pages, html, encoding):
    """At the first trained token, the first difference, the largest value; no more once a reader has
    scrolled. The height follows the window, and what was dragged is kept."""
    page = pages.open(html)
    page.set_viewport_size({"width": 700, "height": 300})
    page.reload()
    a, b = (loss_mask(encoding, p) for p in POLICIES[:2])
    last = np.flatnonzero(loss_mask(encoding)).max()
    places = {"mask": a.argmax(), "difference": (a != b).argmax(), "heat": last}
    for view, place in places.items():
        page.select_option(SHOW, view)
        assert in_view(page, int(place)) and not chosen(page), view
    page.select_option(SHOW, "difference")
    page.select_option(SHOW, "heat")
    assert in_view(page, int(places["heat"]))
    page.locator(".cb-view").hover()
    page.mouse.wheel(0, -9999)
    page.wait_for_timeout(200)
    page.select_option(SHOW, "mask")
    assert not in_view(page, int(places["mask"])) and in_view(page, 0)
    page.set_viewport_size({"width": 1280, "height": 1000})
    assert page.locator(".cb-view").bounding_box()["height"] == 500
    box = page.locator(".cb-view").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5)
    page.mouse.down(), page.mouse.move(box["x"] + 900, box["y"] + 650, steps=3), page.mouse.up()
    height = page.locator(".cb-view").bounding_box()["height"]
    assert height > 600
    page.reload()
    assert abs(page.locator(".cb-view").bounding_box()["height"] - height) <= 1
    pages.assert_clean()


def test_the_injected_text_is_marked(pages, html, encoding, masker):
    "In every view, by brackets too; on a token in words; and where it cannot be located, that is said."
    page = pages.open(html)
    marks, note = mark_injection(encoding)
    assert not note and 5 < (marks > 0).sum() < 20
    for view in ("mask", "difference", "heat", "text"):
        page.select_option(SHOW, view)
        shown = tokens(page).evaluate_all("spans => spans.map(s => s.classList.contains('inj'))")
        assert shown == (marks > 0).tolist(), view
        assert page.locator(".cb-view .cb-bracket").all_inner_texts() == ["injected ⟪", "⟫"]
        assert f"injected text: {(marks > 0).sum()}" in page.locator(".cb-key").inner_text()
    for at, words in (
        (np.flatnonzero(marks == 2)[0], ", injected text of message 3"),
        (40, "message 1 (user);"),
    ):
        tokens(page).nth(int(at)).click()
        assert words in about(page)
    lost = token_strip(replace(encoding, injection_contents={}), masker.tokenizer).static()
    page = pages.open(lost.html)
    for words in (page.locator(".cb-key").inner_text(), lost.plain):
        assert "Injected text that is NOT marked: that of message 3" in words
    assert page.locator(".cb-t.inj").count() == 0
    pages.assert_clean()


COPY = """([from, to]) => { const spans = document.querySelectorAll('.cb-view .cb-t'), range = document.createRange();
    range.setStart(spans[from].firstChild, 1); range.setEnd(spans[to], 1);
    getSelection().removeAllRanges(); getSelection().addRange(range);
    const event = new ClipboardEvent('copy', {clipboardData: new DataTransfer(), bubbles: true, cancelable: true});
    spans[from].dispatchEvent(event); return event.clipboardData.getData('text/plain') }"""  # noqa: E501


def test_text_is_copied_as_it_stands(pages, html, encoding, masker):
    "Blanks are blanks unless asked for; what is copied has no sign of the strip in it."
    page = pages.open(html)
    page.select_option(SHOW, "difference")
    n, text, ends = len(encoding.input_ids), encoding.text, encoding.offsets[:, 1]
    assert page.evaluate(COPY, [0, n - 1]) == text[1:]
    assert page.evaluate(COPY, [60, 90]) == text[encoding.offsets[60, 0] + 1 : ends[90]]
    assert "·" not in page.locator(".cb-view").inner_text()
    page.get_by_label("visible blanks").check()
    assert "Read·the·page" in page.locator(".cb-view").inner_text()
    assert page.evaluate(COPY, [0, n - 1]) == text[1:]
    odd = masker.encode([{"role": "user", "content": "a · 囍\t b\n\n🙂 c"}])
    page = pages.open(token_strip(odd, masker.tokenizer).static().html)
    assert page.evaluate(COPY, [0, len(odd.input_ids) - 1]) == odd.text[1:]
    page.fill(SEARCH, "· 囍\t")
    page.locator(".cb-note", has_text="1 hit").wait_for()
    pages.assert_clean()


def test_all_of_the_strip_is_copied(pages, html, encoding):
    "Control and A select the strip and not the page around it, also what is not drawn."
    page = pages.open(html)
    page.locator(".cb-view").focus()
    page.keyboard.press("Control+A")
    copy = """() => {
        const event = new ClipboardEvent("copy", {clipboardData: new DataTransfer(), bubbles: true});
        document.querySelector('.cb-view').dispatchEvent(event);
        return [event.clipboardData.getData('text/plain'), getSelection().toString()] }"""
    text, selected = page.evaluate(copy)
    assert text == encoding.text and "Choose a token" not in selected
    long = by_hand(["line of words\n"] * 4000)
    page = pages.open(long.static().html)
    page.locator(".cb-view").focus()
    page.keyboard.press("Control+A")
    assert page.evaluate(copy)[0] == "line of words\n" * 4000
    pages.assert_clean()


def test_keys(pages, html, encoding):
    page, n = pages.open(html), len(encoding.input_ids)
    page.select_option(A, POLICIES[2])
    page.locator(".cb-view").focus()
    edges = (np.flatnonzero(np.diff(loss_mask(encoding, POLICIES[2]))) + 1).tolist()
    for key, wanted in (
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("End", n - 1),
        ("ArrowRight", n - 1),
        ("Home", 0),
        ("b", edges[0]),
        ("b", edges[1]),
        ("Shift+B", edges[0]),
        ("PageDown", min(n - 1, edges[0] + 100)),
        ("PageUp", max(0, min(n - 1, edges[0] + 100) - 100)),
    ):
        page.keyboard.press(key)
        assert chosen(page) == [wanted], key
    focused = page.locator(".cb-view").get_attribute("aria-activedescendant")
    assert (
        page.locator(f"#{focused}").get_attribute("aria-selected") == "true"
        and page.locator("[aria-selected=true]").count() == 1
    )

    def top():
        return page.locator(".cb-t.sel").bounding_box()

    page.keyboard.press("Home"), page.keyboard.press("ArrowDown")
    below = top()
    page.keyboard.press("ArrowUp")
    assert below["y"] > top()["y"] + 8 and chosen(page) == [0]
    page.keyboard.press("Escape")
    assert chosen(page) == []
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"


def test_keys_do_not_reach_the_notebook(pages, html):
    page = pages.open(html)
    page.evaluate("window.heard = []; document.addEventListener('keydown', e => window.heard.push(e.key))")
    page.locator(".cb-view").focus()
    for key in ("b", "d", "d", "m", "a", "ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("/"), page.keyboard.type("add")
    assert page.evaluate("window.heard") == []


def test_search_goes_across_tokens(pages, html, encoding):
    page = pages.open(html)
    wanted = "help with office"
    page.fill(SEARCH, wanted.upper())
    page.locator(".cb-note", has_text="1 hit").wait_for()
    page.locator(SEARCH).press("Enter")
    at = encoding.text.index(wanted)
    assert chosen(page) == [int(np.searchsorted(encoding.offsets[:, 1], at, side="right"))]
    assert wanted in "".join(page.locator(".cb-t.hit").all_inner_texts()).replace("\xa0", " ")
    page.fill(SEARCH, "nothing like this")
    page.locator(".cb-note", has_text="0 hits").wait_for()
    assert page.locator(".cb-t.hit").count() == 0


def test_heat(pages, html, encoding):
    page = pages.open(html)
    page.select_option(SHOW, "heat")
    levels = tokens(page).evaluate_all("spans => spans.map(s => / h(\\d)/.exec(s.className)?.[1] ?? null)")
    assert [level is not None for level in levels] == loss_mask(encoding).tolist()
    values = [int(level) for level in levels if level is not None]
    assert values == sorted(values) and values[-1] == 9
    signs = tokens(page).evaluate_all("spans => spans.map(s => s.dataset.sign ?? null)")
    runs = [i for i, level in enumerate(levels) if level and level != ([None, *levels])[i]]
    assert [i for i, sign in enumerate(signs) if sign] == runs, "a sign for each run, and for no token more"
    assert {"cb-t na", "cb-t e1 na"} & set(tokens(page).evaluate_all("spans => spans.map(s => s.className)"))


def test_nothing_of_a_transcript_is_markup(pages):
    strip = by_hand(
        HOSTILE,
        roles=(HOSTILE[0],),
        mask_title=HOSTILE[1],
        masks={HOSTILE[0]: np.ones(len(HOSTILE), bool)},
        heats={HOSTILE[1]: (np.ones(len(HOSTILE)), HOSTILE[0])},
        message=HOSTILE[0],
    )
    for page in (pages.open(strip.static().html), pages.framed(strip.static()._repr_html_())):
        page = page if page.locator(".cb-t").count() else page.child_frames[0]
        shown = [t.removesuffix("\n").replace("\xa0", " ") for t in tokens(page).all_inner_texts()]
        assert shown == [
            "<img src=x onerror=alert(1)>",
            *HOSTILE[1:3],
            "\\u202egnol",
            "\\x1b[31m",
            "a\\u200bb",
            "&lt;b&gt;",
            "\\u003c",
        ]
        page.locator(".cb-t").first.click()
        assert page.locator("img").count() == 0 and HOSTILE[0] in page.locator(".cb-message").inner_text()
    assert "<img" not in strip.static().plain and "<script" not in strip.static().plain
    pages.assert_clean()


def test_odd_characters_are_seen(pages, masker):
    odd = masker.encode(
        [{"role": "user", "content": "囍\ta  b\n\n🙂"}, {"role": "assistant", "content": "ok"}]
    )
    page = pages.open(token_strip(odd, masker.tokenizer).static().html)
    texts = tokens(page).all_inner_texts()
    for wanted in ("<0xE5>", "=囍", "⇥", "=🙂", "<|eot_id|>"):
        assert any(wanted in t for t in texts), (wanted, texts)
    assert (
        page.locator(".cb-t.sp").all_inner_texts().count("<|eot_id|>") == 2
        and page.locator(".cb-t.part").count() >= 6
    )
    quoted = by_hand(["<|eot_id|>"])
    assert pages.open(quoted.static().html).locator(".cb-t.sp").count() == 0, (
        "text that only looks like a control token is shown as one"
    )


def test_right_to_left_and_cjk_read_right(pages):
    page = pages.open(by_hand(["שלום", " עולם", "\n", "中", "文", "\n", "a", " b"]).static().html)
    x = [tokens(page).nth(i).bounding_box()["x"] for i in range(8)]
    assert x[0] > x[1], "the second word of a Hebrew line stands left of the first"
    assert x[3] < x[4] and x[6] < x[7]


def test_many_tokens(pages):
    n = 32_000
    words = [" one", " two", "\n", " three"]
    strip = by_hand(
        [words[i % 4] for i in range(n)],
        ("user", "assistant"),
        np.arange(n) // (n // 2),
        masks={"every third": np.arange(n) % 3 == 0},
    )
    page = pages.open(strip.static().html)
    assert 0 < tokens(page).count() < 6000, "only what is near the window is in the page"
    page.locator(".cb-view").focus()
    page.keyboard.press("End")
    assert chosen(page) == [n - 1]
    box, view = page.locator(".cb-t.sel").bounding_box(), page.locator(".cb-view").bounding_box()
    assert view["y"] <= box["y"] <= view["y"] + view["height"]
    page.wait_for_timeout(300)
    assert tokens(page).count() < 6000
    box = page.locator(".cb-map").bounding_box()
    page.mouse.click(box["x"] + 20, box["y"] + box["height"] / 2)
    page.wait_for_timeout(300)
    middle = tokens(
        page
    ).evaluate_all("""spans => { const view = document.querySelector('.cb-view').getBoundingClientRect();
        return spans.filter(s => { const y = s.getBoundingClientRect().top; return y > view.top && y < view.bottom }).map(s => Number(s.id.split('-')[1])) }""")  # noqa: E501
    assert middle and min(middle) - 300 < n // 2 < max(middle) + 300
    pages.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["mask", "difference", "heat", "text"])
def test_accessible(pages, html, view, theme):
    for page in (
        pages.open(html, theme=theme),
        *([pages.open(html, theme=theme, forced_colors=True)] if view == "difference" else []),
    ):
        page.select_option(SHOW, view)
        tokens(page).nth(20).click()
        assert pages.violations(page) == []
    pages.assert_clean()


def test_a_message_in_the_place_of_tokens(pages):
    page = pages.open(token_strip(message="rows.jsonl, line 3: no messages").static().html)
    assert (
        page.locator(".cb-message").inner_text() == "rows.jsonl, line 3: no messages"
        and tokens(page).count() == 0
    )
    assert pages.violations(page) == []


def test_broken_input_is_told(pages, encoding, masker):
    "Arrays that no Python code of ours would send: a message, never an empty cell."
    strip = token_strip(encoding, masker.tokenizer)
    broken = strip.static().html.replace('"texts": [', '"was": [')
    page = pages.open(broken)
    assert "cannot be shown" in page.locator(".cb-message").inner_text()


@pytest.mark.parametrize("static, kind", [("0", TokenStrip), ("1", StillStrip)])
def test_widget_and_still_strip_are_alike(encoding, masker, monkeypatch, static, kind):
    monkeypatch.setenv("CBNB_STATIC", static)
    strip = token_strip(encoding, masker.tokenizer, POLICIES)
    strip.selected, strip.a = 7, POLICIES[1]
    assert (
        isinstance(strip, kind)
        and strip.state()["selected"] == 7
        and strip.static().html.count('"selected": 7') == 1
    )


@pytest.mark.parametrize("kind", helpers.KEYS)
def test_no_view_of_tokens_tells_a_secret_in_pieces(kind, monkeypatch):
    """Neither the strip, the masks and their table, nor an audit's page and lines; a key in a tool call, too,
    whose JSON a template writes."""
    key = helpers.KEYS[kind]
    if kind == "environment":
        monkeypatch.setenv("EXAMPLE_API_KEY", key)
    call = {"function": {"name": "use", "arguments": {"key": key}}, "id": "call00001", "type": "function"}
    chat = [
        {"role": "user", "content": f"It is {key}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "use", "tool_call_id": "call00001", "content": f"{key}: ok"},
        {"role": "assistant", "content": f"I used {key}."},
    ]
    masker = ChatMasker(load_tokenizer("tinyagent"))
    t = Transcript("key", chat, label="benign")
    explored = explore(t, masker)
    encoding, text = explored.encoding, explored.encoding.text
    spans = [m.span() for m in re.finditer(re.escape(key), text)]
    inside = [any(start < b and end > a for a, b in spans) for start, end in encoding.offsets.tolist()]
    tokens = np.flatnonzero(inside)
    assert len(spans) == 4 and len(tokens) > 20
    for state in (
        token_strip(encoding, masker.tokenizer).state(),
        explored_state(explored, masker.tokenizer),
    ):
        shown = state["tokens"]
        assert {shown["texts"][k] for k in np.frombuffer(shown["ids"], np.uint32)[tokens]} == {"[removed]"}
        assert (np.frombuffer(shown["token_ids"], np.int32)[tokens] == -1).all()
    frame = token_frame(explored, masker.tokenizer).iloc[tokens]
    assert {*frame["text"]} == {"[removed]"} and {*frame["token_id"]} == {-1}
    entries = list(audit([t], masker))
    page = audit_page("keys", Totals(), examples=entries)
    lines = "\n".join(terminal_lines(entries[0]))
    for words in (re.sub("</?u>", "", page), re.sub("[⟦⟧]", "", lines)):
        assert key not in words and words.count("[removed]") > 20
        assert not re.search(f"{re.escape(key[:6])}|{re.escape(key[-6:])}", words)
