"""Families of models as they are: each of tests/families.py, tiny and random, through load, reach, step,
save, plain peft and generation, or refused in one sentence.

Run this file as a program for the table of them all, which stands in nbs/step/07_model_checks.ipynb."""

import json
from functools import cache

import pytest
import torch
from peft import PeftModel

from cbnb.config import SAVINGS, ConfigError, get_config
from cbnb.data.streams import collate
from cbnb.step.loaders import read_model
from cbnb.step.model_checks import check_packing
from cbnb.step.models import add_adapter, load_model, reach, reach_shares, save_adapter
from cbnb.train.breaker import CircuitBreaker
from cbnb.train.floor import on_device
from cbnb.train.teacher_cache import cache_bytes, open_cache, state_wants, teacher_states, token_bytes
from families import DENSE, FAMILIES, FUSED, tiny_model
from helpers import NBS
from test_step import moved, pairs

REFUSED = {"BERT": "no list of 4 blocks can be found"}
MIXES = {
    "Qwen3-Next",
    "Qwen 3.5",
    "Qwen 3.5 MoE",
    "LFM 2",
    "Granite hybrid",
    "Nemotron-H",
    "Falcon-H1",
    "Falcon Mamba",
    "Bamba",
    "Kimi-Linear",
    "MiniMax",
    "OLMo hybrid",
    "RecurrentGemma",
    "gpt-oss",
    "DeepSeek V4",
}  # the last two by their attention


def settings(name, **more):
    names = FAMILIES[name][2]
    # its hidden_states are not its blocks' outputs, and that is refused
    if name == "Falcon Mamba":
        more |= {"hidden_state_mode": "hooks"}
    return get_config(
        "tinyagent",
        **dict(target_layers=(2,), lora_layers=(1, 3), lora_dropout=0.0, gradient_checkpointing=True)
        | ({"lora_modules": names} if names else {})
        | more,
    )


def terms_and_gradient(student, savings, **more):
    config = settings(student.name, savings=savings, **more)
    breaker = CircuitBreaker(student, config).train()
    batch = on_device(collate(pairs(((12, 25), (30, 9))), 0), student.device)
    terms = breaker(batch["harmful"], batch["benign"], batch["counts"])
    trained = [p for p in student.parameters() if p.requires_grad]
    total = terms["loss_reroute"] + 0.1 * terms["loss_retain"] + 3 * terms["loss_kl"]
    return terms, torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


def row(name, shares=None, refused=""):
    """The line of a family in the table: what LoRA reached, kind by kind, or why it is refused, and whether
    rows can be packed."""
    kind, _, names = FAMILIES[name]
    said = " ".join(str(refused).split()) or ", ".join(
        f"{k} {share:.0%}" for k, share in shares.items() if k not in ("all", "other")
    )
    packed = "" if refused else "no" if name in MIXES else "yes"
    return f"| {name} | {kind} | {(names or 'the usual seven').replace(',', ', ')} | {said} | {packed} |"


@cache
def documented():
    "The lines of the table in the documentation."
    cells = json.loads((NBS / "step" / "07_model_checks.ipynb").read_text())["cells"]
    return [
        line.strip()
        for cell in cells
        if "## Families" in cell["source"][0]
        for line in cell["source"]
        if line.startswith("| ")
    ]


