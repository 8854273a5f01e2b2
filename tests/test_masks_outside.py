"""Masks under real tokenizers and stock templates, against oracles that share no code with
`cbnb.masking.masker`: the official encoders and independent renderers of `masks_table.py`, completions
spelled out by hand for each template, and transformers' own prefix renders."""

import random

import numpy as np
import pytest

from cbnb.masking.masker import loss_mask
from cbnb.masking.turns import Segment
from masks_common import SETUPS, TOOLS, check, masker_for, transcript
from masks_table import COMPARISONS, EACH, FILE, SEEDS, in_words, table
from outside import LLAMA3_SPECIAL, gpt_oss, harmony, importable, llama3, llama4, meta_llama4


@pytest.mark.parametrize("encoder", COMPARISONS)
def test_ids_and_masks_equal(encoder):
    """At least 200 random transcripts from several seeds; an unexplained difference raises inside. Some
    encoders must agree in everything."""
    row = COMPARISONS[encoder]()
    assert row.transcripts == len(SEEDS) * EACH >= 200
    assert row.masks + row.explained.total() == row.transcripts
    if encoder in ("llama3", "llama4", "gpt-oss", "qwen3", "llama3.1"):
        assert row.ids == row.masks == row.transcripts
    if encoder in ("tekken", "spm"):
        assert row.masks > 0.85 * row.transcripts and row.explained.total() > 5
    if encoder in ("qwen3-tags", "gemma3"):
        assert row.ids == row.transcripts


@pytest.mark.slow
def test_the_table_in_the_notebook_is_what_these_tests_make():
    assert FILE.read_text(encoding="utf-8") == table(), "run: python tests/masks_table.py --write"


@pytest.mark.parametrize("seed", SEEDS)
def test_gemma3_completions_spelled_out(seed):
    rng = random.Random(f"gemma {seed}")
    for _ in range(10):
        check("gemma3", *in_words(transcript(rng), TOOLS if rng.random() < 0.5 else None))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SETUPS)
def test_random_transcripts_against_spelled_out_completions(name, seed):
    rng = random.Random(f"{name} {seed}")
    qwen = name.startswith("qwen")
    for _ in range(25):
        messages = transcript(
            rng,
            parallel=not name.startswith("llama"),
            thinking=name.startswith("qwen3"),
            text_beside_call=qwen,
        )
        encoding = check(
            name,
            messages,
            TOOLS if rng.random() < 0.5 else None,
            warnings=["drops its reasoning"] if qwen else (),
        )
        for i, m in enumerate(messages):  # tool, user and system text is found, and none of it is trained
            if m["role"] not in ("tool", "user", "system"):
                continue
            segment = {"tool": Segment.TOOL_RESULT, "user": Segment.USER, "system": Segment.SYSTEM}[m["role"]]
            at = (encoding.message_index == i) & (encoding.segments == segment)
            assert at.any(), (i, m)


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5"])
def test_masks_agree_with_prefix_renders_of_transformers(name):
    """If a template only appends, message i's completion lies between the renders before it (with generation
    prompt) and up to it."""
    masker, _ = masker_for(name)
    rng = random.Random(name)

    def plain(messages, prompt):
        return masker.tokenizer.apply_chat_template(
            messages, chat_template=masker.chat_template, tokenize=False, add_generation_prompt=prompt
        )

    for _ in range(15):
        messages = transcript(rng, parallel=False)
        encoding = masker.encode(messages)
        inside = np.zeros(len(encoding.text), bool)
        for i, m in enumerate(messages):
            if m["role"] != "assistant":
                continue
            start, upto = len(plain(messages[:i], True)), plain(messages[: i + 1], False)
            inside[start : len(upto.rstrip())] = True
        for (start, end), trains in zip(encoding.offsets, loss_mask(encoding)):
            assert inside[start:end].all() == trains == inside[start:end].any()


def test_converted_tokenizers_are_the_official_ones():
    importable("llama")
    from llama_models.llama3.tokenizer import Tokenizer

    for ours, theirs in (
        (llama3(), Tokenizer.get_instance().special_tokens),
        (llama4(), meta_llama4().tokenizer.special_tokens),
    ):
        assert {t: ours.convert_tokens_to_ids(t) for t in theirs} == theirs
    assert set(LLAMA3_SPECIAL) == set(Tokenizer.get_instance().special_tokens)
    named = [t for t in harmony().special_tokens_set if "reserved" not in t]
    assert len(named) > 8
    for token in named:
        assert harmony().encode(token, allowed_special="all") == [gpt_oss().convert_tokens_to_ids(token)]
