"""Code that comes with a model or an adapter runs only where the user said so: one door for every loader, and
a model that leaves a mark where its code runs."""

import ast
import json
import os
import pty
import shutil
import sys

import pytest

import cbnb.run.settings
from cbnb.basics.places import TINYAGENT
from cbnb.cli import main
from cbnb.config import ConfigError, get_config
from cbnb.step.loaders import check_code, read_adapter, read_config
from cbnb.step.models import load_model, load_tokenizer
from forked import cells, command, forked
from helpers import NBS, ROOT, code_cells, environment, run_notebooks
from train_common import few, little_data, load

# --- the door is the only one ---

LOADERS = set(
    "from_pretrained from_config load_adapter get_class_from_dynamic_module snapshot_download "
    "hf_hub_download "
    "load_dataset load_dataset_builder load_from_disk read_pickle load loads import_module pipeline".split()
)
BUILT_IN = {"__import__", "eval", "exec", "compile", "input"}
HARMLESS = {"json", "self"}  # of what `load` and `loads` are called
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
ALLOWED = {  # what is not the door, and why
    # the door
    "cbnb/step/loaders.py": {"from_pretrained", "from_config", "load_adapter", "snapshot_download"},
    # cbnb fetch: files by pattern, none of them Python
    "cbnb/sweep/fetch.py": {"snapshot_download"},
    # a GGUF file, which holds numbers and text alone
    "cbnb/sweep/gguf.py": {"from_pretrained"},
    # of an unlinked file, which this process has written
    "cbnb/transcripts/spool.py": {"pickle", "loads"},
    # plain values alone: PlainUnpickler knows no class
    "cbnb/masking/rendering.py": {"pickle", "load"},
    # its errors; what it reads goes through PlainUnpickler
    "cbnb/masking/templates.py": {"pickle"},
    # of datasets 5, which runs no script, reads no pickle
    "cbnb/transcripts/packed.py": {"load_dataset", "load_from_disk"},
    "cbnb/sweep/spec.py": {"load"},  # yaml, by a SafeLoader
    # cbnb's own names, by a table that stands there
    "cbnb/__init__.py": {"import_module"},
    "cbnb/basics/withheld.py": {"import_module"},  # of regex, by that name
    # of the user's own, as module:name
    "cbnb/masking/policies.py": {"import_module"},
    "cbnb/step/objectives.py": {"import_module"},
    # AgentDojo and tau-bench, by names that stand there
    "cbnb/data/sources.py": {"import_module"},
    # AgentDojo's own, by names that stand there
    "cbnb/agent/agentdojo.py": {"import_module"},
    "cbnb/transcripts/reader.py": {"import_module"},  # cbnb's own formats
    "cbnb/attacks/asking.py": {"load"},  # of safetensors, whose files hold tensors alone
}


def found_in(source):
    "`(line, name)` of every call in Python `source` that loads what may be code, and of imports of pickles."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if isinstance(node.func, ast.Name) and name in BUILT_IN:
                yield node.lineno, name
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in LOADERS and owner not in HARMLESS:
                yield node.lineno, name
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in PICKLES)


def sources():
    """`(path from the root, Python source)` of every module and of the cells of every notebook that papermill
    runs."""
    for path in sorted((ROOT / "cbnb").rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in run_notebooks():
        for cell in code_cells(path):
            lines = (
                "" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines()
            )
            yield str(path.relative_to(ROOT)), "\n".join(lines)


def test_nothing_is_loaded_beside_the_door():
    found = [(path, line, name) for path, source in sources() for line, name in found_in(source)]
    beside = [(path, line, name) for path, line, name in found if name not in ALLOWED.get(path, ())]
    assert beside == [], "a loader that is not cbnb.step.loaders"
    used = {path: {name for other, _, name in found if other == path} for path in ALLOWED}
    assert used == ALLOWED, "what is allowed and not there any more is taken out"


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x)",
        "transformers.AutoConfig.from_config(c)",
        "torch.load(p)",
        "import pickle",
        "from joblib import load",
        "np.load(p)",
        "input('sure?')",
        "importlib.import_module(name)",
        "eval(text)",
        "student.load_adapter(f, n)",
        "pd.read_pickle(p)",
    ],
)
def test_a_loader_is_found(source):
    assert list(found_in(source)), source


