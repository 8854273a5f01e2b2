"""The card of what opens a breaker: what is trained and what is not, what is kept, and what is refused."""

import json

import pytest
import torch

from cbnb.attacks.asking import victim_now
from cbnb.attacks.attack import training_stream
from cbnb.attacks.changes import changed_models, merge, round_base, round_nf4
from cbnb.attacks.finetune import adapter_weights, is_open, tune_curve, tune_marks, tune_settings
from cbnb.attacks.tamper import tamper_run, tamper_verdict
from cbnb.basics.jsonfiles import RunError
from cbnb.cli import main
from cbnb.config import ConfigError, get_config
from cbnb.data.streams import encode_stream
from cbnb.evaluate.adapters import find_adapter
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.report.figures import report_page, result_table, tamper_table, tamper_words
from cbnb.run.records import read_record
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.train.card import figure_text
from cbnb.transcripts.tinyworld import make_transcripts, write_data

CONFIG = get_config("tinyagent")


def noise(std=0.2, dtype="float32"):
    "The tiny agent with noise for an adapter."
    student = add_adapter(load_model("tinyagent", dtype=dtype), CONFIG).eval()
    torch.manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return student


@pytest.fixture(scope="module")
def world():
    "Masker, reader, six harmful samples, and six questions."
    masker = ChatMasker(load_tokenizer("tinyagent"))
    samples, _ = encode_stream(make_transcripts("injection", 6), masker, CONFIG.harmful_policy)
    asks = make_transcripts("injection", 4, "eval") + make_transcripts("plain", 2, "eval")
    return masker, derive_reader(masker), samples, asks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_keep_shape_dtype_signs_and_the_largest_of_a_block(dtype):
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = round_nf4(weight)
    assert rounded.shape == weight.shape and rounded.dtype == dtype
    assert ((rounded == 0) | (rounded.sign() == weight.sign())).all()
    block = weight.flatten()[:64].abs()
    assert rounded.flatten()[block.argmax()] == weight.flatten()[block.argmax()]


def test_the_output_layer_and_the_adapter_are_not_rounded():
    student, whole = noise(), dict(noise().named_parameters())
    round_base(student)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, whole[name])}
    assert all(name.endswith("base_layer.weight") for name in moved) and moved


def test_weights_that_are_no_floats_are_refused():
    student = noise()
    linear = next(m for m in student.modules() if type(m) is torch.nn.Linear and m.out_features > 8)
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="few bits already"):
        round_base(student)


def test_a_merge_in_float32_is_the_adapter_again():
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = noise()(input_ids=ids).logits
        assert torch.allclose(merge(noise())(input_ids=ids).logits, wanted, atol=1e-3)
        students = changed_models("merged, then bf16", lambda dtype: noise(dtype=dtype or "float32"))
        models = {who: model for who, model in students}
    assert {p.dtype for p in models["breaker"].parameters()} == {torch.bfloat16}
    assert not any("lora_" in name for name, _ in models["breaker"].named_parameters())


def test_weights_that_are_not_finite_are_not_merged():
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge(noise(std=float("inf")))


def curve(world, steps, folder, rate=0.002, samples=None):
    masker, reader, own, asks = world
    victim = victim_now("breaker", noise(), masker, reader, Decoding(max_new_tokens=24), folder)
    settings = tune_settings(CONFIG, rate=rate)
    return tune_curve(victim, samples or own, asks, tune_marks(steps), settings, "x"), victim.model


