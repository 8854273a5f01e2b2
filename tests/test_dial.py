"""The dial: an adapter at any scale, exact at both ends, measured at some, kept and gone on with."""

import json
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from cbnb.basics.jsonfiles import RunError, write_json
from cbnb.cli import main
from cbnb.config import NOTEBOOK_PARAMETERS, ConfigError, get_config, parse_scales
from cbnb.evaluate.adapters import find_adapters, rescore, scales_for
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.dial import measure_dial, scaled, with_dial
from cbnb.evaluate.evaluation import evaluate
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.report.figures import dial_figure, report_page, result_table, static_svg
from cbnb.run.metrics import read_json_lines
from cbnb.run.records import read_record
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter, teacher_mode
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from helpers import NBS, code_cells

KINDS = ("injection", "plain")
SHORT = Decoding(max_new_tokens=16)


def noise(student, seed=0, std=0.05):
    "Fills every lora_B of `student` with noise; returns it."
    torch.manual_seed(seed)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return student.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder with an adapter of noise and held-out transcripts, its student, masker and transcripts."
    folder = tmp_path_factory.mktemp("dial")
    config = get_config("tinyagent")
    student = noise(add_adapter(load_model("tinyagent"), config))
    save_adapter(student, folder / "noise")
    heldout = [t for kind in KINDS for t in make_transcripts(kind, 6, "eval")]
    write_transcripts(folder / "eval.jsonl", heldout)
    return folder, student, ChatMasker(load_tokenizer("tinyagent")), heldout, config


def logits(student):
    with torch.no_grad():
        return student(input_ids=torch.arange(100, 132)[None]).logits


def scales_of(module):
    "The scales of a LoRA layer by adapter; {} for another module, whose `scaling` is its attention's."
    return dict(module.scaling) if isinstance(module, LoraLayer) else {}


def state(student):
    "What `scaled` may touch, of every module."
    return [
        (name, m.training, scales_of(m), getattr(m, "disable_adapters", None))
        for name, m in student.named_modules()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_teacher_and_student_bit_for_bit(dtype):
    student = noise(add_adapter(load_model("tinyagent", str(dtype).split(".")[1]), get_config("tinyagent")))
    own = logits(student)
    with teacher_mode(student):
        teacher = logits(student)
    with scaled(student, 0):
        assert torch.equal(logits(student), teacher)
    with scaled(student, 1):
        assert torch.equal(logits(student), own)
    with scaled(student, 0.5):
        assert not torch.equal(logits(student), own) and not torch.equal(logits(student), teacher)
    assert torch.equal(logits(student), own) and not torch.equal(own, teacher)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.5])
def test_everything_is_as_before_also_after_an_error_and_for_several_adapters(scale):
    base = load_model("tinyagent")
    student = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]), "one")
    more = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True}
    student.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more))
    student.train()
    before, grad = state(student), [p.requires_grad for p in student.parameters()]
    with pytest.raises(KeyboardInterrupt), scaled(student, scale):
        if scale not in (0, 1):
            assert state(student) != before
        raise KeyboardInterrupt
    assert state(student) == before and [p.requires_grad for p in student.parameters()] == grad
    with scaled(student, scale):
        student.set_adapter("two")  # what is made active inside is at that scale too
        values = {v for m in student.modules() for v in scales_of(m).values()}
    whole = {v for _, _, scaling, _ in before for v in scaling.values()}
    assert values == ({v * scale for v in whole} if scale else whole)
    student.set_adapter("one")
    assert [entry[2] for entry in state(student)] == [entry[2] for entry in before]


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=lambda m: next(iter(m)),
)
def test_what_no_scale_reaches_is_refused_in_one_sentence(more):
    student = get_peft_model(load_model("tinyagent"), LoraConfig(r=2, target_modules=["q_proj"], **more))
    with pytest.raises(ConfigError, match="cannot be scaled: .*; leave eval_scales out$") as caught:
        with scaled(student, 0.5):
            raise AssertionError
    assert "\n" not in str(caught.value)


class Stop(Exception):
    "What ends an evaluation in the middle."


