"""Adaptations: each has a reverse, spans and labels follow, and what is trained is what the assistant wrote,
by an oracle that asks no masker."""

import random
from dataclasses import replace

import pytest

from cbnb.masking.adapt import (
    ADAPTATIONS,
    CHANGES,
    CONTINUE,
    adapt,
    adapt_names,
    adapted_counts,
    propose,
    restore,
)
from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.masking.policies import Segment
from cbnb.masking.templates import MaskError
from cbnb.transcripts.record import InjectionSpan, Transcript
from spoken import STOCK, spelled, stock_masker, trained

WORDS = ("Ada", "bee", "c\u00f4te", "dusk", "\u4f60\u597d", "fig 7", "gnat\nhid", '{"i": 1}')
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Does it.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
    for name in ("look", "send")
]
SWITCH = (
    "{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{%- "
    "endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(seed, number=0):
    """A random transcript, as real agents make them: parallel calls, words beside calls, ids of any kind,
    empty answers, turns in a row, injections."""
    draw = random.Random(seed)

    def text(n=3):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, n)))

    def named():
        return draw.choice(({"id": f"call_{draw.random()}"}, {"id": ""}, {}, {"id": "abcDEF123"}))

    messages, spans, labels = [{"role": "system", "content": text()}] * draw.randint(0, 1), [], {}
    messages += [
        {"role": "user", "content": text(), **({"name": "eve"} if draw.random() < 0.2 else {})}
        for _ in range(draw.randint(1, 2))
    ]
    for _ in range(draw.randint(1, 4)):
        calls = [
            {
                **named(),
                "type": "function",
                "function": {
                    "name": draw.choice(("look", "send")),
                    "arguments": {"a": text()} if draw.random() < 0.8 else {},
                },
            }
            for _ in range(draw.choice((0, 1, 1, 2, 3)))
        ]
        message = {"role": "assistant", "content": draw.choice(("", text(), "  \n", text()))}
        if calls:
            message["tool_calls"] = calls
        if draw.random() < 0.1:
            message["weight"] = 1
        if draw.random() < 0.3:
            labels[len(messages)] = draw.choice(("benign", "harmful", "none"))
        messages.append(message)
        for call in (
            draw.sample(calls, len(calls))
            if draw.random() < 0.3
            else calls
            if draw.random() < 0.9
            else calls[:-1]
        ):
            content = text(6)
            if draw.random() < 0.3:
                spans.append(
                    InjectionSpan(
                        len(messages),
                        (at := draw.randrange(len(content))),
                        draw.randint(at + 1, len(content)),
                    )
                )
            result = {"role": "tool", "content": content}
            if "id" in call:
                result["tool_call_id"] = call["id"] if draw.random() < 0.9 else None
            messages.append(result)
        if draw.random() < 0.3:
            messages += [{"role": "user", "content": text()} for _ in range(draw.randint(1, 2))]
    if messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": text()})
    return Transcript(
        f"t{number}",
        messages,
        TOOLS,
        "harmful",
        message_labels=labels,
        injection_spans=tuple(spans),
        meta={"kind": "x"},
    )


def injected(transcript):
    return [transcript.messages[s.message]["content"][s.start : s.end] for s in transcript.injection_spans]


def said(transcript):
    return sorted(str(c["function"]) for m in transcript.messages for c in m.get("tool_calls") or ())


@pytest.mark.parametrize("names", [*ADAPTATIONS, ",".join(ADAPTATIONS)])
def test_the_reverse_gives_the_transcript_back_and_spans_and_calls_follow(names):
    changed = 0
    for seed in range(300):
        before = conversation(seed)
        kept, after = replace(before, messages=[dict(m) for m in before.messages]), adapt(before, names)
        assert restore(after) == before == kept, seed  # nothing is changed in place
        assert restore(adapt(after, "hermes")) == before and adapt(after, names) == after
        assert sorted(injected(after)) == sorted(injected(before)) and said(after) == said(before), seed
        assert [m["content"] for m in after.messages if m["role"] == "tool" and m["content"]] or not any(
            m["role"] == "tool" for m in before.messages
        )
        changed += after is not before
    assert changed > 20


