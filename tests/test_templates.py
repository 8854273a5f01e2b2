"""Chat templates that make much of little: each is refused in words, and none of them takes the machine with it."""
import sys

import pytest
from helpers import run

from cbnb.templates import compile_template, render

A, MANY = "{% set a = 'x' * 8000000 %}", range(60)
BOMBS = {
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "tuples": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x | tojson }}",
    "dicts": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | string }}",
    "dict()": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "sums of lists": "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | tojson }}",
    "depth": "{% set n = namespace(x=1) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
    "block": A + "{% set b %}" + "{{ a }}" * 60 + "{% endset %}{{ b | length }}",
    "tilde": A + "{{ (" + "~".join("a" for _ in MANY) + ") | length }}",
    "format filter": A + "{{ ('%s' * 60) | format(" + ", ".join("a" for _ in MANY) + ") | length }}",
    "format operator": A + "{{ (('%s' * 60) % (" + ", ".join("a" for _ in MANY) + ")) | length }}",
    "format method": A + "{{ '" + "{0}" * 60 + "'.format(a) | length }}",
    "join filter": A + "{{ [" + ", ".join("a" for _ in MANY) + "] | join | length }}",
    "join method": A + "{{ ''.join([" + ", ".join("a" for _ in MANY) + "]) | length }}",
    "join of a generator": "{{ range(60) | map('string') | map('center', 8000000) | join | length }}",
    "macro": "{% macro f() %}{% for i in range(60) %}{{ 'x' * 8000000 }}{% endfor %}{% endmacro %}{{ f() | length }}",
    "filter block": "{% filter upper %}{% for i in range(60) %}{{ 'x' * 8000000 }}{% endfor %}{% endfilter %}",
    "output": A + "{{ a }}" * 60,
}
PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from cbnb.templates import MaskError, compile_template, render
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: print("rendered", len(render(compile_template(sys.argv[1]), [{"role": "user", "content": "x"}])))
except MaskError as e: print("refused:", e)
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name, tmp_path):
    said = run(sys.executable, "-c", PROGRAM, BOMBS[name], cwd=tmp_path, timeout=120).stdout
    assert said.startswith("refused: the chat template refuses this transcript: it ") and int(said.split("MiB")[1]) < 400, said


def test_what_templates_do_with_lists_still_works():
    source = ("{% set n = namespace(out=[]) %}{% for m in messages %}{% set n.out = n.out + [{'role': m.role, 'text': [m.content, 'y']}] %}{% endfor %}"
              "{% set b %}{{ n.out | tojson }}{% endset %}{{ b }}{{ ['a', 'b'] | join(', ') }}{{ '%s-%s' | format(1, 'z') }}{{ ' '.join(('p', 'q')) }}")
    assert render(compile_template(source), [{"role": "user", "content": "x"}]) == '[{"role": "user", "text": ["x", "y"]}]a, b1-zp q'
