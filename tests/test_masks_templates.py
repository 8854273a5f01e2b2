"""Every chat template of trl and axolotl: located, refused by the template itself, or refused by us with a
clear error; never silently wrong. The oracles are in masks_templates.py and share no code with
`cbnb.masking.masker`."""

import re

import pytest

from masks_templates import FAMILIES, KINDS, header, outcomes, plain, results, sources, tagged, verdicts


@pytest.mark.slow
def test_these_are_the_77_stock_templates_of_trl_and_axolotl():
    names = {family: [name for of, name in sources() if of == family] for family in FAMILIES}
    assert {family: len(n) for family, n in names.items()} == {"trl": 41, "axolotl": 36, "trl training": 31}
    assert len(results()) == (41 + 36 + 31) * len(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_located_turn_is_proven(family):
    "An unproven or wrong turn raises inside `verdicts`; most are equal to transformers' own renders."
    found = [how for (of, *_), how in verdicts().items() if of == family]
    equal = found.count("equal")
    assert equal > 350 and equal > len(found) / 2, (equal, len(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_are_the_templates_own_or_clear(family):
    for name, (located, itself, us) in outcomes(family).items():
        assert len(located) + len(itself) + len(us) == len(KINDS)
        for kind, error in us.items():
            assert re.search(r"message \d+ \(assistant\): .+; pass another chat_template$", error), (
                name,
                kind,
                error,
            )
        # transformers gets the same refusal
        for kind in itself:
            assert plain(sources()[family, name], KINDS[kind]) is None
    clear = {name for name, (_, _, us) in outcomes(family).items() if us}
    assert len(clear) <= {"trl": 6, "axolotl": 5, "trl training": 1}[family], clear
    assert any(located for located, _, _ in outcomes(family).values())


def test_trls_generation_tags_train_nothing_that_we_leave_out_but_headers_and_blanks():
    """Their tags are held against our mask token by token. What they train beyond it: blanks after the end of
    a turn, (parts of) the header, the EOS that stands once after the last turn, and DeepSeek's end of the
    tool results."""
    compared = tagged()
    assert len(compared) > 250
    for (family, name, kind), pieces in compared.items():
        head = header(sources()[family, name]) or ""
        for piece in pieces:
            known = (
                piece.strip() in ("", "<|eos|>")
                or piece.strip() in head
                or (name, piece)
                in {
                    ("deepseek_r1_distill_training", "<｜tool▁outputs▁end｜>"),
                    ("deepseekv3_training", "<｜tool▁outputs▁end｜>"),
                    ("deepseek_r1_distill_training", "<｜Assistant｜>"),
                    ("deepseekv3_training", "<｜Assistant｜>"),
                }
            )
            assert known, (name, kind, piece, head)