def test_each_does_what_its_name_says():
    for seed in range(200):
        t = conversation(seed)
        done = {name: adapt(t, name).messages for name in ADAPTATIONS}
        assert all(len(m.get("tool_calls") or ()) < 2 for m in done["split_calls"])
        assert not any(m.get("tool_calls") and m["content"] for m in done["split_text"])
        for messages in (done["bridge_answers"], done["join_users"]):
            role = "assistant" if messages is done["bridge_answers"] else "user"
            assert not any(a["role"] == b["role"] == role for a, b in zip(messages, messages[1:]))
        ids = [c["id"] for m in done["shorten_ids"] for c in m.get("tool_calls") or ()]
        assert all(len(i) == 9 and i.isalnum() for i in ids)
        waiting, answered = [], []
        for m in done["shorten_ids"]:
            if m["role"] == "assistant":
                waiting = [c["id"] for c in m.get("tool_calls") or ()]
            # each result has a call that has no other
            if m["role"] == "tool":
                answered.append(waiting.remove(m["tool_call_id"]))
        assert (
            all(
                m["content"].strip() or m.get("tool_calls")
                for m in done["drop_empty"]
                if m["role"] == "assistant"
            )
            or len(done["drop_empty"]) == 1
        )
        assert (
            done["move_system"] is t.messages is done["hermes"] or adapt(t, "hermes").messages == t.messages
        )


def test_a_call_made_beside_an_injected_result_stays_before_it():
    "Else a policy that starts at the injection would take it for an answer to it."
    for seed in range(400):
        t = conversation(seed)
        after = adapt(t, "split_calls,split_text")
        first = min((s.message for s in t.injection_spans), default=None)
        if first is None:
            continue
        start = min(s.message for s in after.injection_spans)

        def calls(messages):
            return sorted(str(c["function"]) for m in messages for c in m.get("tool_calls") or ())

        assert calls(t.messages[:first]) == calls(after.messages[:start]), seed


def test_labels_go_to_every_part():
    for seed in range(200):
        t = conversation(seed)
        after = adapt(t, "split_calls,split_text")
        count = {
            label: sum(
                len(m.get("tool_calls") or ())
                for i, m in enumerate(x.messages)
                if x.message_labels.get(i) == label
            )
            for x in (t, after)
            for label in ("benign", "harmful", "none")
        }
        for label in ("benign", "harmful", "none"):
            assert count[label] == sum(
                len(m.get("tool_calls") or ())
                for i, m in enumerate(t.messages)
                if t.message_labels.get(i) == label
            )


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates_train_what_the_assistant_wrote(name):
    names, some = STOCK[name][2], [replace(conversation(seed, seed), message_labels={}) for seed in range(24)]
    plain, masker = stock_masker(name), stock_masker(name, names)
    before = plain.encode_batch(some, errors="return")
    # this is what the adaptations are for
    assert sum(isinstance(e, MaskError) for e in before) > (8 if name == "Llama 3.1" else 15)
    for t, e in zip(some, masker.encode_batch([adapt(t, names) for t in some])):
        assert trained(name, e) == spelled(name, t.messages), t.id
        assert not (e.lost_calls or e.lost_words), t.id
        assert CONTINUE not in "".join(e.text[a:b] for a, b in e.offsets[loss_mask(e)])
        for _span, text in zip(e.injection_spans, injected(adapt(t, names))):
            if name == "Gemma 3":
                assert text.strip() in e.text  # the others write results as JSON


