"""An adapter is what it says: off, the model is the plain one; on, it is another; no larger than what it
changes. Asked of numbers, for every kind that peft makes."""

import json
import warnings
from dataclasses import dataclass, field
from functools import cache

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cbnb.config import ConfigError, get_config
from cbnb.data.streams import collate, encode_stream
from cbnb.evaluate.divergence import load_students, real_rows
from cbnb.masking.masker import ChatMasker
from cbnb.preflight.step_checks import check_run_start, plain_logits, some_pairs
from cbnb.step.heads import find_head
from cbnb.step.models import add_adapter, forward_with_hidden_states, load_model, load_tokenizer
from cbnb.step.passes import both_passes
from cbnb.train.floor import on_device
from cbnb.transcripts.tinyworld import make_transcripts
from forked import command
from train_common import load

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = ["q_proj", "down_proj"]


def base_model(kind="tinyagent"):
    "The tiny agent, or a Llama of its shape with biases, or with its two embeddings tied."
    if kind == "tinyagent":
        return load_model("tinyagent", device="cpu")
    torch.manual_seed(1)
    shape = LlamaConfig.from_pretrained(load_model("tinyagent", device="cpu").config._name_or_path)
    shape.attention_bias, shape.tie_word_embeddings = kind == "biases", kind == "tied"
    return LlamaForCausalLM(shape).eval().requires_grad_(False)


@cache
def rows():
    masker = ChatMasker(load_tokenizer("tinyagent"))
    return real_rows(masker, [*make_transcripts("injection", 1), *make_transcripts("plain", 1)])


CAUSAL = {"task_type": "CAUSAL_LM"}


def lora(**more):
    return peft.LoraConfig(**CAUSAL | {"r": 4, "lora_alpha": 8, "target_modules": BOTH} | more)


def prompt():
    return peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4)


@dataclass
class Case:
    """An adapter: peft's configuration on a `base`, what is `told` otherwise in its adapter_config.json, and
    what becomes of its `weights`."""

    config: object
    base: str = "tinyagent"
    told: dict = field(default_factory=dict)
    weights: object = lambda weights: weights


EMBEDDING = "base_model.model.model.embed_tokens.weight"


def with_embedding(rows):
    return lambda weights: weights | {EMBEDDING: torch.randn(rows, 128)}


def zero_b(weights):
    return {k: w * ("lora_B" not in k) for k, w in weights.items()}


def first(value):
    return lambda weights: weights | {(k := min(weights)): torch.full_like(weights[k], value)}


def scaled(by):
    return lambda weights: {k: w * by for k, w in weights.items()}