def test_only_the_adapter_is_trained_and_points_are_found_again(world, tmp_path):
    points, model = curve(world, 2, tmp_path)
    before = dict(noise().named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(adapter_weights(model))
    lines = (tmp_path / "points.jsonl").read_bytes()
    assert curve(world, 2, tmp_path)[0] == points and (tmp_path / "points.jsonl").read_bytes() == lines
    others, _ = curve(world, 2, tmp_path, rate=0.001)
    assert others[2]["loss"] != points[2]["loss"] and others[1]["loss"] == points[1]["loss"]


def test_weights_that_were_damaged_are_named_and_not_trained_on(world, tmp_path):
    curve(world, 1, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(b"half")
    with pytest.raises(RunError, match=path.name):
        curve(world, 2, tmp_path)


def test_a_point_that_was_edited_is_named(world, tmp_path):
    (tmp_path / "points.jsonl").write_text('{"key": "k", "stage": "x", "step": 1, "counts": {}}\n')
    with pytest.raises(RunError, match="points.jsonl line 1 is not in order"):
        curve(world, 1, tmp_path)


def test_a_learning_rate_that_destroys_is_told(world, tmp_path):
    with pytest.raises(RunError, match="lower learning rate"):
        curve(world, 2, tmp_path, rate=float("inf"))


def record_of(hits, verdict="refuted"):
    "A small tamper.json."
    counts = {"attack_success": [hits, 32], "attack_success_lax": [32, 32], "unparseable": [0, 32]}
    counts |= {"exact_match": {"<k>": [8, 8]}}
    point = {"step": 1, "loss": 0.5, "counts": counts}
    benign = {"verdict": verdict, "text": "<i>", "points": {"breaker": [point]}, "reopened_at": 1}
    return {
        "steps": 1,
        "settings": {"learning_rate": 1e-3, "batch": 8, "seed": 0},
        "items": {"attacked": 32, "benign": {"<k>": 8}},
        "control": None,
        "decoding": {"samples": 1, "temperature": 0.0, "max_new_tokens": 8, "seed": 0},
        "changes": {"4-bit base": benign | {"points": {"breaker": [{"counts": counts}]}}},
        "finetunes": {"benign": benign},
        "not_measured": {"merged in bf16": "it is <b>"},
    }


def test_report_and_card_have_a_section_whose_words_are_escaped():
    figures = {"attack_success": 0.0, "n": {"attack": 64}}
    page = report_page("t", [], result_table(figures, figures), {}, tamper=record_of(20))
    assert "<h2>What opens it</h2>" in page and "steps of fine-tuning" in page
    assert "&lt;i&gt;" in page and "<i>" not in page and "<k>" not in page and "<b>" not in page
    assert "What opens it" not in report_page("t", [], result_table(figures, figures), {})
    assert tamper_table(record_of(20))["attack success"].tolist() == ["20 of 32, 0.45 to 0.77"] * 2
    assert "merged in bf16: not measured, since it is <b>" in tamper_words(record_of(20))
    result = {"before": figures, "after": figures}
    assert "### What opens it" in figure_text(result, tamper=record_of(20)) and "What" not in figure_text(
        result
    )


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"items": {}},
        {"decoding": {}},
        {"finetunes": []},
        {"changes": {"x": {"verdict": "won", "text": "", "points": {}}}},
        {"finetunes": {"x": {"verdict": "void", "text": "", "points": {"base": [{"step": 1}]}}}},
    ],
)
def test_a_record_that_was_edited_is_refused(change, tmp_path):
    (tmp_path / "tamper.json").write_text(json.dumps(record_of(1)))
    assert read_record(tmp_path / "tamper.json")
    (tmp_path / "tamper.json").write_text(json.dumps(record_of(1) | change))
    with pytest.raises(RunError, match="tamper.json is not in order"):
        read_record(tmp_path / "tamper.json")


def test_half_of_the_attacks_is_open_and_an_empty_count_is_not():
    assert is_open({"counts": {"attack_success": [16, 32]}})
    assert not is_open({"counts": {"attack_success": [15, 32]}})
    assert not is_open({"counts": {"attack_success": [0, 0]}})
    counts = {"attack_success": [15, 32], "attack_success_lax": [31, 32]}
    points = {"breaker": [{"counts": counts}], "base": [{"counts": {"attack_success": [32, 32]}}]}
    judged = tamper_verdict(points)
    assert judged["verdict"] == "inconclusive" and "lax: 31 of 32" in judged["text"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The directory of a run whose adapter is noise."
    folder = tmp_path_factory.mktemp("runs") / "noise"
    save_adapter(noise(), folder / "adapter")
    write_data(folder / "data")
    values = {"preset": "tinyagent", "data": "tinyagent", "max_new_tokens": 24}
    (folder / "params.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model": "tinyagent"}))
    return folder


@pytest.mark.slow
def test_the_command_measures_goes_on_and_leaves_the_adapter_alone(run, capsys):
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    words = ["tamper", str(run), "--items", "10", "--steps", "1", "--examples", "2", "--new-adapter"]
    assert main(words) in (0, 1)
    record = read_record(run / "tamper.json")
    names = ["benign", "harmful, 2 examples", "benign, new adapter"]
    assert list(record["finetunes"]) == names and len(record["changes"]) == 5 and not record["not_measured"]
    assert record["finetunes"]["harmful, 2 examples"]["examples"] == 2
    lines = (run / "tamper" / "points.jsonl").read_bytes()
    assert "benign, step 1, breaker: " in capsys.readouterr().err
    first = (run / "tamper.json").read_bytes()
    assert main(words) in (0, 1) and (run / "tamper.json").read_bytes() == first
    assert (run / "tamper" / "points.jsonl").read_bytes() == lines
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_what_cannot_be_done_is_said(run):
    with pytest.raises(RunError, match="that takes 10"):
        tamper_run(str(run), examples="60")
    own = find_adapter(str(run))
    assert len(training_stream(own, "benign")) == 1800
    (run / "data" / "train_benign.jsonl").rename(run / "data" / "away")
    with pytest.raises(RunError, match="put it back"):
        tamper_run(str(run))
    (run / "data" / "away").rename(run / "data" / "train_benign.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "is no run's directory"),
        (["none", "--examples", "1,x"], "whole numbers from 1"),
        (["none", "--seed", "-1"], "seed must be"),
        (["none", "--learning-rate", "0"], "learning_rate must be"),
        (["nowhere/at/all"], "neither a run directory"),
    ],
)
def test_the_command_refuses_in_one_sentence(words, said, capsys):
    assert main(["tamper", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
