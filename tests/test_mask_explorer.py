"""The mask explorer: its frames and files without a browser, its standalone page in one. JupyterLab itself is
in test_lab.py."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cbnb.masking.masker import ChatMasker
from cbnb.masking.policies import POLICIES as ALL_POLICIES
from cbnb.masking.policies import loss_mask, mask_counts
from cbnb.masking.targets import training_mask
from cbnb.step.models import load_tokenizer
from cbnb.transcripts.reader import read_transcripts, write_transcripts
from cbnb.transcripts.record import Transcript, TranscriptError
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets import masks
from cbnb.widgets.masks import (
    COUNT_COLUMNS,
    ExplorerBox,
    Shelf,
    as_shelf,
    chatml_header,
    count_frame,
    csv_text,
    explore,
    explored_html,
    finding_frame,
    known_bad,
    mask_explorer,
    mask_frame,
    read_pasted,
    safe_cell,
    token_frame,
)
from helpers import NBS, run

# what can be shown of a transcript alone
POLICIES = [name for name, policy in ALL_POLICIES.items() if not policy.needs_comparison]
FIXTURES = Path(__file__).parent / "fixtures"
BAD = known_bad()
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&"
INJECTED, PLAIN = make_transcripts("injection", 2), make_transcripts("plain", 2)


@pytest.fixture(scope="module")
def masker():
    return ChatMasker(load_tokenizer("tinyagent"))


def hostile():
    "A transcript that is hostile wherever it can be: names, roles, ids, labels of tools, metadata, text."
    call = {"type": "function", "function": {"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}}
    tool = {
        "type": "function",
        "function": {
            "name": HOSTILE,
            "parameters": {"type": "object", "properties": {HOSTILE: {"type": "string"}}},
        },
    }
    messages = [
        {"role": HOSTILE, "content": HOSTILE},
        {"role": "user", "content": f"=1+1 \u202e {HOSTILE}"},
        {"role": "assistant", "content": HOSTILE, "tool_calls": [call]},
    ]
    return Transcript(HOSTILE, messages, [tool], source=HOSTILE, meta={HOSTILE: HOSTILE})


# --- masks that are known to be bad ---


@pytest.mark.parametrize("transcript", BAD, ids=lambda t: t.id)
def test_each_bad_mask_is_flagged_by_its_own_finding(masker, transcript):
    seen = explore(transcript, masker, {"chatml_header": chatml_header}, max_length=200)
    name, kind = transcript.meta["mask"] or "every mask", transcript.meta["finds"]
    frame = finding_frame(seen)
    assert kind in set(frame.kind[[name in names.split(", ") for names in frame.masks]])
    assert kind in explored_html(seen)
    if seen.encoding is not None:
        assert "✗" in mask_frame(seen).set_index("mask").finds[name]


def test_bad_masks_are_five_different_ones():
    kinds = {t.id: t.meta["finds"] for t in BAD}
    assert kinds == {
        "all-zero": "all_zero",
        "header-trained": "trains_header",
        "truncated": "lost_to_truncation",
        "wrong-header": "trains_user",
        "injected-eot": "no_mask",
    }


def test_a_sound_mask_is_not_flagged(masker):
    for t in (*INJECTED, *PLAIN):
        finds = mask_frame(explore(t, masker)).set_index("mask").finds
        assert finds["assistant_only"] == finds["post_injection_only"] == "✓ nothing" and finds[
            "first_header"
        ].startswith("✗")


# --- frames ---


@pytest.mark.parametrize(
    "name",
    ["agent.jsonl", "agentdojo.json", "sharegpt.json", "tau_bench.json", "trace_v1.jsonl", "rrfa.jsonl"],
)
def test_masks_are_those_of_training_and_counts_add_up(masker, name):
    for t in as_shelf(FIXTURES / name).transcripts:
        seen = explore(t, masker)
        assert not seen.message and not seen.left_out and [m.name for m in seen.masks] == list(POLICIES)
        for m in seen.masks:
            assert (m.values == training_mask(seen.encoding, t, m.name)).all()
            assert all(
                m.sentences[code].startswith("in: " if inside else "out: ")
                for code, inside in zip(m.codes, m.values)
            )
        for by, key in (("role", "role"), ("message", "message")):
            frame = count_frame(seen.encoding, seen.masks, by).set_index(key)
            for m in seen.masks:
                counted = mask_counts(seen.encoding, m.values, by)
                assert frame[m.name].to_dict() == {k: row["in_mask"] for k, row in counted.items()}
                assert frame.tokens.to_dict() == {k: row["tokens"] for k, row in counted.items()}


@pytest.mark.parametrize("label", ["benign", "harmful"])
def test_a_label_leaves_only_its_tokens(masker, label):
    seen = explore(INJECTED[0], masker, label=label)
    for m in seen.masks:
        assert (m.values == loss_mask(seen.encoding, m.name, label)).all()
    counts = count_frame(seen.encoding, seen.masks, "label").set_index("label")
    assert (counts.drop(index=label)[[m.name for m in seen.masks]] == 0).all(
        axis=None
    ) and counts.full_sequence[label] > 0
    assert f"labelled {label}" in explored_html(seen)


def test_what_training_takes_in_place_of_a_policy_is_said(masker):
    m = {m.name: m for m in explore(PLAIN[0], masker).masks}
    assert (
        m["post_injection_only"].values == m["assistant_only"].values
    ).all() and "assistant_only stands in" in m["post_injection_only"].note
    assert all("in place of post_injection_only" in s for s in m["post_injection_only"].sentences)


def test_a_message_that_is_switched_off_is_out_with_its_reason(masker):
    t = replace(INJECTED[0], message_labels={4: "none"})
    m = next(m for m in explore(t, masker).masks if m.name == "assistant_only")
    all_in = next(m for m in explore(INJECTED[0], masker).masks if m.name == "assistant_only").values
    assert (all_in & ~m.values).any() and all(
        "message 4 is labelled none" in m.sentences[m.codes[i]] for i in np.flatnonzero(all_in & ~m.values)
    )


@pytest.mark.parametrize("side", ["targets", "left", "right"])
def test_truncation_is_a_further_mask(masker, side):
    seen = explore(INJECTED[0], masker, max_length=60, side=side)
    state = masks.explored_state(seen, masker.tokenizer)
    shown = {m["name"]: m for m in state["masks"]}
    assert len(shown) == 2 * len(POLICIES) and "kept" in mask_frame(seen)
    for m in seen.masks:
        where = np.flatnonzero(m.kept)
        assert not len(where) or where[-1] - where[0] < 60
        entry = shown[f"{m.name}, truncated"]
        assert entry["values"] == m.kept.astype(np.uint8).tobytes()
        codes = np.frombuffer(entry["codes"], np.uint32)
        assert all(
            entry["sentences"][code] == "out: cut off by truncation" for code in codes[m.values & ~m.kept]
        )
    assert len(
        masks.explored_state(explore(INJECTED[0], masker, max_length=1000), masker.tokenizer)["masks"]
    ) == len(POLICIES)


def test_own_functions_stand_beside_the_policies_and_may_fail(masker):
    def mine(encoding):
        return encoding.segments > 5

    seen = explore(
        PLAIN[0],
        masker,
        {"mine": mine, "broken": lambda e: 1 / 0, "short": lambda e: np.ones(3, bool), HOSTILE: mine},
    )
    assert [name for name, _ in seen.left_out] == ["broken", "short"] and "division by zero" in dict(
        seen.left_out
    )["broken"]
    frame = mask_frame(seen).set_index("mask")
    assert (
        frame.finds["broken"] == "cannot be applied"
        and "policy mine" in seen.masks[len(POLICIES)].sentences[0]
    )
    assert HOSTILE in frame.index and "<script" not in explored_html(seen)


def test_a_hundred_thousand_tokens(masker):
    words = [
        {"role": "user", "content": "hello there " * 15_000},
        {"role": "assistant", "content": "ok fine " * 8_000},
    ]
    seen = explore(Transcript("long", words), masker, max_length=4096)
    assert len(seen.encoding.input_ids) > 100_000 and len(explored_html(seen)) < 20_000
    assert len(masks.explored_view(seen, masker.tokenizer).plain) < 40_000


def test_long_tables_are_cut_and_say_so(masker):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(800)]
    assert "… 501 more rows" in explored_html(explore(Transcript("many", turns), masker))


def test_an_end_left_out_by_design_is_a_note(masker):
    "And an own policy that leaves it out fails, unless it says that it is meant to."
    own = replace(ALL_POLICIES["tool_calls_only"], open_end=False)
    finds = mask_frame(explore(INJECTED[0], masker, {"own": own})).set_index("mask").finds
    for name in ("tool_calls_only", "action_prefix_only"):
        assert finds[name] == "✓ nothing, note: eot_by_design"
    assert finds["own"] == "✗ eot_untrained"


def test_the_audit_is_of_the_masks_that_are_shown():
    "Live, the sentences follow the choice of a reader: mask A, and mask B where a difference is shown."
    explorer = mask_explorer(INJECTED, a="post_injection_only")
    box = explorer.box = ExplorerBox(explorer)
    assert "The audit finds nothing wrong with post_injection_only." in box.tables.value
    box.strip.view = "difference"
    assert "Audit of post_injection_only and first_header" in box.tables.value
    box.strip.a = "tool_calls_only"
    box.strip.view = "mask"
    assert "Audit of tool_calls_only: nothing is wrong, but note" in box.tables.value


@pytest.mark.parametrize("name", ["assistant_only", *COUNT_COLUMNS])
def test_a_name_that_a_column_has_is_refused(masker, name):
    with pytest.raises(ValueError, match=f"cannot be called {name}"):
        explore(PLAIN[0], masker, {name: lambda e: e.segments > 5})


# --- CSV ---


def test_csv_is_a_line_a_token_and_reads_back(masker):
    seen = explore(INJECTED[0], masker, max_length=60)
    text = csv_text(token_frame(seen, masker.tokenizer))
    back = pd.read_csv(io.StringIO(text), keep_default_na=False)
    assert len(back) == len(seen.encoding.input_ids) == text.count("\n") - 1
    assert (back.token_id == seen.encoding.input_ids).all() and (
        back.message == seen.encoding.message_index
    ).all()
    assert (back.predicted_at == back.position - 1).all()
    for m in seen.masks:
        assert (back[m.name] == m.values).all() and (back[f"{m.name}_kept"] == m.kept).all()
        assert list(back[f"{m.name}_reason"]) == [m.sentences[c] for c in m.codes]


FORMULAS = [
    "=1",
    "+1+1",
    "-1-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "＋1",
    "－1",
    "＠1",
    '=HYPERLINK("http://example.com";"x")',
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_a_formula(masker, text):
    assert safe_cell(text)[0] == "'" or safe_cell(text)[0] in "⇥⏎\\"
    said = [
        {"role": text if text.isprintable() else "user", "content": f'{text},{text}"{text}'},
        {"role": "assistant", "content": text},
    ]
    t = Transcript(text, said)
    rows = csv.reader(
        io.StringIO(
            csv_text(token_frame(explore(t, masker, {text: lambda e: e.segments > 5}), masker.tokenizer))
        )
    )
    header = next(rows)
    for row in [header, *rows]:
        for name, cell in zip(header, row):
            assert not cell.startswith(tuple("=+@＝＋－＠\t\r\n")) and not (
                cell.startswith("-") and not re.fullmatch(r"-1", cell)
            ), (name, cell)
            assert not re.search("[\n\r\t\u202e]", cell)


def test_files_appear_whole_and_overwrite_nothing(masker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer = mask_explorer([hostile(), PLAIN[0]])
    box = explorer.box = ExplorerBox(explorer)
    for button in (box.page, box.page, box.rows):
        button.click()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 3 and all(
        re.fullmatch(r"masks-[A-Za-z0-9._-]{1,60}\.(html|csv)", n) for n in names
    ), names
    assert (
        explorer.to_csv("a.csv").read_text().count("\n") == len(explorer.exploration.encoding.input_ids) + 1
    )
    assert explorer.save("a.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "a.csv").unlink()
    monkeypatch.setattr(
        masks, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError("no space left"))
    )
    box.rows.click()
    assert "no space left" in box.answer.value


# --- what comes in ---


def test_a_list_of_messages_and_a_record_are_transcripts():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for given in (chat, {"messages": chat, "label": "benign"}, [{"messages": chat, "label": "benign"}]):
        assert as_shelf(given).at(1).messages == chat
    assert (
        as_shelf(BAD).at(2).id == "header-trained"
        and as_shelf(read_transcripts(FIXTURES / "agent.jsonl")).at(1).id == "pay-1"
    )
    assert (
        read_pasted(json.dumps(chat)).note
        and not as_shelf(BAD).note
        and as_shelf(FIXTURES / "circuit_breakers.json").at(1)
    )


def test_calls_that_a_template_drops_are_shown_as_they_are_trained():
    drops = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content "
        "}}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    explorer = mask_explorer(INJECTED, chat_template=drops)
    assert explorer.exploration.encoding.lost_calls
    written = explorer.set(tool_call_format="hermes").exploration.encoding
    assert not written.lost_calls and "<tool_call>" in written.text


# labels that contradict themselves; pairs, which are read on request only
REFUSED = ("inverted", "preference")


@pytest.mark.parametrize(
    "name", sorted(p.name for p in FIXTURES.iterdir() if not any(word in p.name for word in REFUSED))
)
def test_every_format_can_be_pasted(name):
    read = [(t.messages, t.label) for t in as_shelf(FIXTURES / name).transcripts]
    assert [
        (t.messages, t.label) for t in read_pasted((FIXTURES / name).read_text()).transcripts
    ] == read and read


def test_a_file_is_read_no_further_than_asked(tmp_path):
    class Counted(list):
        read = 0

        def __iter__(self):
            for t in list.__iter__(self):
                self.read += 1
                yield t

    many = Counted(make_transcripts("plain", 1200))
    shelf = Shelf(many)
    assert (
        shelf.more
        and len(shelf.listing) == masks.LISTED
        and many.read == masks.LISTED + 1
        and shelf.count == 1200
    )
    assert (
        shelf.at(700) is many[699]
        and shelf.at(699) is many[698]
        and many.read == 700
        and len(shelf.held) == masks.HELD
    )
    assert shelf.at(2) is many[1] and many.read == 702
    with pytest.raises(TranscriptError, match="no transcript 1201; it holds 1,200"):
        shelf.at(1201)
    assert shelf.count == 1200


def test_a_transcript_is_found_among_many(tmp_path, monkeypatch):
    "By label, kind, text and finding, reading no further than to the first; the count is known at the end."
    path = tmp_path / "many.jsonl"
    write_transcripts(path, [*make_transcripts("plain", 600), *INJECTED, BAD[0]])
    explorer = mask_explorer(path)
    box = explorer.box = ExplorerBox(explorer)
    assert box.size.value == "of more than 500" and not box.count.disabled
    box.wanted["label"].value = "harmful"
    box.match.click()
    assert explorer.settings["number"] == 601 and explorer.exploration.transcript == INJECTED[0]
    assert "transcript 601" in box.told.value and explorer.shelf.passed == 601
    box.wanted["text"].value = "NO SUCH WORDS"
    assert not box.told.value
    box.match.click()
    assert "none from 602 to the end (603)" in box.told.value and box.size.value == "of 603"
    box.match.click()
    assert "none from 1 to the end" in box.told.value
    for name, value in (("label", ""), ("text", ""), ("finding", "all_zero")):
        box.wanted[name].value = value
    box.match.click()
    assert explorer.exploration.transcript.id == "all-zero" and box.size.value == "of 603"
    monkeypatch.setattr(masks.time, "monotonic", iter(range(0, 10**6, 10)).__next__)
    explorer = mask_explorer(path)
    box = ExplorerBox(explorer)
    box.wanted["kind"].value = "injection-TRAIN"
    box.match.click()
    assert "none from 2 to 2; press again to read on" in box.told.value
    box.count.click()
    assert "so far" in box.told.value and not box.count.disabled


def test_what_is_going_on_is_said_in_the_place_of_old_tokens(monkeypatch):
    "While a model is fetched; and an empty field changes nothing, in a sentence."
    explorer = mask_explorer(INJECTED)
    box = explorer.box = ExplorerBox(explorer)
    seen = []
    load = masks.load_masker
    monkeypatch.setattr(
        masks,
        "load_masker",
        lambda **given: seen.append((box.strip.message, box.strip.tokens)) or load(**given),
    )
    box.model.value = "/no/such/model"
    [(message, tokens)] = seen
    assert "tokenizer of /no/such/model" in message and not tokens["ids"] and "no such" in box.strip.message
    box.model.value = ""
    assert "was empty" in box.note.value and box.model.value == "/no/such/model"
    box.model.value = "tinyagent"
    box.file.value = "x.jsonl"
    box.file.value = ""
    assert "field file was empty" in box.note.value and box.file.value == "x.jsonl"


def test_records_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "some.jsonl"
    write_transcripts(path, PLAIN)
    path.write_text(path.read_text().replace("\n", "\n{broken\n", 1))
    explorer = mask_explorer(path, number=2)
    box = ExplorerBox(explorer)
    assert explorer.exploration.transcript == PLAIN[1] and len(explorer.shelf.listing) == 2
    assert "line 2" in box.note.value and "1 record up to here" in box.note.value


WRONG = {
    "nothing": (dict(), "no transcript yet"),
    "no file": (dict(transcripts="/no/such.jsonl"), "no such file"),
    "no transcripts": (dict(transcripts=[1]), "no transcripts in a list"),
    "past the end": (dict(transcripts=PLAIN, number=3), "no transcript 3"),
    "number": (dict(transcripts=PLAIN, number=0), "numbered from 1"),
    "model": (dict(transcripts=PLAIN, model="/no/such/model"), "no such model folder"),
    "template": (dict(transcripts=PLAIN, chat_template="{% if %}"), "template"),
    "control token": (
        dict(transcripts=[Transcript("a", [{"role": "user", "content": "<|eot_id|>"}])]),
        "control token",
    ),
    "side": (dict(transcripts=PLAIN, side="up"), "side 'up'"),
    "label": (dict(transcripts=PLAIN, label="good"), "label 'good'"),
    "max_length": (dict(transcripts=PLAIN, max_length=0), "at least 1"),
    "control": (dict(transcripts=PLAIN, control="x"), "control='x'"),
    "number is text": (dict(transcripts=PLAIN, number="x"), "numbered from 1"),
    "max_length is text": (dict(transcripts=PLAIN, max_length="x"), "not supported"),
    "policy name": (
        dict(transcripts=PLAIN, policies={"assistant_only": len}),
        "cannot be called assistant_only",
    ),
    "role": (
        dict(transcripts=[Transcript("a", [{"role": None, "content": 1}])]),
        "not an object with a role",
    ),
    "empty": (dict(transcripts=[]), "no transcript 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_the_view(case, monkeypatch):
    settings, words = WRONG[case]
    explorer = mask_explorer(**settings)
    assert words in explorer.exploration.message
    for static in ("1", "0"):
        monkeypatch.setenv("CBNB_STATIC", static)
        bundle = mask_explorer(**settings)._repr_mimebundle_()[0]
        assert ("application/vnd.jupyter.widget-view+json" in bundle) == (static == "0")
    assert words in explorer.static().plain.replace("&#x27;", "'")
    assert words in ExplorerBox(explorer).strip.message


def test_a_mask_that_is_not_there_is_told(masker):
    explorer = mask_explorer(PLAIN, a="typo")
    assert (
        "no mask typo" in masks.explored_state(explorer.exploration, **explorer.looks)["message"]
        and not explorer.exploration.message
    )
    assert not masks.explored_state(explorer.set(a="completion_only").exploration, **explorer.looks)[
        "message"
    ]
    with pytest.raises(TypeError, match="no setting nubmer"):
        explorer.set(nubmer=1)


# --- hostile text ---


def test_nothing_of_a_transcript_is_markup(monkeypatch):
    refused = Transcript(HOSTILE, [{"role": "user", "content": f"<|eot_id|>{HOSTILE}"}])
    explorer = mask_explorer([hostile(), refused], policies={HOSTILE: lambda e: e.segments > 5})
    for number in (1, 2):
        view = explorer.set(number=number).static()
        assert explorer.exploration.transcript is not None
        allowed = {"table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "details", "summary"}
        assert set(re.findall(r"<([a-z]+)", view.plain)) <= allowed and "onerror" not in re.sub(
            r"&lt;.*?&gt;", "", view.plain
        )
        assert view.html.count("<script") == 2 and "<img" not in view.html and "\u202e" not in view.html
        monkeypatch.setenv("CBNB_STATIC", "0")
        explorer.box = None
        explorer._repr_mimebundle_()
        box = explorer.box
        for html in (box.tables.value, box.note.value, box.answer.value):
            assert not re.search("<script|<img", html)


# --- the standalone page ---


@pytest.fixture(scope="module")
def page_text():
    return mask_explorer(INJECTED, a="post_injection_only", max_length=90).static().html


def test_the_page_shows_masks_differences_and_reasons(pages, page_text):
    page = pages.open(page_text)
    assert (
        page.locator("h1").inner_text() == f"masks of {INJECTED[0].id}"
        and page.locator(".cb-t.in").count() > 5
    )
    page.get_by_label("what is shown").select_option("difference")
    plus, minus = page.locator(".cb-view .cb-t.plus"), page.locator(".cb-view .cb-t.minus")
    assert plus.count() == 0 and minus.count() > 20
    page.locator(".cb-view").focus()
    # the reasons follow the focus, without a mouse
    page.keyboard.press("d")
    about = page.locator(".cb-about [role=status]")
    assert (
        "A post_injection_only: out: " in about.inner_text() and "B first_header: in: " in about.inner_text()
    )
    page.get_by_label("mask B").select_option("assistant_only")
    assert 0 < page.locator(".cb-view .cb-t.minus").count() < 20
    minus.nth(3).hover()
    assert "policy assistant_only" in page.locator(".cb-hover").inner_text()
    page.get_by_label("mask A").select_option("assistant_only, truncated")
    assert page.get_by_text("only in B:").is_visible()
    pages.assert_clean()


def test_the_page_marks_predicting_positions(pages, page_text):
    page = pages.open(page_text)

    def marked():
        inside = page.evaluate(
            "[...document.querySelectorAll('.cb-view .cb-t')].map(t => t.classList.contains('in'))"
        )
        return [i for i, yes in enumerate(inside) if yes]

    at_token = marked()
    page.get_by_label("predicting position").check()
    assert marked() == [i - 1 for i in at_token] and len(at_token) > 5
    pages.assert_clean()


def test_the_page_holds_all_tables(pages, page_text):
    page = pages.open(page_text)
    captions = page.locator("caption").all_inner_texts()
    assert captions[:1] == [
        "Masks of tinyagent, as training takes them; kept: in a window of 90 tokens (targets)"
    ]
    assert captions[1:4] == ["Tokens by role", "Tokens by message and turn", "Tokens by label"]
    assert page.get_by_text("The audit finds nothing wrong with post_injection_only.").is_visible()
    assert page.locator("tr", has_text="trains_tool_result").count() >= 1
    page.get_by_text("The record").click()
    assert page.get_by_text("expected_call").is_visible()
    pages.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("number", [1, 5])
def test_the_page_is_accessible(pages, theme, number, page_text):
    text = page_text if number == 1 else mask_explorer(BAD, number=number).static().html
    for page in (
        pages.open(text, theme=theme),
        pages.open(text, theme=theme, forced_colors=True),
        pages.framed(text, theme=theme),
    ):
        assert pages.violations(page) == []
    pages.assert_clean()


def test_hostile_text_stays_text(pages):
    page = pages.open(
        mask_explorer(hostile(), policies={HOSTILE: lambda e: e.segments > 5}, a=HOSTILE).static().html
    )
    page.locator(".cb-t").nth(30).click()
    page.get_by_label("what is shown").select_option("difference")
    page.get_by_text("The record").click()
    assert page.evaluate("window.hacked") is None and page.locator("main script, main img").count() == 0
    assert (
        page.locator("h1").inner_text() == f"masks of {HOSTILE}"
        and page.get_by_label("mask A").input_value() == HOSTILE
    )
    pages.assert_clean()


def test_a_refused_transcript_is_a_message_and_its_messages(pages):
    page = pages.open(mask_explorer(BAD, number=5).static().html)
    assert (
        "control token" in page.get_by_role("alert").inner_text()
        and not page.locator(".cb-view").is_visible()
    )
    assert page.locator("caption").nth(1).inner_text() == "The messages, since no mask can be made of them"
    pages.assert_clean()


# --- the run notebook under papermill ---


@pytest.mark.slow
def test_the_notebook_runs_without_a_front_end(tmp_path):
    write_transcripts(tmp_path / "bad.jsonl", BAD)

    def papermill(*parameters):
        return run("papermill", NBS / "explore_masks.ipynb", "out.ipynb", *parameters, cwd=tmp_path)

    done = papermill("-p", "data", "bad.jsonl", "-p", "number", "2", "-p", "max_length", "60")
    assert done.returncode == 0, done.stdout
    nb = json.loads((tmp_path / "out.ipynb").read_text())
    shown = "".join(
        "".join(o.get("data", {}).get("text/html", "")) for c in nb["cells"] for o in c.get("outputs", [])
    )
    assert shown.count("<iframe") == 2 and "header-trained" in shown and "widgets" not in nb["metadata"]
    for t in BAD:
        assert t.meta["finds"] in shown
    done = papermill("-p", "polciy", "x")
    assert done.returncode != 0 and "unknown parameter 'polciy'" in done.stdout


def test_whose_actions_are_shown_where_runs_were_read_with_it(masker, tmp_path):
    """A run that was read with attack-free ones has the policy injected_actions_only too, and each token of
    the user's own work says why it is out."""
    from test_actions import read_streams, runs_of

    runs_of(tmp_path)
    run = read_streams([tmp_path])[0][0]
    seen = explore(run, masker)
    [mask] = [m for m in seen.masks if m.name == "injected_actions_only"]
    said = {mask.sentences[code] for code in mask.codes}
    assert any("in: " in s and "not the user's own work" in s for s in said) and any(
        "is labelled none" in s for s in said
    )
    assert 0 < mask.values.sum() < next(m for m in seen.masks if m.name == "post_injection_only").values.sum()
