"""The KL explorer in a real browser: what it shows is what `cbnb.evaluate.divergence` and `cbnb.step.losses`
compute, and all of it can be reached."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cbnb.config import get_config
from cbnb.evaluate.divergence import Side, diverge, share_of_kl, token_table, top_tokens
from cbnb.evaluate.reader import derive_reader
from cbnb.evaluate.token_kinds import KIND_NAMES, token_kinds
from cbnb.masking.masker import ChatMasker
from cbnb.masking.policies import Encoding, loss_mask
from cbnb.masking.turns import Segment
from cbnb.step.losses import kl_divergence_loss, token_kl
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.record import Transcript
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets.kl import KLExplorer, choice_rows, kl_html, largest_target, static_kl
from helpers import BIN, HOSTILE, KEYS, NBS, ROOT, copy_tree, read, run
from lab.labharness import Lab

DIRECTION, BY, OVER, KIND = (
    "[aria-label='direction of the KL']",
    "[aria-label='share by']",
    "[aria-label='tokens counted']",
    "[aria-label='kind of token']",
)
CIVIDIS = "#00224e #123570 #3b496c #575d6d #707173 #8a8678 #a59c74 #c3b369 #e1cc55 #fee838".split()
COSINE, DISTANCE = (
    "[aria-label='Cosine to the teacher by block and token']",
    "[aria-label='Distance to the teacher by block and token']",
)


def noise(n, vocabulary, names, seed=0, blocks=5):
    "A teacher and students that are noise: `(teacher, {name: student})` of n tokens."
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(vocabulary, 6, generator=g).double()

    def side():
        h, cosine, distance = (
            torch.randn(n, 6, generator=g),
            torch.rand(blocks, n, generator=g) * 2 - 1,
            torch.rand(blocks, n, generator=g) * 9,
        )
        return Side(h, lambda x: x.double() @ W.T, cosine.numpy(), distance.numpy())

    return side(), {name: side() for name in names}


def case(masker, names=("A", "B"), temperature=1.0, encoding=None, **given):
    "`(arguments of kl_state, teacher, students)` on an injected transcript."
    t = make_transcripts("injection", 1)[0]
    if encoding is None:
        encoding = masker.encode(t.messages, t.tools, t.injection_spans, t.label)
        given = {"kinds": token_kinds(encoding, t, derive_reader(masker))} | given
    vocabulary = len(masker.tokenizer)
    teacher, students = noise(len(encoding.input_ids), vocabulary, names)
    divergence = diverge(teacher, students, encoding.input_ids, temperature)
    return (
        dict(
            encoding=encoding,
            mask=loss_mask(encoding),
            divergence=divergence,
            students=students,
            tokenizer=masker.tokenizer,
            vocabulary=vocabulary,
            mask_name="assistant_only",
            title="injected",
        )
        | given,
        teacher,
        students,
    )


@pytest.fixture(scope="module")
def masker():
    return ChatMasker(load_tokenizer("tinyagent"))


@pytest.fixture(scope="module")
def two(masker):
    return case(masker, temperature=1.7)


def values(page, cells):
    return page.locator(cells).evaluate_all("cells => cells.map(c => Number(c.dataset.value))")


def tokens(page):
    return page.locator(".cb-view .cb-t")


def chosen(page):
    return page.locator(".cb-t.sel").evaluate_all("spans => spans.map(s => Number(s.id.split('-')[1]))")


def choose(page, i):
    tokens(page).nth(i).click()


def columns(page):
    "The numbers of the distribution table by column, and those of its two last lines."
    read = (
        "rows => rows.map(row => [...row.querySelectorAll('[data-value]')].map(c => Number(c.dataset.value)))"
    )
    body = page.locator(".kl-detail tbody tr").evaluate_all(read)
    return np.array(body).T, *page.locator(".kl-detail tfoot tr").evaluate_all(read)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 6.0])
def test_the_rows_add_up_to_the_kl_of_the_loss(pages, masker, temperature):
    arguments, teacher, students = case(masker, temperature=temperature)
    page = pages.open(static_kl(arguments).html)
    n, d = len(arguments["mask"]), arguments["divergence"]
    logits = [side.head(side.hidden) for side in (teacher, *students.values())]
    for i in np.random.default_rng(int(10 * temperature)).choice(np.arange(1, n), 5, replace=False).tolist():
        choose(page, i)
        for way in ("forward", "reverse"):
            page.select_option(DIRECTION, way)
            (p, qa, a, qb, b), sums, shown = columns(page)
            for s, part in enumerate((a, b)):
                pair = (logits[1 + s][i - 1], logits[0][i - 1])
                loss = (
                    token_kl(*(pair if way == "forward" else reversed(pair)), temperature).item()
                    / temperature**2
                )
                assert (
                    abs(part.sum() - shown[s]) < 1e-9
                    and abs(sums[2 + 2 * s] - part.sum()) < 1e-9
                    and abs(shown[s] - loss) < 1e-6
                )
                assert abs(shown[s] - getattr(d, way)[s, i]) < 1e-12
            for column in (p, qa, qb):
                assert abs(column.sum() - 1) < 1e-9
            assert (
                len(p) == d.ids.shape[1] + 1
                and page.locator(".kl-detail .kl-actual").count() == 1
                and (np.diff(p[:-1]) <= 0).all()
            )
    pages.assert_clean()


def test_the_sum_is_the_loss_and_beta_weighs_it(pages, two):
    arguments, teacher, students = two
    page = pages.open(static_kl(arguments, beta=0.5).html)
    mask, d = torch.from_numpy(arguments["mask"])[None], arguments["divergence"]

    def summary():
        return np.array(values(page, ".kl-summary [data-value]")).reshape(2, 3)

    for s, side in enumerate(students.values()):
        loss = kl_divergence_loss(
            side.head(side.hidden)[None], teacher.head(teacher.hidden)[None], mask, 1.7
        ).item()
        assert np.allclose(summary()[s], [loss / 1.7**2, loss, 0.5 * loss], atol=1e-9)
    before = summary()
    page.get_by_label("weight beta").focus()
    page.keyboard.press("End")
    assert (
        np.allclose(summary()[:, 2], 2 * before[:, 1])
        and np.allclose(summary()[:, :2], before[:, :2])
        and "2" in page.locator("output").last.inner_text()
    )
    page.select_option(DIRECTION, "reverse")
    inside = arguments["mask"] & (np.arange(len(d.ids)) > 0)
    assert (
        np.allclose(summary()[:, 0], d.reverse[:, inside].mean(1))
        and "in the loss" not in page.locator(".kl-summary").inner_text()
    )
    assert (
        page.get_by_label("temperature").is_disabled()
        and "needs the kernel" in page.locator(".cb-kl").inner_text()
    )


def test_the_list_of_the_largest_jumps(pages, two):
    arguments, page = two[0], pages.open(static_kl(two[0]).html)

    def listed():
        return page.locator(".kl-list button").evaluate_all(
            "buttons => buttons.map(b => Number(b.dataset.token))"
        )

    def wanted(name, way, inside=False):
        table = token_table(arguments["encoding"], arguments["mask"], arguments["divergence"], name)
        return top_tokens(table[table["in_mask"]] if inside else table, 20, way).index.tolist()

    assert listed() == wanted("A", "forward", inside=True)
    page.select_option(OVER, "all")
    assert listed() == wanted("A", "forward")
    page.get_by_label("student", exact=True).select_option(label="B")
    assert listed() == wanted("B", "forward") and "of B" in page.locator(".kl-top h2").inner_text()
    page.select_option(DIRECTION, "reverse")
    assert listed() == wanted("B", "reverse")
    page.select_option(OVER, "mask")
    assert listed() == wanted("B", "reverse", inside=True)
    third = page.locator(".kl-list button").nth(2)
    third.focus()
    page.keyboard.press("Enter")
    at = wanted("B", "reverse", inside=True)[2]
    assert (
        chosen(page) == [at]
        and third.get_attribute("aria-current") == "true"
        and page.locator("[aria-current]").count() == 1
    )
    box, view = page.locator(".cb-t.sel").bounding_box(), page.locator(".cb-view").bounding_box()
    assert (
        view["y"] <= box["y"] <= view["y"] + view["height"]
        and f"Token {at} " in page.locator(".kl-detail").inner_text()
    )
    assert "D(student‖teacher) of B" in page.locator(".cb-about").inner_text()


def test_tokens_of_one_kind(pages, two):
    "What is coloured, counted and listed is of the kind that is chosen, with the keyboard alone."
    arguments, page = two[0], pages.open(static_kl(two[0]).html)
    own, d = arguments["kinds"] == KIND_NAMES.index("call_value"), arguments["divergence"]
    table = token_table(arguments["encoding"], arguments["mask"], d, "A")
    page.select_option(OVER, "all")
    assert page.locator(KIND).locator("option").all_inner_texts()[:2] == ["of every kind", "argument values"]
    page.locator(KIND).focus()
    page.keyboard.press("ArrowDown")
    listed = "all => all.map(b => Number(b.dataset.token))"
    assert page.locator(".kl-list button").evaluate_all(listed) == top_tokens(table[own], 20).index.tolist()
    coloured = "all => all.flatMap((t, i) => t.classList.contains('na') ? [] : [i])"
    assert tokens(page).evaluate_all(coloured) == np.flatnonzero(own).tolist()
    counted = sum(values(page, ".kl-shares tbody tr td:nth-child(2)"))
    page.locator(".kl-list button").first.click()
    assert counted == own.sum() and "of A, argument values" in page.locator(".cb-about").inner_text()
    inside = own & arguments["mask"]
    assert np.isclose(values(page, ".kl-summary [data-value]")[0], d.forward[0, inside].mean())
    assert f"{inside.sum()} targets (argument values)" in page.locator(".kl-summary").inner_text()
    page.select_option(KIND, "not the assistant's")
    assert "no target is of the kind" in page.locator(".kl-summary").inner_text()
    page.select_option(KIND, "")
    assert page.locator(".kl-list button").count() == 20 and page.locator(".cb-view .na").count() == 1
    page.select_option(OVER, "mask")
    page.select_option(KIND, "not the assistant's")
    assert "choose all tokens" in page.locator(".kl-list").inner_text()
    page = pages.open(static_kl(two[0] | {"kinds": None}).html)
    assert page.locator(KIND).is_hidden() and page.locator(".kl-list button").count() == 20
    pages.assert_clean()


@pytest.mark.parametrize(
    "by, over, way",
    [
        ("role", "all", "forward"),
        ("part", "all", "reverse"),
        ("role", "mask", "reverse"),
        ("part", "mask", "forward"),
    ],
)
def test_shares(pages, two, by, over, way):
    arguments, page = two[0], pages.open(static_kl(two[0]).html)
    page.select_option(BY, by), page.select_option(OVER, over), page.select_option(DIRECTION, way)
    rows = page.locator(".kl-shares tbody tr").evaluate_all(
        "rows => rows.map(r => [r.cells[0].textContent, ...[...r.querySelectorAll('[data-value]')].map(c => "
        "Number(c.dataset.value))])"
    )
    tables = []
    for name in ("A", "B"):
        table = token_table(arguments["encoding"], arguments["mask"], arguments["divergence"], name)
        tables.append(
            share_of_kl(
                table[table["in_mask"]] if over == "mask" else table, "segment" if by == "part" else by, way
            )
        )
    assert [row[0] for row in rows] == [key.replace("_", " ") for key in tables[0].index]
    wanted = np.column_stack(
        [tables[0][["tokens", "in_mask", "share", "mean"]], tables[1][["share", "mean"]]]
    )
    assert np.allclose(np.array([row[1:] for row in rows]), wanted)


def test_maps_choose_tokens_and_blocks(pages, two):
    arguments, page = two[0], pages.open(static_kl(two[0]).html)
    n, side = len(arguments["mask"]), arguments["students"]["A"]

    def value(box):
        return page.locator(box).get_attribute("aria-valuetext")

    page.locator(COSINE + " canvas").scroll_into_view_if_needed()
    box = page.locator(COSINE + " canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 40.5 / n, box["y"] + box["height"] * 0.5 / 5)
    assert chosen(page) == [40] and value(COSINE).startswith("block 4, token 40 ")
    assert f"cosine {side.cosine[4, 40]:.4f}"[:9] in value(COSINE).replace("−", "-")
    assert value(DISTANCE).startswith("block 0, token 40 ") and f"L2 {side.distance[0, 40]:.3f}"[:6] in value(
        DISTANCE
    )
    page.locator(DISTANCE).focus()
    for key, at, block in (
        ("ArrowRight", 41, 0),
        ("ArrowUp", 41, 1),
        ("ArrowLeft", 40, 1),
        ("End", n - 1, 1),
        ("ArrowRight", n - 1, 1),
        ("Home", 0, 1),
        ("PageDown", min(n - 1, 100), 1),
        ("ArrowDown", min(n - 1, 100), 0),
        ("ArrowDown", min(n - 1, 100), 0),
    ):
        page.keyboard.press(key)
        assert chosen(page) == [at] and value(DISTANCE).startswith(f"block {block}, token {at} "), key
    assert page.locator(DISTANCE).get_attribute("aria-valuenow") == str(min(n - 1, 100))
    page.wait_for_timeout(100)  # drawn in the next frame
    pixel = (
        "(c, [x, y]) => [...c.getContext('2d').getImageData(Math.floor(x * c.width), Math.floor(y * "
        "c.height), 1, 1).data].slice(0, 3)"
    )
    low, high = side.distance.min(), side.distance.max()
    low = max(low, high / 1e5)
    for block, i in ((0, 3), (1, 20), (2, 55), (3, 70), (4, 9)):
        level = (
            0
            if side.distance[block, i] <= low
            else min(9, int(10 * np.log(side.distance[block, i] / low) / np.log(high / low)))
        )
        shown = page.locator(DISTANCE + " canvas").evaluate(pixel, [(i + 0.5) / n, 1 - (block + 0.5) / 5])
        assert "#" + "".join(f"{c:02x}" for c in shown) == CIVIDIS[level]
    page.get_by_label("student", exact=True).select_option(label="B")
    assert f"cosine {arguments['students']['B'].cosine[4, min(n - 1, 100)]:.4f}"[:9] in value(COSINE).replace(
        "−", "-"
    )


def test_token_zero_and_no_token(pages, two):
    page = pages.open(static_kl(two[0]).html)
    assert (
        "Choose a token" in page.locator(".kl-detail").inner_text()
        and page.locator(".kl-detail table").count() == 0
    )
    choose(page, 0)
    assert (
        "is predicted by nothing" in page.locator(".kl-detail").inner_text()
        and page.locator(".kl-detail table").count() == 0
    )
    page.select_option(OVER, "all")
    assert page.locator(".cb-view .na").count() == 1
    choose(page, 5)
    assert page.locator(".kl-detail table").count() == 1
    page.locator(".cb-view").focus()
    page.keyboard.press("Escape")
    assert chosen(page) == [] and "Choose a token" in page.locator(".kl-detail").inner_text()
    pages.assert_clean()


def test_words_are_seen_at_every_width(pages, two):
    "The list of the largest gives its words room where three panels would be too narrow for it."
    page = pages.open(static_kl(two[0], token=12).html)
    for width in (1900, 1450, 1280, 1160, 1000, 600):
        page.set_viewport_size({"width": width, "height": 900})
        sizes = page.locator(".kl-list .kl-word").evaluate_all(
            "all => all.map(w => [w.clientWidth, w.scrollWidth])"
        )
        assert len(sizes) == 20 and all(seen >= min(whole, 50) for seen, whole in sizes), (width, sizes)


def test_colours_are_nats_and_prompts_are_grey(pages, two):
    """The same KL has the same colour in every transcript, the legend says which, and what no term asks for
    is grey until it is asked for."""
    d, mask = two[0]["divergence"], two[0]["mask"]
    for factor in (1.0, 1e-3):
        part = replace(d, forward=d.forward * factor)
        page = pages.open(static_kl(two[0] | {"divergence": part}).html)
        edges = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
        wanted = [
            int(np.searchsorted(edges, np.float32(x), "right")) if m else -1
            for x, m in zip(part.forward[0].tolist(), mask)
        ]
        levels = "all => all.map(t => Number(/ h(\\d)/.exec(t.className)?.[1] ?? -1))"
        assert tokens(page).evaluate_all(levels) == wanted and len({*wanted}) > 2
        page.select_option(OVER, "all")
        assert tokens(page).evaluate_all(levels).count(-1) == 1
        key = page.locator(".cb-key").first.inner_text()
        assert "nats" in key and all(f"≥ {edge}" in key for edge in edges) and "< 0.001" in key
    assert "by logarithm" not in key
    pages.assert_clean()


def test_it_opens_at_the_largest_kl_in_the_mask(pages, two):
    "With its distribution beside the strip, all of it above the fold, and the maps below."
    explorer = KLExplorer(two[0], choices=choice_rows(make_transcripts("injection", 3)), choice=1)
    table = token_table(two[0]["encoding"], two[0]["mask"], two[0]["divergence"], "A")
    other = token_table(two[0]["encoding"], two[0]["mask"], two[0]["divergence"], "B")
    best = max(table[table.in_mask].forward.max(), other[other.in_mask].forward.max())
    at = explorer.selected
    assert at == largest_target(**two[0]) and best in (table.forward[at], other.forward[at])
    page = pages.open(explorer.static().html)
    page.set_viewport_size({"width": 1280, "height": 800})
    assert chosen(page) == [at] and "transcript 2 · harmful · injection · " in page.inner_text(
        ".cb-bar >> nth=0"
    )
    strip, detail = page.locator(".cb-body").bounding_box(), page.locator(".kl-detail table").bounding_box()
    assert detail["x"] > strip["x"] + strip["width"], "beside each other"
    assert all(box["y"] + box["height"] < 800 for box in (strip, detail)), "above the fold"
    assert page.locator(".kl-states").bounding_box()["y"] > detail["y"] + detail["height"]
    page.set_viewport_size({"width": 700, "height": 800})
    strip, detail = page.locator(".kl-strip").bounding_box(), page.locator(".kl-detail").bounding_box()
    assert detail["y"] >= strip["y"] + strip["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    pages.assert_clean()


def live_page(pages, explorer):
    "The page of an `explorer` as its widget would be beside a kernel; `model` is the widget's model."
    html = explorer.static().html.replace('"live": false', '"live": true')
    rows = json.dumps(explorer.choices)
    html = re.sub(r'"choices": \[.*?\](?=, "chosen")', lambda m: f'"choices": {rows}', html)
    asked = """function pageModel(state) { return window.model = madeModel(state) }
        function madeModel(state) {"""
    html = html.replace("function pageModel(state) {", asked, 1)
    told = 'send() {}, gone() { for (const act of listeners.get("comm_live_update") || []) act(); },'
    return pages.open(html.replace("send() {},", told, 1))


def test_no_other_transcripts_tokens_stand_there(pages, two):
    """While one is computed, after a number that cannot be, and beside a kernel that has gone: a sentence,
    and no tokens as if they were those of the transcript that is chosen."""
    many = [*make_transcripts("injection", 3), *make_transcripts("plain", 2)]
    page = live_page(pages, KLExplorer(two[0], choices=choice_rows(many)))
    number, status = (
        page.get_by_label("number of the transcript"),
        page.locator(".cb-bar [role=status]").first,
    )
    listed = page.get_by_label("transcript", exact=True)
    assert listed.locator("option").count() == 5 and "of 5" in page.inner_text(".kl-pick")
    page.get_by_label("label of transcripts").select_option("benign")
    assert listed.locator("option").count() == 3, "and the one that is shown"
    for text, words in (("", "The number was empty"), ("6", "no transcript 6: give a number from 1 to 5")):
        number.fill(text), number.press("Tab")
        assert words in status.inner_text() and number.input_value() == "1"
        assert page.locator(".kl-main").is_visible()
    number.fill("4"), number.press("Tab")
    assert "transcript 4" in status.inner_text() and page.locator(".kl-main").is_hidden()
    answer = "model.set('problem', 'MaskError: odd'); model.set('answer', 1)"
    page.evaluate(answer), page.locator(".cb-message", has_text="odd").wait_for()
    assert page.locator(".kl-main").is_hidden() and status.inner_text() == ""
    page.evaluate("model.set('problem', ''); model.set('shown', 3); model.set('answer', 2)")
    page.locator(".kl-main").wait_for()
    page.evaluate("model.gone()")
    assert "run the cell again" in page.locator(".cb-message").first.inner_text() and number.is_disabled()
    assert page.get_by_label("temperature").is_disabled()
    pages.assert_clean()


def test_keys_do_not_reach_the_notebook(pages, two):
    page = pages.open(static_kl(two[0]).html)
    page.evaluate("window.heard = []; document.addEventListener('keydown', e => window.heard.push(e.key))")
    for place in (".cb-view", COSINE, ".kl-list button >> nth=0", "[aria-label='weight beta']", BY):
        page.locator(place).focus()
        for key in ("b", "d", "d", "m", "ArrowRight"):
            page.keyboard.press(key)
    assert page.evaluate("window.heard") == []


def planted(masker, key):
    "`(arguments of kl_state, tokens of the key)` of a transcript in which an agent reads and says `key`."
    chat = [
        {"role": "user", "content": "What is the key?"},
        {"role": "assistant", "content": f"It is {key}, as you see."},
        {"role": "user", "content": f"Say {key} again."},
        {"role": "assistant", "content": key},
    ]
    encoding = masker.encode(chat)
    arguments, *_ = case(masker, encoding=encoding)
    spans = [m.span() for m in re.finditer(key, encoding.text)]
    inside = [any(start < b and end > a for a, b in spans) for start, end in encoding.offsets.tolist()]
    tokens = np.flatnonzero(inside)
    assert len(spans) == 3 and len(tokens) > 15, "the key is split over many tokens"
    d = arguments["divergence"]
    assert (d.ids == encoding.input_ids[:, None]).any(1)[1:].all(), "each token is one of its candidates"
    return arguments, tokens


@pytest.mark.parametrize("kind", KEYS)
def test_a_secret_is_not_told_token_by_token(pages, masker, kind, monkeypatch):
    """Neither in the strip nor in its hover texts, neither in a list nor among the candidates: a page that
    shows every token would tell what no search for the whole finds."""
    key = KEYS[kind]
    if kind == "environment":
        monkeypatch.setenv("EXAMPLE_API_KEY", key)
    arguments, tokens = planted(masker, key)
    ids = arguments["encoding"].input_ids
    still = static_kl(arguments)
    state = json.loads(
        re.search('<script type="application/json" id="state">(.*?)</script>', still.html, re.S)[1]
    )

    def array(value, kind):
        return np.frombuffer(base64.b64decode(value["base64"]), kind)

    shown, d = state["strip"]["tokens"], state["divergence"]
    assert {shown["texts"][k] for k in array(shown["ids"], np.uint32)[tokens]} == {"[removed]"}
    assert (array(shown["token_ids"], np.int32)[tokens] == -1).all()
    words = dict(zip(d["word_ids"], d["words"]))
    named = array(d["ids"], np.int32).reshape(len(ids), -1)
    assert {words[k] for k in named[tokens].ravel()} == {"[removed]"}
    others = np.setdiff1d(np.arange(1, len(ids)), tokens)
    assert (named[others] == ids[others, None]).any(1).all(), "the rest is told"
    # what a reader sees and what the mouse finds
    page = pages.open(still.html)
    for i in tokens[:: len(tokens) // 6].tolist():
        choose(page, i)
        page.locator(".cb-view .cb-t").nth(i).hover()
        about = page.locator(".cb-about").inner_text()
        assert re.match(rf"token {i} \[removed\] (text|user), message ", about), about
        assert {*page.locator(".kl-detail .kl-word").all_inner_texts()} == {"[removed]"}
        assert page.locator(".kl-detail :is([title], .kl-actual)").count() == 0
        assert f"token {i} [removed]: cosine" in page.locator(COSINE).get_attribute("aria-valuetext")
    page.select_option(OVER, "all")
    listed = page.locator(".kl-list button").evaluate_all(
        "all => all.map(b => [Number(b.dataset.token), b.querySelector('.kl-word').innerText])"
    )
    assert {text for i, text in listed if i in tokens} == {"[removed]"}
    # the same without scripts, where all tokens are targets
    plain = kl_html(**arguments | {"mask": np.ones(len(ids), bool)}, n=len(ids))
    rows = re.findall(r"<td>(\d+)</td><td>([^<]*)</td><td>\w+</td><td>(?:in|out)</td>", plain)
    assert {int(i) for i, _ in rows} >= {*tokens.tolist()}
    assert {text for i, text in rows if int(i) in tokens} == {"[removed]"}
    pages.assert_clean()


def test_nothing_of_a_transcript_is_markup(pages, masker):
    ends = np.cumsum([len(p) for p in HOSTILE]).astype(np.int32)
    n = len(HOSTILE)
    encoding = Encoding(
        "".join(HOSTILE),
        np.arange(300, 300 + n, dtype=np.int32),
        np.full(n, Segment.USER, np.uint8),
        np.zeros(n, np.int16),
        np.stack([ends - [len(p) for p in HOSTILE], ends], axis=1).astype(np.int32),
        roles=(HOSTILE[0],),
    )
    arguments, *_ = case(
        masker,
        (HOSTILE[0], HOSTILE[1]),
        encoding=encoding,
        title=HOSTILE[1],
        problem=HOSTILE[0],
        mask_name=HOSTILE[1],
    )
    still = static_kl(arguments, token=2)
    html = still.html.replace('"words": ["', '"words": ["\\u003cimg src=x onerror=alert(2)>', 1)
    assert html != still.html
    for page in (pages.open(html), pages.framed(html)):
        page.locator(OVER).select_option("all")
        for i in range(n):
            choose(page, i)
            page.locator(BY).select_option("part"), page.locator(BY).select_option("role")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2
        for part in (
            ".kl-summary",
            ".kl-shares thead",
            ".kl-detail thead",
            ".cb-message",
            ".kl-shares tbody",
            ".kl-states",
        ):
            assert HOSTILE[0] in page.locator(part).first.inner_text(), part
    assert "<img" not in still.plain and "<script" not in still.plain
    pages.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(pages, two, theme):
    html = static_kl(two[0], token=12).html
    for page in (
        pages.open(html, theme=theme),
        pages.open(html, theme=theme, forced_colors=True),
        pages.framed(html, theme=theme),
    ):
        assert page.locator(".kl-detail table").count() == 1 and pages.violations(page) == []
    narrow = pages.open(html, theme=theme)
    narrow.set_viewport_size({"width": 480, "height": 900})
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 480 and pages.violations(narrow) == []
    pages.assert_clean()


@pytest.mark.slow
def test_broken_input_is_told(pages, two):
    page = pages.open(static_kl({"problem": "runs/x has no adapter_config.json"}).html)
    assert (
        page.locator(".cb-message").inner_text() == "runs/x has no adapter_config.json"
        and pages.violations(page) == []
    )
    assert KLExplorer({"problem": "gone"}).static().plain.count("gone") == 1
    for wrong, right in (
        ('"texts": [', '"was": ['),
        ('"words": [', '"was": ['),
        ('"blocks": 5', '"blocks": 5000'),
        ('"names": ["A", "B"]', '"names": 3'),
    ):
        page = pages.open(static_kl(two[0], token=4).html.replace(wrong, right))
        assert (
            page.locator(".cb-message:visible").count() == 1 or page.locator(".kl-detail table").count() == 1
        )
        if wrong != '"blocks": 5':
            assert "cannot be shown" in page.locator(".cb-message").first.inner_text(), wrong


def test_infinite_kl_is_shown(pages, masker):
    def fixed(row):
        return Side(torch.tensor([row] * 4), lambda h: h)

    ids = np.array([300, 0, 1, 0], np.int32)
    ends = np.arange(1, 5, dtype=np.int32)
    encoding = Encoding(
        "abcd",
        ids,
        np.full(4, Segment.TEXT, np.uint8),
        np.zeros(4, np.int16),
        np.stack([ends - 1, ends], axis=1),
        roles=("assistant",),
    )
    d = diverge(fixed([0.0, 0.0, -1.0]), {"s": fixed([0.0, -np.inf, 0.0])}, ids, k=2)
    page = pages.open(
        static_kl(
            dict(
                encoding=encoding,
                mask=np.ones(4, bool),
                divergence=d,
                tokenizer=masker.tokenizer,
                vocabulary=3,
            ),
            token=1,
        ).html
    )
    assert (
        page.locator(".kl-detail tfoot").inner_text().count("∞") == 2
        and "∞" in page.locator(".kl-summary").inner_text()
    )
    assert page.locator(".kl-states").is_hidden(), "no hidden states were given"
    pages.assert_clean()


def test_many_tokens(pages, masker):
    n = 8_000
    pieces = [" one", " two", "\n", " three"]
    ends = np.cumsum([len(pieces[i % 4]) for i in range(n)]).astype(np.int32)
    encoding = Encoding(
        "".join(pieces[i % 4] for i in range(n)),
        np.full(n, 300, np.int32),
        np.full(n, Segment.TEXT, np.uint8),
        np.zeros(n, np.int16),
        np.stack([np.r_[0, ends[:-1]], ends], axis=1).astype(np.int32),
        roles=("assistant",),
    )
    html = static_kl(case(masker, ("A",), encoding=encoding)[0]).html
    page = pages.open(html)
    assert len(html) < 3_500_000 and page.locator(".kl-list button").count() == 20
    page.locator(DISTANCE).focus()
    page.keyboard.press("End")
    assert chosen(page) == [n - 1]
    pages.assert_clean()


@pytest.mark.slow
def test_the_notebook_tells_no_secret_token_by_token(tmp_path):
    "Its tables show tokens, too: here most of them are a key's."
    student = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    torch.manual_seed(0)
    with torch.no_grad():
        [p.normal_(std=0.05) for key, p in student.named_parameters() if "lora_B" in key]
    save_adapter(student, tmp_path / "adapter")
    chat = [{"role": "user", "content": "Key?"}, {"role": "assistant", "content": KEYS["hub"]}]
    write_transcripts(tmp_path / "keys.jsonl", [Transcript("key", chat, label="benign")])
    given = ("-p", "adapter", tmp_path / "adapter", "-p", "data", tmp_path / "keys.jsonl")
    done = run(BIN / "papermill", NBS / "explore_kl.ipynb", tmp_path / "out.ipynb", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    shown = [
        o.data for cell in read(tmp_path / "out.ipynb").cells for o in cell.get("outputs", []) if "data" in o
    ]
    (top,) = [d["text/html"] for d in shown if "in_mask" in d["text/plain"] and "forward" in d["text/plain"]]
    texts = re.findall(r"<th>\d+</th>\s*<td>(.*?)</td>\s*<td>assistant</td>\s*<td>text</td>", top)
    assert len(texts) > 2 and {*texts} == {"[removed]"}


@pytest.mark.slow
def test_the_notebook_under_papermill(pages, tmp_path):
    """Two adapters compared, by one command: the output notebook and the page hold the explorer, and no
    widget."""
    for name, std in (("first", 0.05), ("second", 0.01)):
        student = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
        torch.manual_seed(0)
        with torch.no_grad():
            [p.normal_(std=std) for key, p in student.named_parameters() if "lora_B" in key]
        save_adapter(student, tmp_path / name)
    given = dict(
        adapter=tmp_path / "first",
        adapter_b=tmp_path / "second",
        data=ROOT / "tests" / "fixtures" / "agent.jsonl",
        number=2,
        temperature=2,
        page=tmp_path / "page.html",
    )
    given = [word for name, value in given.items() for word in ("-p", name, value)]
    done = run(BIN / "papermill", NBS / "explore_kl.ipynb", tmp_path / "out.ipynb", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    nb = read(tmp_path / "out.ipynb")
    shown = [o.data for cell in nb.cells for o in cell.get("outputs", []) if "data" in o]
    assert "widgets" not in nb.metadata and not any("widget-view" in kind for data in shown for kind in data)
    assert sum("<iframe" in data.get("text/html", "") for data in shown) == 1
    page = pages.open(tmp_path / "page.html")
    losses = np.array(values(page, ".kl-summary [data-value]")).reshape(2, 3)
    assert (
        page.locator(".kl-summary b").all_inner_texts() == ["A", "B"]
        and losses[0, 1] > losses[1, 1] > 0
        and np.allclose(losses[:, 1], 4 * losses[:, 0])
    )
    said = "".join(o.text for cell in nb.cells for o in cell.get("outputs", []) if o.get("name") == "stdout")
    assert f"A: KL loss {losses[0, 1]:.4g} nats at T = 2" in said
    pages.assert_clean()


@pytest.mark.slow
def test_the_notebook_in_jupyterlab(browser, tmp_path):
    """Run all of explore_kl.ipynb, then ask its kernel for another temperature and another transcript, as a
    reader would."""
    copy = copy_tree(tmp_path / "cbnb")
    with Lab(copy / "nbs") as lab:
        nb = lab.open("explore_kl.ipynb")
        nb.run_all(timeout=600)
        view = nb.page.locator(".cb-kl")
        loss, idle = (
            view.locator(".kl-summary [data-value]").nth(1),
            view.locator(".cb-bar [role=status]").first,
        )

        def python(code):
            return nb.execute(f"print({code})").strip()

        def shown():
            return float(loss.get_attribute("data-value"))

        def wanted():
            return float(
                python("masked_kl(explorer.arguments['divergence'], explorer.arguments['mask'])['student']")
            )

        assert abs(shown() - wanted()) < 1e-9
        view.locator(".kl-list button").first.click()
        assert python("explorer.selected") == view.locator(".kl-list button").first.get_attribute(
            "data-token"
        )
        view.get_by_label("temperature").focus()
        nb.page.keyboard.press("End")
        nb.page.wait_for_function(
            "element => element.textContent === ''", arg=idle.element_handle(), timeout=60_000
        )
        assert (
            python("explorer.arguments['divergence'].temperature") == "10.0"
            and abs(shown() - wanted()) < 1e-9
        )
        assert "T = 10" in view.locator(".kl-detail").inner_text()
        assert "of 40" in view.locator(".kl-pick").inner_text()
        view.get_by_label("label of transcripts").select_option("harmful")
        harmful = view.get_by_label("transcript", exact=True)
        assert "8 listed" in view.locator(".kl-pick").inner_text()
        harmful.select_option(index=7)  # behind the one that is shown
        view.locator(".cb-message", has_text="the KL term leaves it out").wait_for(timeout=60_000)
        assert (
            python("explorer.arguments['title']") == "injection-eval-0-00006"
            and abs(shown() - wanted()) < 1e-9
            and python("explorer.arguments['mask'][explorer.selected]") == "True"
        )
        assert "post_injection_only" in python(
            "explorer.strip['a']"
        ) and "the KL term leaves it out" in python("explorer.problem")
        python("setattr(explorer, 'selected', 20)")
        view.locator(".kl-detail", has_text="Token 20 ").wait_for(timeout=60_000)
        python("setattr(explorer, 'chosen', 10**6)")
        view.locator(".cb-message", has_text="IndexError").wait_for(timeout=60_000)
        assert view.locator(".kl-main").is_hidden(), "tokens of another transcript"
        nb.check()
        nb.shot(tmp_path / "explore_kl.png")
        lab.assert_offline()
