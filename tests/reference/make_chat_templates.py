#!/usr/bin/env python3
"""Renders chat templates with transformers, for tests/unit/test_chat_template.c.

    VENV/bin/python tests/reference/make_chat_templates.py     (transformers, jinja2: requirements.txt)

Writes tests/fixtures/chat_templates.jsonl, one object a line: name, template, variables, and text, or
error where transformers fails. The templates are written here, in the manner of those that models carry
(turn marks, header marks, [INST], system folded into the first turn, alternation checked, loop
controls, namespaces, macros), plus one line each for every filter, test, method and operator.
"""
import itertools
import json
import pathlib

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "chat_templates.jsonl"

TEMPLATES = {
    "turn marks": """{% for message in messages %}
{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start|>assistant\\n' }}
{% endif %}""",
    "headers": """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
""",
    "instructions": """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set rest = messages[1:] %}{% else %}{% set system = false %}{% set rest = messages %}{% endif %}\
{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system != false %}{% set content = '<<S>>\\n' + system + '\\n<</S>>\\n\\n' + m['content'] %}\
{% else %}{% set content = m['content'] %}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "reasoning": """{%- macro show(m, open='<', close=">") -%}
{{ open ~ m.role ~ close }}{{ m.content if m.content is string else m.content | map(attribute='text') | join('') }}
{%- endmacro -%}
{%- set ns = namespace(last=-1, seen=[]) %}
{%- for m in messages[::-1] %}
  {%- set index = (messages | length - 1) - loop.index0 %}
  {%- if m.role == "user" and ns.last < 0 %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{#- a comment
    of two lines -#}
{%- for m in messages %}
  {%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception("role " + m.role) }}{% endif %}
  {%- if m.role == 'tool' %}{% continue %}{% endif %}
  {%- if '</think>' in m.content %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
    {{- show({'role': m.role, 'content': content}, open='[') }}
  {%- else %}
    {{- show(m) }}
  {%- endif %}
  {%- if not loop.last %}{{ "\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and (enable_thinking is not defined or enable_thinking) %}
{{- '\\n<assistant>' }}
{%- elif add_generation_prompt %}
{{- '\\n<assistant><think></think>' }}
{%- endif %} [{{ ns.last }}]""",
    "tools": """{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value | tojson }};{% endfor %}
{% set a, b = 1, [m.role, m.get('name', 'none')] %}{{ a }} {{ b }}{{ ',' if not loop.last }}
{% endfor %}{% if tools %}never{% endif %}{% if tools is defined and tools is not none %}never{% endif %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% for c in m.content[:2] %}{% set ns.n = ns.n + loop.index %}{% endfor %}{% endfor %}{{ ns.n }}""",
    "parts": """{{ bos_token }}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- else -%}{{ raise_exception("no text") }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\\n' }}{%- endif -%}
""",
    "white space": """  {% if true %}
  a
    {%- if true %}

  b  
  {% endif +%}

  {%+ if true %} c {% endif -%}

     d
{% endif %}
{# gone #}
  {# gone, too #} e
{% set x %}
  kept {{ 1 + 1 }}
{% endset %}
[{{ x }}]
{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}:{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem is defined else '-' }}
{% else %}
nobody
{% endfor %}
{% generation %}g{% endgeneration %}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}

""",
}

CONVERSATIONS = [
    [{"role": "user", "content": "Hello, you."}],
    [{"role": "system", "content": " Be kind.\n"}, {"role": "user", "content": "  Größe?  "},
     {"role": "assistant", "content": "<think>\nhm</think>\n\nGroß."}, {"role": "user", "content": "日本"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}],
    [{"role": "tool", "content": "x"}, {"role": "pirate", "content": "y"}],
    [{"role": "user", "content": "{{ 7 * 7 }} {% if %} <|end|>"}],
]

VALUES = {"s": "  Ab c,d  ", "t": "x\ny\n\nz", "n": 7, "f": 2.5, "l": [3, 1, 2, 3], "e": [], "d": {"b": 1, "a": None},
          "yes": True, "no": False, "none_": None, "items_": [{"k": "u", "v": 1}, {"k": "w", "v": 0}, {"k": "u"}]}
EXPRESSIONS = """
s|trim ; s.strip() ; s.lstrip() ; s.rstrip() ; s.strip(' A') ; s.split(',') ; s.split() ; s.split(' ', 3) ; t.split('\\n')
s.upper() ; s|lower ; 'élan vital'|title ; 'ÉLAN'.capitalize() ; "it's a-b (c d) 2nd x_y"|title ; "it's a-b (c d) 2nd x_y".title() ; s.replace(' ', '_') ; s|replace('c', '') ; 'abc'.find('c')
s.startswith('  A') ; s.endswith(('x', '  ')) ; 'b' in s ; 'q' not in s ; 3 in l ; 'a' in d ; 9 not in l
s|length ; l|length ; d|length ; l|first ; l|last ; l[0] ; l[-1] ; l[1:] ; l[:-1] ; l[::-1] ; l[::2] ; s[2:4] ; s[::-1] ; 'abc'[1]
l|join(', ') ; l|join ; d.items()|map('first')|list ; d.keys()|list ; d.values()|list ; d|items|map('last')|list ; [l, e]|map('join', '+')|list ; d.get('b') ; d.get('q', 5) ; d.get('q')
d|dictsort|map('first')|list ; l|unique|list ; l|reverse|list ; l|list ; 'ab'|list ; d|list ; t|indent(2) ; t|indent(2, true) ; t|indent(1, true, true)
items_|map(attribute='k')|list ; items_|map(attribute='v', default=9)|list ; items_|selectattr('k', 'equalto', 'u')|list
items_|rejectattr('v')|list ; l|select('odd')|list ; l|reject('equalto', 3)|list ; ['a', 'b']|map('upper')|join('-')
d|tojson ; l|tojson ; s|tojson ; 'é"\\\\/'|tojson ; items_|tojson(indent=2) ; none_|tojson ; yes|tojson ; f|tojson ; [[], {}]|tojson(indent=4)
n + 1 ; n - 10 ; n * f ; n / 2 ; n // 2 ; n % 4 ; -n % 4 ; -n // 2 ; 2 ** 3 ; f + 1 ; 7 / 7 ; 1 + 2 * 3 - 4 ; (1 + 2) * 3 ; 'a' ~ 1 + 2
s ~ n ; 'a' ~ none_ ~ yes ~ f ; 'a' + 'b' ~ 'c' ; l + [4] ; n == 7.0 ; n != 7 ; n < f ; n >= 7 ; 'a' < 'b' ; 'b' <= 'a' ; yes == 1
yes and n ; no or s ; not yes ; not no and yes ; none_ or 'x' ; e and 1 ; 'a' if no else 'b' ; 'a' if yes ; 'a' if no ; (1 if no else 2) + 1
q ; q is defined ; q is not defined ; s is string ; d is mapping ; l is iterable ; l is sequence ; d is sequence ; n is number ; yes is boolean
none_ is none ; q is none ; f is float ; n is integer ; yes is true ; no is false ; n is odd ; 4 is even ; n is eq 7 ; n is ne(7) ; 3 is in l
q|default('z') ; ''|default('z') ; ''|default('z', true) ; s|default('z')|length ; q|d ; n|string|length ; '12'|int + 1 ; 'x'|int ; f|int
l ; d ; items_ ; [s, "it's", 'q"q'] ; 1.0 ; 1e3 ; 0.1 ; 1e16 ; 0.00001 ; 123.456 ; 1 / 3 ; 100 / 8 ; 12345678901 ; [1.5, none_, yes] ; (1, 2)|length ; (n,)|first ; {'a': [1, {'b': 'c'}]} ; '\\u00e9\\x41\\t|'
namespace(a=1).a ; dict(a=1, b='c') ; range(3)|list ; range(2, 8, 3)|list ; range(3, 0, -1)|list ; 'a' 'b' ; "\\"'" ; 'a\\qb' ; 'x' if n is defined and n > 3 else 'y'
l[9] ; d.q ; d['q'] ; q.x ; q[0] ; 'a' + 1 ; 1 < 'a' ; n() ; 1 / 0 ; d.a.b ; s|safe ; s|string|trim|upper|lower|length
"""


def case(name, template, variables):
    result = {"name": name, "template": template, "variables": variables}
    messages = variables.get("messages", [])
    rest = {k: v for k, v in variables.items() if k != "messages"}
    generation = rest.pop("add_generation_prompt", False)
    try:
        texts, _ = render_jinja_template([messages], chat_template=template,
                                         add_generation_prompt=generation, **rest)
        result["text"] = texts[0]
    except Exception as failure:
        result["error"] = f"{type(failure).__name__}: {failure}"
    return result


def main():
    cases = []
    for (name, template), (i, messages), generation in itertools.product(
            TEMPLATES.items(), enumerate(CONVERSATIONS), (False, True)):
        cases.append(case(f"{name}, conversation {i}", template, {
            "messages": messages, "add_generation_prompt": generation, "bos_token": "<s>",
            "eos_token": "</s>", **({"enable_thinking": False} if i == 1 else {})}))
    for expression in EXPRESSIONS.replace("\n", " ; ").split(" ; "):
        if expression.strip():
            cases.append(case(expression, "[{{ " + expression + " }}]", VALUES))
    with OUT.open("w", encoding="utf-8") as file:
        for one in cases:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    print(len(cases), "cases,", sum("error" in c for c in cases), "errors, transformers",
          transformers.__version__)
    for one in cases:
        if "error" in one:
            print(" ", one["name"], "->", one["error"][:80])


if __name__ == "__main__":
    main()