PASS = {  # what is sound by its numbers, whatever its name
    "LoRA": Case(lora()),
    "LoRA, drawn normally": Case(lora(init_lora_weights="gaussian")),
    "rank-stabilised": Case(lora(use_rslora=True)),
    "DoRA": Case(lora(use_dora=True)),
    "biases of its own": Case(lora(lora_bias=True)),
    "ranks by name": Case(lora(rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 1})),
    "two blocks": Case(lora(layers_to_transform=[1, 2], layers_pattern="layers")),
    "a norm saved with it": Case(lora(modules_to_save=["norm"])),
    "tokens trained with it": Case(lora(trainable_token_indices=[0, 2, 4])),
    "tied embeddings": Case(lora(target_modules=[*BOTH, "lm_head"]), base="tied"),
    "biases of the base left alone": Case(lora(), base="biases"),
    "bias all, and the base has none": Case(lora(bias="all")),
    "IA3": Case(
        peft.IA3Config(**CAUSAL, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "LoHa": Case(peft.LoHaConfig(**CAUSAL, r=4, target_modules=BOTH)),
    "AdaLoRA": Case(
        peft.AdaLoraConfig(
            **CAUSAL, init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, target_modules=BOTH
        )
    ),
}
FAIL = {  # what is said
    "bias all": (Case(lora(bias="all"), base="biases"), "the base's own weights"),
    "bias lora_only": (Case(lora(bias="lora_only"), base="biases"), "the base's own weights"),
    "an embedding that came with it": (
        Case(lora(), weights=with_embedding(1324)),
        "changes 1 of the base's own weights, the first is model.embed_tokens.weight",
    ),
    "an embedding of another size": (Case(lora(), weights=with_embedding(1330)), "does not fit this base"),
    "PiSSA": (Case(lora(), told={"init_lora_weights": "pissa"}), "the base's own weights"),
    "OLoRA": (Case(lora(), told={"init_lora_weights": "olora"}), "the base's own weights"),
    "CorDA": (Case(lora(), told={"init_lora_weights": "corda", "corda_config": {}}), "does not fit"),
    "LoftQ": (
        Case(lora(), told={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
        "does not fit",
    ),
    "layers copied": (
        Case(lora(layer_replication=[[0, 3], [1, 4]])),
        "off, the model's logits differ from the plain",
    ),
    "prompt tuning": (Case(prompt()), "tokens in front of what the model reads"),
    "prefix tuning": (
        Case(peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4)),
        "tokens in front of what",
    ),
    "virtual tokens without end": (
        Case(prompt(), told={"num_virtual_tokens": 10**9}),
        "tokens in front of what",
    ),
    "adaption prompt": (
        Case(peft.AdaptionPromptConfig(**CAUSAL, adapter_len=4, adapter_layers=2)),
        "does not fit",
    ),
    "rank 0": (Case(lora(), told={"r": 0}), "does not fit"),
    "alpha 0": (Case(lora(), told={"lora_alpha": 0}), "changes nothing"),
    "alpha next to 0": (Case(lora(), told={"lora_alpha": 1e-12}), "changes nothing"),
    "B of 0": (Case(lora(), weights=zero_b), "changes nothing"),
    "names that match nothing": (Case(lora(), told={"target_modules": ["c_attn"]}), "does not fit"),
    "no names": (Case(lora(), told={"target_modules": []}), "does not fit"),
    "layers elsewhere": (
        Case(lora(), told={"layers_to_transform": [1], "layers_pattern": "h"}),
        "does not fit",
    ),
    "blocks beyond": (Case(lora(), told={"layers_to_transform": [40]}), "does not fit"),
    "a rank above the matrix": (
        Case(lora(r=200)),
        "has rank 200, and no matrix of the model can have more than 128",
    ),
    "a rank without end": (Case(lora(), told={"r": 10**12}), "has rank 1,000,000,000,000"),
    "such a rank by name": (
        Case(lora(), told={"rank_pattern": {"q_proj": 10**12}}),
        "has rank 1,000,000,000,000",
    ),
    "more numbers than the model": (
        Case(lora(), weights=lambda w: w | {"x": torch.zeros(3_000_000)}),
        "the whole model",
    ),
    "NaN": (Case(lora(), weights=first(float("nan"))), "NaN or infinite weights"),
    "infinite": (Case(lora(), weights=first(float("inf"))), "NaN or infinite weights"),
    "weights of 1e30": (Case(lora(), weights=scaled(1e30)), "not finite"),
    "half of its weights": (Case(lora(), weights=lambda w: dict(list(w.items())[::2])), "missing"),
    "weights left over": (Case(lora(), told={"layers_to_transform": [0, 1]}), "left over"),
}


def saved(case, folder):
    "The adapter of `case` as peft saves it, moved by noise, in `folder`."
    torch.manual_seed(0)
    student = get_peft_model(base_model(case.base), case.config)
    with torch.no_grad():
        for _name, p in student.named_parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.05)
    student.save_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps(load(folder / "adapter_config.json") | case.told))
    weights = case.weights(load_file(folder / "adapter_model.safetensors"))
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", PASS)
def test_an_adapter_that_is_sound_by_its_numbers(tmp_path, name):
    """Off it is the base, bit for bit; on it is what plain peft makes of it, also where blocks below it are
    run once for both."""
    case, config = PASS[name], get_config("tinyagent", savings="shared_prefix")
    folder, plain = saved(case, tmp_path), plain_logits(base_model(case.base), rows())
    students = load_students(base_model(case.base), {"A": folder}, rows())
    mask = rows()["attention_mask"].bool()
    with torch.no_grad():
        (_, shared), _ = both_passes(students, None, rows(), config, find_head(students).norm, final=True)
        _, whole = forward_with_hidden_states(
            students, rows()["input_ids"], rows()["attention_mask"], (), "hooks"
        )
    assert torch.allclose(shared[mask], whole[mask], atol=1e-4)
    with students.disable_adapter():
        assert torch.equal(plain_logits(students, rows())[mask], plain[mask])
    theirs = peft.PeftModel.from_pretrained(base_model(case.base), folder).eval()
    ours = plain_logits(students, rows())
    assert torch.equal(ours, plain_logits(theirs, rows())) and not torch.equal(ours[mask], plain[mask])


@pytest.mark.parametrize("name", FAIL)
def test_an_adapter_that_is_not_what_it_says(tmp_path, name):
    case, words = FAIL[name]
    folder = saved(case, tmp_path)
    with pytest.raises(ValueError) as e:
        load_students(base_model(case.base), {"A": folder}, rows())
    assert words in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value), e.value


