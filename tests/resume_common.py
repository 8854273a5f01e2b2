"""A short training that tests/test_resume.py interrupts in every way. `python resume_common.py` imports and
reads everything once; every line on its stdin, JSON such as `{"folder": …, "end": ["kill at step", 3]}`, is
an attempt in a process forked from it, whose exit status is printed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from cbnb.config import get_config
from cbnb.data.streams import encode_stream
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.stages import RunInterrupted, set_status, stage
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.tinyworld import make_transcripts

STEPS = 9
# dropout: random state matters; two micro-batches a step; a checkpoint in every other step
CONFIG = get_config(
    "tinyagent",
    total_steps=STEPS,
    batch_size=1,
    gradient_accumulation_steps=2,
    warmup_steps=2,
    lora_dropout=0.1,
    save_steps=2,
    logging_steps=2,
    diagnose_steps=4,
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class AtStep(TrainerCallback):
    """Does something before an optimizer step (0 is the first), or in the middle of it, with the gradient of
    one micro-batch."""

    def __init__(self, step, act, substep=False):
        self.step, self.act, self.substep = step, act, substep

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.substep:
            self.act()

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.substep:
            self.act()


def die_at_event(folder, number):
    """Kills this process before the `number`-th thing that Python does to the checkpoints of a run: opening,
    making, renaming, removing."""
    seen, place = 0, str(folder / "checkpoints")

    def hook(event, args):
        nonlocal seen
        # a removed folder's files, told by name alone
        inside = args and place in str(args[0]) or event == "os.remove" and args[1] != -1
        if inside and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(hook)


def die_in_save(number):
    "Kills this process in the middle of the `number`-th file that torch writes: half of it is there."
    save, seen = torch.save, 0

    def half(what, path, *args, **kwargs):
        nonlocal seen
        save(what, path, *args, **kwargs)
        seen += 1
        if seen == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def fill(file):
    "Writes to `file` until its disk has no byte left."
    with open(file, "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass


def train(model, harmful, benign, pad_id, folder, end=None):
    "One attempt at the run `folder`, ended as `end` says: `[how, number]`; None lets it go to its end."
    folder, (how, number) = Path(folder), end or (None, 0)
    run, callbacks = open_run({"test": "resume"}, run_dir=folder), []
    if how == "kill at step":
        callbacks = [AtStep(number, die)]
    if how == "kill in step":
        callbacks = [AtStep(number, die, substep=True)]
    if how == "kill at event":
        die_at_event(folder, number)
    if how == "kill in save":
        die_in_save(number)
    if how == "stop":
        callbacks = [AtStep(number, (folder / "stop").touch)]
    if how in ("SIGTERM", "SIGUSR2", "SIGINT"):
        callbacks = [AtStep(number, partial(signal.raise_signal, signal.Signals[how]))]
    if how == "fill":
        callbacks = [AtStep(number, partial(fill, folder.parent / "filled"))]
    with stage(run, "training"):
        student = add_adapter(model, CONFIG)
        if not train_breaker(student, harmful, benign, CONFIG, run, pad_id, callbacks=callbacks):
            raise RunInterrupted("stopped")
    if how == "kill after":
        die()
    with stage(run, "evaluation after"):
        save_adapter(student, folder / "adapter")
    set_status(run, "done")


def forked(work):
    "The exit status of `work()` in a process of its own, negative for a signal."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_small_disks(attempt, folder):
    """Two runs whose disk gets full, each on a disk of its own, and goes on when there is space again: of the
    first their own checkpoints take the last of it, of the second another file. The run is copied to
    `<name>-failed`, which all can see, before it goes on, and to `<name>` at the end."""
    for name, size, end in (("own", "3400k", None), ("other", "9m", ["fill", 5])):
        disk = Path(folder) / f"disk-{name}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
        print(attempt(folder=disk / "run", end=end), flush=True)
        shutil.copytree(disk / "run", Path(folder) / f"{name}-failed")
        (disk / "filled").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        print(attempt(folder=disk / "run"), flush=True)
        shutil.copytree(disk / "run", Path(folder) / name)


if __name__ == "__main__":
    tokenizer = load_tokenizer("tinyagent")
    masker = ChatMasker(tokenizer)
    streams = [
        encode_stream(make_transcripts(kind, 12), masker, policy)[0]
        for kind, policy in (("injection", CONFIG.harmful_policy), ("plain", CONFIG.benign_policy))
    ]
    model = load_model("tinyagent")

    def attempt(**how):
        return forked(partial(train, model, *streams, tokenizer.pad_token_id, **how))

    if len(sys.argv) > 1:
        on_small_disks(attempt, sys.argv[1])
    else:
        for line in sys.stdin:
            print(attempt(**json.loads(line)), flush=True)
