"""Run by tests/test_wheel.py in an environment that holds only the installed wheel, from a folder
outside the repository.

usage: train_few_steps.py PACKAGE_FILE...     the package's files that are not modules, relative to it
"""

import importlib
import pkgutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import cbnb

package = Path(cbnb.__file__).parent
assert package.is_relative_to(sys.prefix), f"cbnb comes from {package}, not from the installed wheel"

names = [m.name for m in pkgutil.walk_packages(cbnb.__path__, "cbnb.") if not m.name.endswith("__main__")]
extras = set()
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as e:  # only what an extra is for, which the sentence names
        assert "is not installed; pip install 'cbnb[" in str(e), (name, e)
        extras.add(name)
assert {name.rpartition(".")[2].partition("_")[0] for name in extras} == {"inspect"}, extras

for name in sys.argv[1:]:
    assert files("cbnb").joinpath(name).is_file(), f"the wheel lacks {name}"

print(f"cbnb {cbnb.__version__}: {len(names)} modules, {len(sys.argv) - 1} data files")


from cbnb.config import get_config
from cbnb.data.streams import encode_stream, load_streams
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.metrics import read_metrics
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.tinyworld import write_data

with tempfile.TemporaryDirectory() as folder:
    world = write_data(f"{folder}/data")
    harmful, benign, *_ = load_streams([world["train_harmful"], world["train_benign"]], [world["eval"]])
    config = get_config("tinyagent", total_steps=3, warmup_steps=1)
    masker = ChatMasker(load_tokenizer("tinyagent"))
    harmful, _ = encode_stream(harmful, masker, config.harmful_policy)
    benign, _ = encode_stream(benign, masker, config.benign_policy)
    student = add_adapter(load_model("tinyagent"), config)
    run = open_run({"total_steps": 3}, run_dir=f"{folder}/run")
    assert train_breaker(student, harmful, benign, config, run, masker.tokenizer.pad_token_id)
    rows = read_metrics(run.path)
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[-1]["loss_retain"] > 0
    assert (save_adapter(student, run.path / "adapter") / "adapter_model.safetensors").is_file()
print("trained", len(rows), "steps, loss", rows[-1]["loss"])