def test_a_base_at_another_path_is_no_warning_of_peft(tmp_path):
    """An adapter names the folder of the model that it was made on, and a checkout may be moved."""
    folder = saved(PASS["LoRA"], tmp_path)
    about = load(folder / "adapter_config.json") | {"base_model_name_or_path": "/elsewhere/tinyagent_model"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_students(base_model(), {"A": folder}, rows())


def broken_one(tmp_path):
    "The folders of a sound adapter and of one that changes nothing."
    for name in ("sound", "idle"):
        (tmp_path / name).mkdir()
    return saved(PASS["LoRA"], tmp_path / "sound"), saved(FAIL["B of 0"][0], tmp_path / "idle")


def test_the_second_adapter_is_asked_too(tmp_path):
    sound, idle = broken_one(tmp_path)
    assert list(load_students(base_model(), {"A": sound, "B": sound}, rows()).peft_config) == ["A", "B"]
    for given in (({"A": sound, "B": idle}, rows()), ({"A": idle},)):  # the latter on made-up rows
        with pytest.raises(ConfigError, match="idle changes nothing"):
            load_students(base_model(), *given)


def test_an_evaluation_and_an_explorer_ask(tmp_path):
    from cbnb.evaluate.adapters import find_adapters, load_student
    from cbnb.widgets.kl import load_explorer, open_explorer

    _, idle = broken_one(tmp_path)
    masker, (adapter,) = ChatMasker(load_tokenizer("tinyagent")), find_adapters(str(idle))
    with pytest.raises(ConfigError, match="changes nothing: with it the logits of [0-9]+ tokens"):
        load_student(adapter, [adapter], masker, make_transcripts("plain", 2), "tinyagent")
    given = {"model": "tinyagent", "data": "tinyagent"}
    with pytest.raises(ConfigError, match="changes nothing"):
        load_explorer(str(idle), **given)
    assert "changes nothing" in open_explorer(str(idle), **given).arguments["problem"]


# --- in training ---


def test_a_rank_that_no_matrix_can_have(tmp_path):
    "By the adapter, and by the plan before anything is loaded; a router may have less than the others."
    for r in (129, 10**9):
        config = get_config("tinyagent", lora_r=r, lora_modules="q_proj")
        with pytest.raises(ConfigError, match=f"lora_r {r:,} is above 128"):
            add_adapter(base_model(), config)
    add_adapter(base_model(), get_config("tinyagent", lora_r=128))
    said = command("plan", "--lora-r", 100_000, runs=tmp_path)
    assert said.returncode == 2 and "lora_r 100,000 is above 128" in said.stdout, said.stdout


@cache
def started(kind="tinyagent"):
    "`(base, a batch as a run begins with, its logits)`."
    base, masker, config = base_model(kind), ChatMasker(load_tokenizer("tinyagent")), get_config("tinyagent")
    harmful, _ = encode_stream(make_transcripts("injection", 2), masker, config.harmful_policy)
    benign, _ = encode_stream(make_transcripts("plain", 2), masker, config.benign_policy)
    batch = on_device(collate(some_pairs(harmful, benign), masker.tokenizer.pad_token_id), "cpu")
    return batch, plain_logits(base, batch["benign"])


def student_of(config, kind="tinyagent"):
    return get_peft_model(base_model(kind), config)


def merged():
    student = student_of(lora())
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    student.merge_adapter()
    return student


@pytest.mark.parametrize(
    "name, make, settings, words",
    [
        (
            "a base that was changed",
            lambda: student_of(lora(init_lora_weights="pissa")),
            {},
            "differ from the plain base",
        ),
        ("merged", merged, {}, "differ from the plain base"),
        (
            "layers copied",
            lambda: student_of(lora(layer_replication=[[0, 3], [1, 4]])),
            {},
            "differ from the plain base",
        ),
        (
            "biases of the base",
            lambda: student_of(lora(bias="all"), "biases"),
            {},
            "beside the adapter would be trained",
        ),
        (
            "a step that moves nothing",
            lambda: student_of(lora()),
            {"learning_rate": 1e-30},
            "has not moved the adapter",
        ),
        ("a scale of 0", lambda: student_of(lora(lora_alpha=0)), {}, "the adapter changes nothing"),
    ],
)
def test_a_run_does_not_begin(name, make, settings, words):
    batch, plain = started("biases" if name == "biases of the base" else "tinyagent")
    config = get_config("tinyagent", **settings)
    with pytest.raises(ConfigError, match=words):
        check_run_start(make(), config, batch, plain)


def test_a_sound_run_begins_and_nothing_is_left_behind():
    batch, plain = started()
    student = add_adapter(base_model(), config := get_config("tinyagent"))
    before, random = {name: p.clone() for name, p in student.named_parameters()}, torch.get_rng_state()
    check_run_start(student, config, batch, plain)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(random, torch.get_rng_state()) and not student.get_base_model().training
