"""Encoding of a stream, and the whole data stage of train, in a process of its own, for
nbs/bench/encode.ipynb: how long, and the peak of its memory."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

TRAIN = Path(__file__).parents[1] / "nbs" / "train.ipynb"


class Synthetic:
    """`n` transcripts of a user's task, each with words of its own, made anew on each iteration: no list of
    them is held."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        from cbnb.transcripts.tinyworld import make_transcripts

        made = make_transcripts("plain", 200)
        for i in range(self.n):
            t = made[i % len(made)]
            yield replace(
                t,
                id=f"t{i}",
                messages=[
                    {"role": "user", "content": f"note {i} of this file"},
                    {"role": "assistant", "content": "noted."},
                    *t.messages,
                ],
            )


def peak():
    "Most bytes that this process has held so far."
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024


def main(n, way, place):
    """`way`: list (`encode_stream`), or the number of processes of `stored_stream`. Prints seconds by the
    clock, transcripts, tokens and bytes at the peak over those before."""
    from cbnb.data.streams import encode_stream
    from cbnb.masking.masker import ChatMasker
    from cbnb.step.models import load_tokenizer
    from cbnb.train.store import stored_stream

    masker = ChatMasker(load_tokenizer("tinyagent"))
    encode_stream(Synthetic(50), masker, "assistant_only")
    before, began = peak(), time.monotonic()
    if way == "list":
        samples, report = encode_stream(Synthetic(int(n)), masker, "assistant_only")
    else:
        samples, report = stored_stream(
            place, Synthetic(int(n)), masker, "assistant_only", processes=int(way)
        )
    seconds = time.monotonic() - began
    held = peak() - before
    read = sum(len(samples[i].input_ids) for i in range(0, len(samples), max(1, len(samples) // 1000)))
    print(
        json.dumps(
            {
                "transcripts": report.transcripts,
                "tokens": report.tokens,
                "seconds": seconds,
                "held": held,
                "read": read,
            }
        )
    )


def write_chats(path, n):
    """`n` transcripts as a file: every second one harmful, with words and an injection of the tiny agent's,
    no two alike."""
    from cbnb.transcripts.reader import to_record
    from cbnb.transcripts.tinyworld import make_transcripts

    made = (
        [*map(to_record, make_transcripts("injection", 200))],
        [*map(to_record, make_transcripts("plain", 200))],
    )
    with open(path, "w") as f:
        for i in range(n):
            record = made[i % 2][i // 2 % 200]
            first, *rest = record["messages"]
            words = {
                "messages": [first | {"content": f"{first['content']} This is note {i} of a file."}, *rest]
            }
            f.write(json.dumps(record | words | {"id": f"chat-{i:08d}"}) + "\n")


def run_stage(place, way, data):
    """Runs the cell "data" of train.ipynb, with the parameters as they are declared, on the file `data`;
    returns its names. `way`: `train`, with an encoded cache in the folder `place`; `read`, each transcript is
    read once in place of encoding; `listed`, as `read`, with all transcripts in a list."""
    import cbnb.data.sources
    import cbnb.train.store
    from cbnb.data.streams import StreamReport
    from cbnb.run.settings import run_settings

    cells = [
        "".join(cell["source"])
        for cell in json.loads(TRAIN.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    names = {}
    exec(cells[0], names)
    names |= {"data": str(data), "encoded_cache": str(place / data.stem) if way == "train" else ""}
    parameters = {k: v for k, v in names.items() if not k.startswith("__")}
    names |= {
        "config": run_settings(parameters)[0],
        "parameters": parameters,
        "run": SimpleNamespace(path=place),
        "stage": lambda *_: nullcontext(),
    }
    if way != "train":
        cbnb.train.store.encode_for = lambda config, name, transcripts, *_: (
            [],
            StreamReport(sum(1 for _ in transcripts)),
        )
    if way == "listed":
        cbnb.data.sources.spooled = list
    exec(next(cell for cell in cells if 'stage(run, "data")' in cell), names)
    return names


def train(n, way, place):
    """Prints seconds, transcripts and bytes at the peak over those before, of the data stage of train on `n`
    transcripts in a file of the folder `place`; `way` as in `run_stage`."""
    place = Path(place)
    place.mkdir(exist_ok=True)
    for name, size in (("few", 100), ("all", int(n))):
        write_chats(place / f"{name}.jsonl", size)
    run_stage(place, way, place / "few.jsonl")
    before, began = peak(), time.monotonic()
    names = run_stage(place, way, place / "all.jsonl")
    streams = names["harmful_report"], names["benign_report"]
    print(
        json.dumps(
            {
                "transcripts": sum(r.transcripts for r in streams),
                "tokens": sum(r.tokens for r in streams),
                "seconds": time.monotonic() - began,
                "held": peak() - before,
                "file": (place / "all.jsonl").stat().st_size,
            }
        )
    )


def measured(n, way, place=""):
    "What `main` prints, of a fresh process."
    done = subprocess.run(
        [sys.executable, __file__, str(n), str(way), str(place)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    (train if sys.argv[2] in ("train", "read", "listed") else main)(*sys.argv[1:])