def test_the_table_has_every_family():
    assert [line.split(" | ")[0].lstrip("| ") for line in documented()] == ["family", *FAMILIES]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "model")
    config = settings(name)
    model = load_model(str(tmp_path / "model"))
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]) as e:
            add_adapter(model, config)
        assert row(name, refused=e.value) in documented()
        return
    student = moved(add_adapter(model, config))
    student.name = name
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    records = reach(student, config)
    assert {r["block"] for r in records if r["reached"]} <= {1, 2, 3} and 0 < reach_shares(records)[
        "all"
    ] <= 1
    assert row(name, reach_shares(records)) in documented()
    (plain, wanted), (fast, got) = (
        terms_and_gradient(student, savings) for savings in ("none", ",".join(SAVINGS))
    )
    assert (
        all(term.isfinite() for term in plain.values())
        and plain["loss_kl"] > 1e-6
        and plain["loss_reroute"] < 0.9999
    )
    for term in plain:
        assert torch.isclose(plain[term], fast[term], rtol=1e-3), (term, plain[term], fast[term])
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()

    student.eval()
    save_adapter(student, tmp_path / "adapter")
    base = read_model(str(tmp_path / "model")).eval().to(student.device)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = (torch.arange(9, device=student.device)[None] * 5 + 3) % 90
    with torch.no_grad():
        ours, theirs = (
            student(input_ids=ids, use_cache=False).logits,
            loaded(input_ids=ids, use_cache=False).logits,
        )
        with student.disable_adapter():
            untouched = student(input_ids=ids, use_cache=False).logits
        assert torch.equal(ours, theirs) and not torch.allclose(ours, untouched, atol=1e-4)
        made = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
        )
        assert made.shape[1] == 11
        assert torch.allclose(
            loaded.merge_and_unload()(input_ids=ids, use_cache=False).logits, ours, atol=1e-3
        )
    if name in MIXES:
        with pytest.raises(ConfigError, match="cannot be packed"):
            check_packing(student)
    else:
        check_packing(student)


@pytest.mark.parametrize(
    "name, names, said",
    [
        (
            "Qwen 3 MoE",
            None,
            "'gate_proj', 'up_proj', 'down_proj', which this model has not; the linears of its blocks are "
            "k_proj, o_proj, q_proj, v_proj, and its fused experts'",
        ),
        ("Phi 3", None, "'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj', which this model has not"),
        ("gpt-oss", f"q_proj,{FUSED}", "without dropout: give lora_dropout 0"),
        ("GLM 4.5", f"q_proj,{DENSE}", "without dropout: give lora_dropout 0"),
        ("Llama", "q_proj,lm_head", "'lm_head', which is no linear of a decoder block"),
        ("Qwen3-Next", "q_proj", "target_layers 2 stands before block 3"),
    ],
)
def test_names_that_do_not_fit_are_one_sentence(name, names, said):
    with pytest.raises(ConfigError) as e:
        add_adapter(
            tiny_model(name),
            settings(
                name,
                lora_modules=names or "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                lora_dropout=0.05,
            ),
        )
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_name_of_other_blocks_only():
    with pytest.raises(ConfigError, match="which only blocks 3 have, and lora_layers is 0,2"):
        add_adapter(
            tiny_model("Qwen3-Next"),
            settings("Qwen3-Next", lora_modules="in_proj_qkvz,q_proj", lora_layers=(0, 2)),
        )


def test_a_multimodal_model_is_adapted_in_its_text_part():
    student = add_adapter(tiny_model("Gemma 3 (multimodal)"), settings("Gemma 3 (multimodal)"))
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    assert len(names) == 3 * 7 * 2 and not any("vision" in n for n in names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ("Llama", "Gemma 3n", "DeepSeek V4"))
def test_the_teachers_states_of_several_streams_are_cached(name, tmp_path, capsys):
    config = settings(name)
    student = add_adapter(tiny_model(name), config)
    (harmful, benign), pad_id = map(list, zip(*pairs(((12, 25), (30, 9))))), 0
    cache = open_cache(tmp_path, student, harmful, benign, config, pad_id)
    kept = sum(p.stat().st_size for p in cache.folder.glob("*.safetensors"))
    size = cache_bytes(state_wants(harmful, benign), *token_bytes(student, None, benign, config, pad_id))
    assert 0 <= kept - size < 5000
    hidden, last = teacher_states(student, None, [benign[1]], config, pad_id, True)
    found = cache.states([benign[1]])
    for mine, theirs in (
        (found["last"], last),
        *((found["hidden"][layer], hidden[layer]) for layer in hidden),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert (
        "found in"
        in (open_cache(tmp_path, student, harmful, benign, config, pad_id), capsys.readouterr().out)[1]
    )


def main():
    print(
        "| family | model type | lora_modules | reached, of each kind of weight | rows packed "
        "|\n|---|---|---|---|---|"
    )
    for name in FAMILIES:
        try:
            print(
                row(name, reach_shares(reach(add_adapter(tiny_model(name), settings(name)), settings(name))))
            )
        except ConfigError as e:
            print(row(name, refused=e))


if __name__ == "__main__":
    main()