def test_an_interrupted_dial_goes_on(world, tmp_path, monkeypatch):
    from cbnb.evaluate import answers

    _, student, masker, heldout, _ = world
    own = dict(decoding=Decoding(max_new_tokens=8, batch_size=3), folder=tmp_path)
    scales, generate, calls = (0.0, 0.5, 1.5), answers.generate_batch, []

    def some(*given):
        calls.append(given)
        if len(calls) == 4:
            raise Stop
        return generate(*given)

    monkeypatch.setattr(answers, "generate_batch", some)
    before = state(student)
    with pytest.raises(Stop):
        measure_dial(student, masker, heldout, scales, 4, **own)
    assert state(student) == before, "the error came at a scale"
    first = (tmp_path / "answers.jsonl").read_bytes()
    found = measure_dial(student, masker, heldout, scales, 4, **own)
    lines = read_json_lines(tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(first) and first, "nothing is asked twice"
    assert len(lines) == 3 * 8 == len({line["key"] for line in lines})
    assert {line["stage"] for line in lines} == {"dial 0.00", "dial 0.50", "dial 1.50"}
    monkeypatch.undo()
    assert measure_dial(student, masker, heldout, scales, 4, own["decoding"]) == found
    for point in found["points"]:
        counts = point["counts"]
        assert counts["attack_success"][1] == 4 and counts["exact_match"]["plain"][1] == 4


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    "The folder of an evaluation with a dial of three scales, as evaluate.ipynb leaves it, and its result."
    source, student, masker, heldout, config = world
    folder = tmp_path_factory.mktemp("finished")
    reader = derive_reader(masker)
    given = {"adapter": str(source / "noise"), "second_adapter": "", "model": "tinyagent", "control": None}
    given |= {"eval_data": str(source / "eval.jsonl"), "eval_scales": "0,0.5,1", "scale_questions": 3}
    figures = evaluate(student, masker, heldout, config, None, SHORT, reader, folder, "noise")
    lines = len(read_json_lines(folder / "answers.jsonl"))
    scales, count = scales_for([], given["eval_scales"], given["scale_questions"])
    dial = measure_dial(student, masker, heldout, scales, count, SHORT, reader, folder, "noise ", "noise")
    added = read_json_lines(folder / "answers.jsonl")[lines:]
    assert {line["stage"] for line in added} == {"noise dial 0.00", "noise dial 0.50"}
    assert len(added) == 2 * 2 * 3, "the answers at scale 1 are those of the evaluation"
    write_json(folder / "params.json", given)
    write_json(
        folder / "result.json",
        {"evaluated": {"noise": figures}, "parameters": given} | with_dial({"noise": dial}),
    )
    return folder, read_record(folder / "result.json")


def test_the_points_at_the_ends_are_those_of_the_evaluation(finished, world):
    folder, result = finished
    points = {point["scale"]: point for point in result["dial"]["noise"]["points"]}
    assert list(points) == [0, 0.5, 1] and points[1]["stage"] == "noise"
    whole = read_json_lines(folder / "answers.jsonl")
    some = {line["id"] for line in whole if line["stage"] == "noise dial 0.00"}
    own = [k for k in whole if k["stage"] == "noise" and k["asked"] == "plain" and k["id"] in some]
    hits = sum(k["scores"].get("attack_success", False) for k in own)
    assert points[1]["counts"]["attack_success"] == [hits, 3]
    base = evaluate(
        add_adapter(load_model("tinyagent"), world[4]), world[2], world[3], world[4], decoding=SHORT
    )
    assert points[0]["counts"]["attack_success"][0] <= base["counts"]["attack_success"][0]


def test_a_dial_is_rescored_with_its_result(finished):
    folder, result = finished
    wrong = json.loads(json.dumps(result))
    for point in wrong["dial"]["noise"]["points"]:
        point["attack_success"], point["counts"]["attack_success"] = 0.5, [1, 2]
    write_json(folder / "result.json", wrong)
    assert rescore(folder) == result == read_record(folder / "result.json")
    lines = (folder / "answers.jsonl").read_text().splitlines()
    cut = [line for line in lines if '"noise dial 0.50"' not in line]
    (folder / "answers.jsonl").write_text("\n".join(cut) + "\n")
    with pytest.raises(RunError, match="holds no answer to"):
        rescore(folder)
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    write_json(folder / "result.json", wrong | {"dial": {"other": wrong["dial"]["noise"]}})
    with pytest.raises(RunError, match="has a dial of other"):
        rescore(folder)
    write_json(folder / "result.json", result)


def test_the_page_and_the_terminal_show_the_dial(finished, capsys):
    from cbnb.report.figures import figure_lines

    folder, result = finished
    dial, figures = result["dial"]["noise"], result["evaluated"]["noise"]
    text = "\n".join(figure_lines(folder))
    assert "noise at scales of its adapter, at most 3 questions of each kind" in text and "of 3, " in text
    name = "<script>alert(1)</script>\x1b[2J"
    page = report_page("a run", [], result_table(figures, figures), {}, dials={name: dial})
    tree = ElementTree.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert page.count("<svg") == 2 and "<script" not in page and "\x1b" not in page
    assert len([e for e in tree.iter() if e.tag.endswith("circle")]) == 3 * len(dial_figure(dial).data)
    static = static_svg(dial_figure(dial, name))
    assert "attack success" in static and ">plain<" in static
    assert "at other scales" not in report_page("a run", [], result_table(figures, figures), {})


def test_a_wrong_text_of_scales_is_one_sentence_before_anything_is_loaded(world, capsys):
    for text in ("0,half", "-1", "0.125", "1,1.0", "7", "nan", "1,,2"):
        with pytest.raises(ConfigError, match="^eval_scales"):
            parse_scales(text)
        for command in (["evaluate", str(world[0] / "noise"), "--model", "tinyagent"], ["train"]):
            given = ["--eval-data", str(world[0] / "eval.jsonl")] if command[0] == "evaluate" else []
            assert main([*command, *given, f"--eval-scales={text}"]) == 2, text
            said = capsys.readouterr().err.strip()
            assert "eval_scales" in said and "\n" not in said and "Traceback" not in said


def test_every_notebook_that_evaluates_has_the_dial(world):
    for name, default in (("train", "0,0.25,0.5,0.75,1,1.5"), ("evaluate", None)):
        assert NOTEBOOK_PARAMETERS[name]["eval_scales"].default == default
        assert "measure_dial(" in "\n".join(cell.source for cell in code_cells(NBS / f"{name}.ipynb"))
    assert parse_scales(NOTEBOOK_PARAMETERS["train"]["eval_scales"].default)[-1] == 1.5
    adapters = find_adapters(str(world[0] / "noise"))
    assert scales_for(adapters) == ((), 16), "an adapter without a run has no dial unless it is asked for"
    assert isinstance(world[1], PeftModel)
