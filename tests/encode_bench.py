"""Encoding of a stream in a process of its own, for nbs/bench/encode.ipynb: how long, and the peak of its memory."""
import json, os, re, subprocess, sys, time
from dataclasses import replace


class Synthetic:
    "`n` transcripts of a user's task, each with words of its own, made anew on each iteration: no list of them is held."
    def __init__(self, n): self.n = n

    def __iter__(self):
        from cbnb.tinyagent import make_transcripts
        made = make_transcripts("plain", 200)
        for i in range(self.n):
            t = made[i % len(made)]
            yield replace(t, id=f"t{i}", messages=[{"role": "user", "content": f"note {i} of this file"}, {"role": "assistant", "content": "noted."}, *t.messages])


def peak():
    "Most bytes that this process has held so far."
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024


def main(n, way, place):
    "`way`: list (`encode_stream`), or the number of processes of `stored_stream`. Prints seconds by the clock, transcripts, tokens and bytes at the peak over those before."
    from cbnb.data import encode_stream
    from cbnb.masks import ChatMasker
    from cbnb.models import load_tokenizer
    from cbnb.store import stored_stream
    masker = ChatMasker(load_tokenizer("tinyagent"))
    encode_stream(Synthetic(50), masker, "assistant_only")
    before, began = peak(), time.monotonic()
    if way == "list": samples, report = encode_stream(Synthetic(int(n)), masker, "assistant_only")
    else: samples, report = stored_stream(place, Synthetic(int(n)), masker, "assistant_only", processes=int(way))
    seconds = time.monotonic() - began
    held = peak() - before
    read = sum(len(samples[i].input_ids) for i in range(0, len(samples), max(1, len(samples) // 1000)))
    print(json.dumps({"transcripts": report.transcripts, "tokens": report.tokens, "seconds": seconds, "held": held, "read": read}))


def measured(n, way, place=""):
    "What `main` prints, of a fresh process."
    done = subprocess.run([sys.executable, __file__, str(n), str(way), str(place)], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__": main(*sys.argv[1:])