@pytest.mark.parametrize("name", STOCK)
def test_questions_are_written_as_they_are_trained(name):
    names = STOCK[name][2]
    masker, asked = stock_masker(name, names), 0
    for seed in range(16):
        t = adapt(conversation(seed), names)
        text = masker.encode(t.messages, t.tools).text
        for i, m in enumerate(t.messages):
            if m["role"] != "assistant" or t.messages[i - 1]["role"] not in ("user", "tool"):
                continue
            # its template writes the tools before the last of them
            if name == "Mistral" and any(m["role"] == "user" for m in t.messages[i:]):
                continue
            prompt = masker.prompt(t.messages[:i], t.tools).rstrip()
            assert text.startswith(prompt), (seed, i)
            asked += 1
    assert asked > 2


def test_the_system_prompt_of_a_template_without_that_role_keeps_its_segment():
    from outside import qwen3

    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    with pytest.raises(MaskError, match="no system role"):
        ChatMasker(qwen3(), SWITCH).encode(messages)
    encoding = ChatMasker(qwen3(), SWITCH, adapt="move_system").encode(messages)
    assert encoding.text == "<|im_start|>user\nBe kind.\n\nHi<|im_end|><|im_start|>assistant\nHo<|im_end|>"
    system = "".join(encoding.text[a:b] for a, b in encoding.offsets[encoding.segments == Segment.SYSTEM])
    assert system.strip() == "Be kind." and adapted_counts(
        [adapt(Transcript("t", messages), "move_system")]
    ) == {"move_system": {"transcripts": 1, "changes": 1}}
    assert (
        ChatMasker(qwen3(), SWITCH, adapt="move_system").prompt(messages[:2])
        == "<|im_start|>user\nBe kind.\n\nHi<|im_end|><|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", STOCK)
def test_what_a_template_needs_is_found(name):
    some = [conversation(seed, seed) for seed in range(8)]
    found = propose(some, lambda names: stock_masker(name, names))
    assert found["read"] == found["of"] == 8 and {*found["names"]} <= {
        *adapt_names(STOCK[name][2]),
        "join_users",
    }
    assert propose(
        [Transcript("t", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])],
        lambda names: stock_masker(name, names),
    ) == {"names": (), "read": 0, "of": 1}


def test_a_run_reads_its_data_adapted_and_says_so(tmp_path):
    from cbnb.data.sources import check_reading, reading_of
    from cbnb.data.streams import read_streams
    from cbnb.masking.adapt import adapted_line
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.record import TranscriptError

    some = [replace(conversation(seed, seed), meta={}) for seed in range(12)]
    write_transcripts(tmp_path / "runs.jsonl", some)
    reading = reading_of({"adapt": "split_calls,split_text"})
    harmful, benign = read_streams([tmp_path / "runs.jsonl"], reading)
    assert not benign and [restore(t).messages for t in harmful] == [
        restore(t).messages for t in read_streams([tmp_path / "runs.jsonl"])[0]
    ]
    assert not any(m.get("tool_calls") and m["content"] for t in harmful for m in t.messages)
    assert f"adapted: {adapted_line(harmful)}" in reading.lines() and reading.record()["adapted"][0][
        "counts"
    ] == adapted_counts(harmful)
    with pytest.raises(TranscriptError, match="did you mean 'split_text'"):
        check_reading({"adapt": "split_texts"})


def test_the_audit_adapts_as_its_masker_does_and_says_so():
    from cbnb.masking.audit import audit

    some = [conversation(seed, seed) for seed in range(6)]
    found = list(audit(some, stock_masker("Llama 3.1", "split_calls,split_text")))
    assert not any(f.kind == "no_mask" for a in found for f in a.findings)
    assert any(
        f.kind == "adapted" and "split_calls in 1 of 1 transcript" in f.text
        for a in found
        for f in a.findings
    )


def test_names_that_are_unknown_are_refused():
    with pytest.raises(MaskError, match="did you mean 'split_calls'"):
        adapt_names("split_call")
    with pytest.raises(MaskError, match="did you mean 'hermes'"):
        stock_masker("Gemma 3", "hermess")
    assert (
        adapt_names("hermes, short_ids".replace("short_", "shorten_")) == ("shorten_ids", "hermes")
        and CHANGES.keys() == ADAPTATIONS.keys()
    )
