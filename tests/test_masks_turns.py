"""Ends of turn of several tokens, and templates that want tools or a certain order of roles before they can
be asked anything. The oracle is the text as the template's author wrote it, spelled out by hand."""

import numpy as np
import pytest

from cbnb.masking.audit import audit, mask_findings, trained_ends
from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.masking.policies import end_tokens
from cbnb.masking.templates import MaskError
from cbnb.preflight.data_checks import Placement, survey, template_findings
from cbnb.transcripts.record import Transcript
from masks_common import TOOLS, answer, ask, say
from outside import llama3, qwen3

CHAT = [say("user", "Hi"), say("assistant", "Ho ho"), say("user", "And?"), say("assistant", "Hu")]
CALLS = [
    say("user", "Read."),
    say("assistant", "", tool_calls=[ask("read_mail", id=8)]),
    answer("Noon."),
    say("assistant", "It is noon."),
]


def tokenizer_with(*special):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(qwen3().backend_tokenizer.to_str())
    core.add_special_tokens([*special, "<|role|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1])


def template(end):
    "A template with `end` after what the assistant says, and calls as JSON."
    return (
        "{% for m in messages %}{{ '<|role|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] "
        "%}"
        '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) + '
        "'}' }}{% endfor %}"
        "{% if m.role == 'assistant' %}" + end + "{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|role|>assistant\\n' }}{% endif %}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "end, special",
    [
        ("<|eot|><|endofturn|>", ("<|eot|>", "<|endofturn|>")),
        ("</s>\n<|end|>", ("</s>", "<|end|>")),
        ("<|end|><|end|>", ("<|end|>",)),
        ("\n###END OF MY TURN", ("<|eos|>",)),
        ("[END] <|eos|>", ("[END]", "<|eos|>")),
    ],
)
@pytest.mark.parametrize("messages", [CHAT, CALLS])
def test_an_end_of_turn_of_several_tokens_is_trained_whole(end, special, messages):
    tokenizer = tokenizer_with(*special)
    masker = ChatMasker(
        tokenizer,
        template(end)
        .replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' %}{{ E }}", 1)
        .replace("{{ E }}" + end, "{{ " + repr(end) + " }}"),
    )
    encoding = masker.encode(messages, TOOLS)
    mask, spans = loss_mask(encoding), end_tokens(encoding)
    assert [message for message, _, _ in spans] == [
        i for i, m in enumerate(messages) if m["role"] == "assistant"
    ]
    for turn, (_, start, stop) in zip(encoding.turns, spans, strict=True):
        assert encoding.text[turn.eot : turn.end] == end.strip() and stop - start > 1
        assert {encoding.segments[i] for i in range(start, stop)} == {9} and mask[start:stop].all()
        assert tokenizer.decode(encoding.input_ids[start:stop]).strip() == end.strip()
    text = "".join(
        encoding.text[a:b] for a, b in encoding.offsets[mask & (encoding.message_index == len(messages) - 1)]
    )
    assert text == messages[-1]["content"] + end
    assert not any("end-of-turn" in w for w in encoding.warnings)
    # whole: one token of it left out, by a policy or by truncation, fails the audit
    transcript = Transcript("x", messages, TOOLS)
    assert not [f for f in mask_findings(encoding, mask, transcript) if f.kind == "eot_untrained"]
    for left_out in range(*spans[-1][1:]):
        partly = mask & (np.arange(len(mask)) != left_out)
        (finding,) = [f for f in mask_findings(encoding, partly, transcript) if f.kind == "eot_untrained"]
        assert finding.messages == (len(messages) - 1,) and not trained_ends(encoding, partly)[-1][3]
    (entry,) = audit([transcript], masker, max_length=spans[-1][2] - 1, side="right")
    assert "eot_untrained" in [f.kind for f in entry.findings]


@pytest.mark.slow
def test_preflight_names_the_whole_end_of_turn():
    tokenizer = tokenizer_with("<|eot|>", "<|endofturn|>")
    encoding = ChatMasker(tokenizer, template("<|eot|><|endofturn|>")).encode(CHAT)
    mask = loss_mask(encoding)
    laid = [Placement(Transcript("x", CHAT), encoding, mask, mask, ())]
    for stops, verdict in (({tokenizer.eos_token_id}, "pass"), ({0}, "fail")):
        point = template_findings("benign", [], survey(laid), tokenizer, stops)[-1]
        assert point.verdict == verdict and "turns end with <|eot|><|endofturn|>" in point.text


@pytest.mark.slow
def test_a_closing_tag_before_the_end_is_no_part_of_it():
    tokenizer = tokenizer_with("</say>", "<say>", "<|endofturn|>")
    source = template("</say><|endofturn|>").replace(
        "m.role + '\\n' + m.content",
        "m.role + '\\n' + ('<say>' if m.role == 'assistant' else '') + m.content",
    )
    encoding = ChatMasker(tokenizer, source).encode(CHAT)
    assert {encoding.text[t.eot : t.end] for t in encoding.turns} == {"<|endofturn|>"}


@pytest.mark.slow
def test_eos_after_the_last_turn_only_stays_beside_its_end():
    tokenizer = tokenizer_with("<|eot|>", "<|eos|>")
    encoding = ChatMasker(tokenizer, template("<|eot|>{% if loop.last %}<|eos|>{% endif %}")).encode(CHAT)
    assert [encoding.text[t.eot : t.end] for t in encoding.turns] == ["<|eot|>", "<|eot|><|eos|>"]
    assert loss_mask(encoding)[encoding.segments == 9].all()


NEEDS = {
    "tools": "{% if not tools %}{{ raise_exception('tools, please') }}{% endif %}",
    "a system prompt": "{% if messages[0].role != 'system' %}{{ raise_exception('a system prompt first') "
    "}}{% endif %}",
    "a system prompt and "
    "tools": "{% if not tools or messages[0].role != 'system' %}{{ raise_exception('both, please') }}{% "
    "endif %}",
    "users and assistants in "
    "turn": "{% set ns = namespace(last='assistant') %}{% for m in messages if m.role in ('user', "
    "'assistant') and not m.tool_calls %}"
    "{% if m.role == ns.last %}{{ raise_exception('in turn, please') }}{% endif %}{% set ns.last = m.role "
    "%}{% endfor %}",
    "ids of calls": "{% for m in messages if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ "
    "raise_exception('an id of 9') }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", NEEDS)
def test_templates_are_asked_with_what_they_need(name):
    masker = ChatMasker(llama3(), NEEDS[name] + template("<|eot_id|>"))
    messages = ([say("system", "Be kind.")] if "system" in name else []) + CALLS
    encoding = masker.encode(messages, TOOLS)
    mask = loss_mask(encoding)
    assert "".join(encoding.text[a:b] for a, b in encoding.offsets[mask]) == (
        '{"name": "read_mail", "arguments": {"id": 8}}<|eot_id|>It is noon.<|eot_id|>'
    )
    # by its loop, not by a fallback
    assert (
        masker._headers[masker.template_source(TOOLS)][0][0] == "<|role|>assistant\n"
        and encoding.turns[0].rule == 4
    )


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_template_quotes_is_found_also_where_it_needs_more(name):
    source = NEEDS[name] + template("<|eot_id|>").replace(
        "+ m.content",
        "+ (messages[loop.index0 - 1].content[:4] if m.role == 'assistant' else '') + m.content",
    )
    with pytest.raises(MaskError, match="words of others"):
        ChatMasker(llama3(), source).encode([say("system", "x")] * ("system" in name) + CALLS, TOOLS)
