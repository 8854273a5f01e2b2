"""Chat templates that take much of little, each by another mechanism. As a program: runs them under the
package's own limits and prints a table, or, with seconds as its argument, under that limit and prints JSON.
"""

import json
import resource
import sys
import time

A = "{% set a = 'x' * 8000000 %}"
LONG = "{% set a, b = 'a' * 4000000 ~ 'b', 'a' * 4000000 ~ 'c' %}"
P = 2**61 - 1  # Python's hash of a multiple of it is 0
GROW = "{{% set n = namespace(x={}, y=0) %}}{{% for i in range(60) %}}{{% set n.x = {} %}}{{% endfor %}}"
TWICE = GROW.format("[1]", "[n.x, n.x]")
BIG = GROW.replace("range(60)", "range(24)").format("7", "n.x * n.x")
BOMBS = {  # each takes over 5 seconds or over 512 MiB where nothing bounds it
    # numbers
    "power": "{{ 9 ** (10 ** 9 + messages | length) }}",
    "power, folded by the compiler": "{{ 9 ** (10 ** 9) }}",
    "powers of powers": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x ** 99 %}{% "
    "endfor %}",
    "squares": "{% set n = namespace(x=99999) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor "
    "%}",
    "floor division": BIG + "{% for i in range(99999) %}{{ n.x * n.x // (n.x + 1) > 0 }}{% endfor %}",
    "remainder": BIG + "{% for i in range(99999) %}{{ n.x * n.x % (n.x + 1) > 0 }}{% endfor %}",
    "divisibleby": BIG + "{% for i in range(99999) %}{{ n.x * n.x is divisibleby(n.x + 1) }}{% endfor %}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "bytes as numbers": "{% set i = (1).from_bytes(('x' * 10 ** 7).encode(), 'big') %}{{ i * i % (i + 1) > "
    "0 }}",
    "to_bytes": "{{ (5).to_bytes(10 ** 10, 'big') }}",
    # strings that grow
    "product of a string": "{{ 'x' * (10 ** 10 + messages | length) }}",
    "product of a string, folded by the compiler": "{{ 'x' * 10 ** 10 }}",
    "filter, folded by the compiler": "{{ 'x' | center(10 ** 10) }}",
    "tilde": GROW.format("'a'", "n.x ~ n.x"),
    "many tildes": A + "{{ (" + "~".join("a" for _ in range(999)) + ") | length }}",
    "plus": GROW.format("'a'", "n.x + n.x"),
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "expandtabs": "{{ ('\\t' * 10 ** 6).expandtabs(10 ** 4) | length }}",
    "replace filter": A + "{{ a | replace('x', a) | length }}",
    "replace method": A + "{{ a.replace('x', a) | length }}",
    "translate": A + "{{ a.translate({120: a}) | length }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999, blank=true) | length }}",
    "join filter": A + "{{ [" + ", ".join("a" for _ in range(999)) + "] | join | length }}",
    "join method": A + "{{ a.join(a) | length }}",
    "join of a generator": "{{ range(999) | map('string') | map('center', 8000000) | join | length }}",
    "escape": A + "{{ ('&' * 10 ** 8) | escape | length }}",
    "encode": "{{ ('x' * 2 * 10 ** 8).encode('utf-32') | length }}",
    "list of characters": "{{ ('x' * 10 ** 8) | list | length }}",
    "split": "{{ ('x ' * 10 ** 8).split() | length }}",
    "strftime_now": "{{ strftime_now('%c' * 10 ** 8) | length }}",
    "format width": "{{ '%999999999d' | format(messages | length) | length }}",
    "format width of an argument": "{{ '%*d' % (999999999, 1) }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}",
    "format method, nested": "{{ '{:{w}}'.format('a', w=10 ** 10) }}",
    "format of many": A + "{{ ('%s' * 999) | format(" + ", ".join("a" for _ in range(999)) + ") | length }}",
    "precision": "{{ '%.999999999f' % 1.5 }}",
    "set block": A + "{% set b %}" + "{{ a }}" * 999 + "{% endset %}{{ b | length }}",
    "macro": "{% macro f() %}{% for i in range(999) %}{{ 'x' * 8000000 }}{% endfor %}{% endmacro %}{{ f() | "
    "length }}",
    "filter block": "{% filter upper %}{% for i in range(999) %}{{ 'x' * 8000000 }}{% endfor %}{% endfilter "
    "%}",
    # strings that are searched
    "rfind": "{{ ('a' * 4000000).rfind('ab' ~ 'a' * 2000000) }}",
    "rsplit": "{{ ('a' * 4000000).rsplit('ab' ~ 'a' * 2000000) | length }}",
    "strip": "{{ ('a' * 10 ** 7).strip('b' * 10 ** 6 ~ 'a') }}",
    "urlize": "{{ ('www.a.com ' * 5 * 10 ** 6) | urlize | length }}",
    "wordwrap": "{{ ('a ' * 10 ** 7) | wordwrap(1) | length }}",
    "title": "{{ ('a ' * 10 ** 7) | title | length }}",
    # comparisons
    "equal": A
    + "{% set b = a ~ '' %}{% for i in range(99999) %}{% if a != b ~ 'x' %}{% endif %}{% endfor %}",
    "in a list": LONG + "{{ a in [b] * 99999 }}",
    "sort": LONG + "{{ ([a, b] * 50000) | sort | length }}",
    "sort, folding case": LONG + "{{ ([a, b] * 9999) | sort(case_sensitive=false) | length }}",
    "min": LONG + "{{ ([a, b] * 50000) | min | length }}",
    "unique": LONG + "{{ ([a, b] * 9999) | unique | list | length }}",
    "groupby": LONG + "{{ ([{'k': a}, {'k': b}] * 50000) | groupby('k') | list | length }}",
    "select": LONG + "{{ ([a] * 99999) | select('ge', b) | list | length }}",
    "nested lists, equal": TWICE + "{% set x = n.x %}" + TWICE + "{{ x == n.x }}",
    "nested tuples as a key": GROW.format("(1,)", "(n.x, n.x)") + "{{ {n.x: 1} | length }}",
    "keys of one hash": "{{ dict(range(0, 99999 * %d, %d) | batch(2)) | length }}" % (P, P),
    "unique of one hash": "{{ range(0, 99999 * %d, %d) | unique | list | length }}" % (P, P),
    # lists
    "product of a list": "{{ ([0] * (10 ** 10 + messages | length)) | length }}",
    "sums of lists": GROW.format("['a']", "n.x + n.x"),
    "sum filter": "{{ range(99999) | batch(1) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "map": "{{ range(99999) | map('center', 99999) | list }}",
    "lists, as JSON": TWICE + "{{ n.x | tojson }}",
    "tuples, as text": GROW.format("(1,)", "(n.x, n.x)") + "{{ n.x | string }}",
    "dicts, as text": GROW.format("1", "{'a': n.x, 'b': n.x}") + "{{ n.x | string }}",
    "dict()": GROW.format("1", "dict(a=n.x, b=n.x)") + "{{ n.x | tojson }}",
    "pprint": TWICE + "{{ n.x | pprint }}",
    "JSON, indented": "{{ messages | tojson(indent=10 ** 10) }}",
    "JSON, separated": A + "{{ range(99) | list | tojson(separators=(a, a)) | length }}",
    # control
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop with a condition": "{% for i in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
    "macros that call "
    "twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1, 1]] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif "
    "%}{% endfor %}",
    "call blocks": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 30
    + "x"
    + "{% endcall %}" * 30,
    "by the transcript": "{{ 'x' * (messages[0].content | int) }}",
}
REFUSALS = {  # each ends at once, in the words of the template or of Jinja
    "output": A + "{{ a }}" * 60,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "depth": "{% set n = namespace(x=1) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ "
    "n.x | tojson }}",
    "brackets": "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}",
    "long sum": "{{ " + "+".join("1" for _ in range(99999)) + " }}",
    "nested blocks": "{% if 1 %}" * 999 + "{% endif %}" * 999,
    "nested loops": "{% for i in [1] %}" * 99 + "{% endfor %}" * 99,
    "long template": "x" * 2**18 + "x",
    "long reason": "{{ raise_exception('x' * 10 ** 7) }}",
    "no range": "{{ range(10 ** 9) }}",
    "endless text": "{{ lipsum(10 ** 6) }}",
    "another file": "{% include '/dev/zero' %}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "a product of a string that is no number": "{{ 'x' * 'x' }}",
}


def outcomes(names, limit=None):
    """{name: (what was said, wall seconds, seconds of the processor here and in the process that renders)} of
    the templates `names`."""
    from cbnb.masking import templates

    if limit:
        templates.MAX_RENDER_SECONDS = limit
    out, message = {}, [{"role": "user", "content": str(10**10)}]
    for name in names:
        before, start = used(), time.monotonic()
        try:
            said = f"rendered {len(templates.render((BOMBS | REFUSALS)[name], message))} characters"
        except templates.MaskError as e:
            said = str(e)
        if said.find(": it ") > 0:
            templates.end()  # it is gone already
        out[name] = said, time.monotonic() - start, used() - before
    return out


def used():
    return sum(
        r.ru_utime + r.ru_stime
        for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def mib(who):
    return resource.getrusage(who).ru_maxrss // 1024


if __name__ == "__main__":
    from cbnb.masking import templates

    before, limit = mib(resource.RUSAGE_SELF), [float(a) for a in sys.argv[1:2]]
    out = outcomes([*BOMBS, *REFUSALS], *limit)
    templates.end()
    told = {
        "mib": mib(resource.RUSAGE_SELF) - before,
        "child_mib": mib(resource.RUSAGE_CHILDREN),
        "outcomes": out,
    }
    if limit:
        print(json.dumps(told))
    else:
        for name, (said, wall, cpu) in out.items():
            print(f"{name:45} {wall:6.2f} s {cpu:6.2f} s of processor  {said[:110]}")
        print(
            f"this process grew by {told['mib']} MiB; one that rendered had {told['child_mib']} MiB at most"
        )