def test_the_door_passes_the_flag():
    nodes = ast.walk(ast.parse((ROOT / "cbnb" / "step" / "loaders.py").read_text()))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    made = [
        c
        for c in calls
        if c.func.attr in ("from_pretrained", "from_config") and c.func.value.id != "PeftConfig"
    ]
    assert len(made) == 4
    for call in made:
        given = [k.value.id for k in call.keywords if k.arg == "trust_remote_code"]
        assert given == ["trust_remote_code"], ast.unparse(call)


TAKES = set(
    "load_model load_tokenizer read_config read_tokenizer read_model empty_model read_adapter check_adapter "
    "load_students make_masker load_masker find_adapter find_adapters masker_for rescore "
    "load_options load_model_of load_student open_chat load_explorer explorer_parts open_explorer "
    "mask_explorer explore_answers "
    "plan_lines plan_step change_that_fits model_shape beside_text "
    "settings_of preset_for model_facts embedding_rows in_parts made_with settings_for model_class "
    "check_code check_trusted attach_adapter masker_of_run rescoring_inputs".split()
)
OWN = {  # the tiny agent and the presets' models
    "load_model(config.model)",
    "load_model(config.model, config.dtype)",
    "load_tokenizer(config.model)",
    "model_facts(own)",
    "model_facts(PRESETS[PUBLISHED].model)",
    "model_facts(PRESETS[name].model)",
    "model_facts(config.model)",
    "mask_explorer(known_bad(), a='first_header', b='assistant_only', max_length=200, "
    "policies={'chatml_header': chatml_header})",
}


def test_the_users_flag_reaches_the_door():
    "Every call of what takes the flag passes one on, but for models of cbnb's own."
    for path, source in sources():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            name, text = getattr(node.func, "attr", getattr(node.func, "id", "")), ast.unparse(node)
            if name not in TAKES or text in OWN or "'tinyagent'" in text:
                continue
            passed = (
                "trust_remote_code" in text or "trusted" in text or any(k.arg is None for k in node.keywords)
            )
            assert passed, (path, node.lineno, text)


# --- a model with code in it ---

CODE = {  # file: what it defines; each leaves a mark where it is run
    "own_config": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig): model_type = 'own'\n",
    "own_model": "from transformers import LlamaForCausalLM\nfrom .own_config import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM): config_class = OwnConfig\n",
    "own_llama": "from transformers import LlamaForCausalLM\nclass OwnLlama(LlamaForCausalLM): pass\n",
    "own_tokenizer": "from transformers import PreTrainedTokenizerFast\n"
    "class OwnTokenizer(PreTrainedTokenizerFast): pass\n",
    "own_processor": "class OwnProcessor: pass\n",
    "custom_generate/generate": "from transformers import GenerationMixin\n"
    "def generate(model, **more): return GenerationMixin.generate(model, **more)\n",
}
OWN_TOKENIZER = {
    "tokenizer_class": "OwnTokenizer",
    "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]},
}
OWN_MODEL = {"AutoModelForCausalLM": "own_model.OwnForCausalLM"}
KINDS = {  # what is code: changes of config.json and of tokenizer_config.json
    "everything": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"} | OWN_MODEL},
        OWN_TOKENIZER,
    ),
    "the configuration": ({"auto_map": {"AutoConfig": "own_config.OwnConfig"}}, {}),
    "the model": ({"auto_map": {"AutoModelForCausalLM": "own_llama.OwnLlama"}}, {}),
    "a model of a type that has none": ({"model_type": "t5", "auto_map": OWN_MODEL}, {}),
    "the tokenizer": ({}, OWN_TOKENIZER),
}


def change(path, settings):
    "Puts `settings` into the JSON object at `path`."
    path.write_text(json.dumps(load(path) | settings))


def plant(folder, kind):
    """A copy of the tiny agent in `folder` in which `kind` of `KINDS` is code that leaves marks in
    `folder`/marks; returns the folder."""
    shutil.copytree(TINYAGENT, folder)
    (folder / "marks").mkdir()
    for name, settings in zip(("config.json", "tokenizer_config.json"), KINDS[kind]):
        change(folder / name, settings)
    processor = {
        "processor_class": "OwnProcessor",
        "auto_map": {"AutoProcessor": "own_processor.OwnProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "custom_generate").mkdir()
    for name, source in CODE.items():
        mark = folder / "marks" / name.partition("/")[0]
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n{source}")
    return folder


def marks(folder):
    return {p.name for p in (folder / "marks").iterdir()}


def one_sentence(said, where):
    "The line that says why, with the flag and the name of the model in it, and no traceback."
    assert "Traceback" not in said and "[y/N]" not in said, said
    (line,) = [line for line in said.splitlines() if "trust_remote_code" in line]
    assert str(where) in line, line


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    "Where transformers puts a model's code before it imports it: not into the user's cache."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        yield


@pytest.fixture(scope="module")
def breaker(tmp_path_factory):
    "The folder of an adapter on the tiny agent that has moved."
    import torch

    from cbnb.step.models import add_adapter, save_adapter

    student = add_adapter(load_model("tinyagent", device="cpu"), get_config("tinyagent"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return save_adapter(student, tmp_path_factory.mktemp("breaker") / "adapter")


def in_process(folder, adapter):
    """Functions behind every command and notebook that load something of the model in `folder`, without the
    flag."""
    from cbnb.evaluate.adapters import asked_model, find_adapters, masker_for
    from cbnb.preflight.plan import plan_lines
    from cbnb.transcripts.tinyworld import make_transcripts
    from cbnb.widgets.kl import load_explorer
    from cbnb.widgets.masks import mask_explorer

    name, given = str(folder), {"model": str(folder), "adapter": str(adapter), "eval_data": "tinyagent"}
    config = get_config("tinyagent", model=name, batch_size=1, max_length=16)

    def shown(explorer):
        if explorer.exploration.message:
            raise ConfigError(explorer.exploration.message)

    yield "the model", lambda: load_model(name)
    yield "the tokenizer", lambda: load_tokenizer(name)
    yield "settings", lambda: cbnb.run.settings.settings_of("tinyagent", {"model": name})
    yield "masker", lambda: cbnb.run.settings.make_masker(name)
    yield "plan", lambda: list(plan_lines(config))
    yield (
        "evaluate",
        lambda: masker_for(find_adapters(str(adapter)), asked_model(find_adapters(str(adapter)), given)),
    )
    yield "KL explorer", lambda: load_explorer(str(adapter), model=name, data="tinyagent")
    yield "mask explorer", lambda: shown(mask_explorer(make_transcripts("plain", 1), name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_flag_no_code_runs(tmp_path, breaker, kind, monkeypatch):
    folder, refused = plant(tmp_path / "planted", kind), set()
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail(f"asked: {words}"))
    for what, call in in_process(folder, breaker):
        try:
            call()
        except (ValueError, OSError) as e:
            refused.add(what)
            one_sentence(str(e), folder)
            assert str(e).count("\n") == 0, e
        assert marks(folder) == set(), what
    of_model = {"the model", "plan", "KL explorer"}
    of_tokenizer = {"the tokenizer", "masker", "evaluate", "KL explorer", "mask explorer"}
    wanted = {"everything": of_model | of_tokenizer, "the tokenizer": of_tokenizer}
    assert refused - {"settings"} == wanted.get(kind, of_model)
    assert ("settings" in refused) == (kind in ("everything", "the configuration")), refused


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_the_flag_it_loads(tmp_path, breaker):
    "All but the processor, which nothing here needs."
    from cbnb.preflight.plan import plan_lines
    from cbnb.transcripts.tinyworld import make_transcripts
    from cbnb.widgets.kl import load_explorer
    from cbnb.widgets.masks import mask_explorer

    folder = plant(tmp_path / "trusted", "everything")
    name, config = str(folder), get_config("tinyagent", model=str(folder), batch_size=1, max_length=16)
    assert "together" in " ".join(plan_lines(config, trust_remote_code=True))
    assert marks(folder) == {"own_config", "own_model"}
    assert type(load_tokenizer(name, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert type(load_model(name, trust_remote_code=True, device="cpu")).__name__ == "OwnForCausalLM"
    shown = mask_explorer(make_transcripts("plain", 1), name, trust_remote_code=True)
    assert shown.exploration.message == ""
    assert shown.set(model="tinyagent").settings["trust_remote_code"] is False, "it was said of that model"
    assert (
        "divergence"
        in load_explorer(str(breaker), model=name, data="tinyagent", trust_remote_code=True).arguments
    )
    assert marks(folder) == {"own_config", "own_model", "own_tokenizer", "custom_generate"}


# --- the commands and the notebooks ---


def test_every_command_refuses_in_a_sentence(tmp_path, breaker):
    folder, runs = plant(tmp_path / "planted", "everything"), tmp_path / "runs"
    spec = tmp_path / "s.yaml"
    whole = little_data(tmp_path) | {"model": str(folder)}
    spec.write_text(json.dumps({"parameters": whole, "grid": {"beta_kl": [0, 0.3]}}))
    heldout = ("--eval-data", whole["eval_data"])
    data, model = ("--data", whole["data"], *heldout), ("--model", folder)
    for given in (
        ("plan", *model),
        ("train", *model, *data),
        ("preflight", *model, *data),
        ("masks", whole["data"], *model),
        ("ablate", spec, "--dry-run", "--local", 1),
        ("evaluate", breaker, *model, *heldout),
        ("chat", breaker, *model),
    ):
        said = command(*given, runs=runs)
        assert said.returncode == 2 and not runs.exists(), (given, said.stdout)
        one_sentence(said.stdout, folder)
    assert marks(folder) == set()
    for name in ("train", "preflight", "evaluate", "explore_masks", "explore_kl", "chat"):
        assert "trust_remote_code: bool = False" in code_cells(NBS / f"{name}.ipynb")[0].source


@pytest.mark.slow
def test_every_command_takes_the_flag(tmp_path):
    folder = plant(tmp_path / "trusted", "everything")
    masks = ("masks", little_data(tmp_path)["data"], "--show", 0)
    for given in (("plan", "--batch-size", 1, "--max-length", 16), masks):
        given = (*given, "--model", folder, "--trust-remote-code")
        said = command(*given, runs=tmp_path)
        assert said.returncode == 0, said.stdout
    assert marks(folder) == {"own_config", "own_model", "own_tokenizer"}
    given = few(tmp_path, model=folder, dtype="float32", trust_remote_code=True, total_steps=2)
    done = cells(*given, "-p", "run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout[-3000:]
    # what params.json says was said by whoever made the run
    refused = command("evaluate", tmp_path / "run", "--rescore", runs=tmp_path)
    assert refused.returncode == 2, refused.stdout
    one_sentence(refused.stdout, folder)
    said = command("evaluate", tmp_path / "run", "--rescore", "--trust-remote-code", runs=tmp_path)
    assert said.returncode == 0, said.stdout[-2000:]


def test_a_run_directory_of_anyones_runs_nothing(tmp_path, breaker, monkeypatch):
    """Its parameters say that the model's code is trusted, and name an objective that lies on the path:
    neither is taken at its word."""
    from cbnb.evaluate.adapters import find_adapter, made_with

    folder, here = plant(tmp_path / "planted", "everything"), tmp_path / "run"
    shutil.copytree(breaker, here / "adapter")
    (tmp_path / "theirs.py").write_text(f"open({str(folder / 'marks' / 'objective')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {
        "preset": "tinyagent",
        "data": "tinyagent",
        "trust_remote_code": True,
        "objective": "theirs:mine",
    }
    (here / "params.json").write_text(json.dumps(given | {"model": str(folder)}))
    with pytest.raises(ConfigError, match="runs only where you say so"):
        made_with(find_adapter(str(here)).parameters)
    (here / "params.json").write_text(json.dumps(given | {"model": "tinyagent"}))
    assert made_with(find_adapter(str(here)).parameters).objective == "theirs:mine" and marks(folder) == set()


# --- nobody is asked ---


@pytest.mark.parametrize("kind", ["a model of a type that has none", "inside of another"])
def test_a_terminal_is_not_asked(tmp_path, kind):
    "With a terminal at stdin that answers yes to everything."
    folder = plant(tmp_path / "planted", "a model of a type that has none")
    if kind == "inside of another":
        from transformers import LlavaConfig

        parts = LlavaConfig().to_dict()
        parts["text_config"] |= {
            "model_type": "rag",
            "auto_map": {"AutoModel": f"{folder}--own_llama.OwnLlama"},
        }
        (folder / "config.json").write_text(json.dumps(parts))
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 5)

    def at_a_terminal():
        os.dup2(theirs, 0)
        sys.stdin = os.fdopen(0, closefd=False)
        assert sys.stdin.isatty()
        if kind == "inside of another":
            return load_model(str(folder))
        return main(
            [
                "plan",
                "--model",
                str(folder),
                "--lora-layers",
                "0,1",
                "--target-layers",
                "1",
                "--batch-size",
                "1",
            ]
        )

    said = forked(at_a_terminal, env=environment(tmp_path))
    os.close(ours), os.close(theirs)
    assert said.returncode != 0 and "trust_remote_code" in said.stdout, said.stdout
    assert "[y/N]" not in said.stdout and marks(folder) == set(), said.stdout


# --- code that is not needed, and code that an adapter names ---


def test_a_class_that_transformers_has_is_transformers_own(tmp_path):
    folder = plant(tmp_path / "known", "the model")
    known = {"AutoConfig": "own_config.LlamaConfig", "AutoModelForCausalLM": "own_llama.LlamaForCausalLM"}
    change(folder / "config.json", {"auto_map": known})
    assert type(load_model(str(folder), device="cpu")).__module__.startswith("transformers.models.llama")
    assert marks(folder) == set()
    check_code("org/name", "model", ["modeling_mpt.MPTForCausalLM"], ["MptForCausalLM"], False)


def test_attention_from_a_hub_is_code(tmp_path):
    folder = shutil.copytree(TINYAGENT, tmp_path / "kernel")
    change(folder / "config.json", {"attn_implementation": "someone/kernel"})
    with pytest.raises(ConfigError, match="from the hub, someone/kernel.*trust_remote_code"):
        load_model(str(folder))
    assert read_config(str(folder), trust_remote_code=True)._attn_implementation == "someone/kernel"


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"auto_mapping": {"base_model_class": "Own", "parent_library": "theirs"}},
            "code by auto_mapping, the module 'theirs'",
        ),
        (
            {"auto_mapping": {"base_model_class": "Own", "parent_library": ["theirs"]}},
            "names code by auto_mapping",
        ),
        (
            {"megatron_config": {"x": 1}, "megatron_core": "theirs"},
            "names code by megatron_core, the module 'theirs'",
        ),
        (
            {"peft_type": "XLORA", "adapters": {"0": "org/other"}},
            "names others that would be loaded beside it",
        ),
        ({"peft_type": "THEIRS"}, "which peft does not know"),
    ],
)
def test_an_adapter_that_names_code(tmp_path, breaker, settings, words):
    folder = shutil.copytree(breaker, tmp_path / "adapter")
    change(folder / "adapter_config.json", settings)
    said = command("evaluate", folder, "--model", "tinyagent", runs=tmp_path / "runs")
    assert said.returncode == 2 and words in said.stdout and said.stdout.count("\n") == 1, said.stdout
    assert not (tmp_path / "runs").exists()
    if "code by" in words:
        assert "--trust-remote-code" in said.stdout and read_adapter(folder, True).r == 8


def test_a_model_folder_with_an_adapter_is_refused_before_its_base_is_looked_for(tmp_path, breaker):
    shutil.copy(breaker / "adapter_config.json", tmp_path)
    base = plant(tmp_path / "base", "everything")
    change(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(base)})
    with pytest.raises(ConfigError, match="carries an adapter"):
        load_model(str(tmp_path))
    assert marks(base) == set()
