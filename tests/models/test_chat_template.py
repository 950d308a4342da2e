"""Chat templates are foreign code: honest ones render as in transformers, hostile ones end as exit 4 within limits."""

import ast
import time
from pathlib import Path

import pytest

import moe_edge
from moe_edge.contracts.errors import InputRejected
from moe_edge.models import chat_template
from moe_edge.models.chat_template import Sandbox, render_chat
from tests.tiny import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <b> 'x'", "name": None},
    {"role": "assistant", "content": "Yes."},
]
HONEST = {
    "spaces and loop variables": "{% for m in messages %}\n  {{ loop.index0 }}{{ m['role'] }}: {{ m.content | trim }}\n"
    "{% if not loop.last %}|{% endif %}{% endfor %}",
    "json without escapes": "{{ messages | tojson(indent=1) }}{{ messages[0] | tojson }}",
    "special tokens": "{{ eos_token }}{{ bos_token is defined }}",
    "namespace": "{% set n = namespace(seen=0) %}{% for m in messages %}{% set n.seen = n.seen + 1 %}{% endfor %}{{ n.seen }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "prompt": "{% if add_generation_prompt %}assistant:{% endif %}{{ tools is none }}{{ dict(a=1) }}",
    "macro": "{% macro turn(m) %}[{{ m.role.upper() }}]{% endmacro %}{% for m in messages[1:] %}{{ turn(m) }}{% endfor %}",
    "absent keys": "{% for m in messages %}{{ 'name' in m }}{% endfor %}",
}
HOSTILE = {
    "class": ("{{ ''.__class__ }}", "__class__"),
    "class by filter": ("{{ ''|attr('__class__') }}", "__class__"),
    "class by format": ("{{ '{0.__class__}'.format(1) }}", "__class__"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "unsafe"),
    "dunder namespace": ("{{ namespace(__class__=1) }}", "__class__"),
    "gigabytes": ("{{ 'x' * 10**10 }}", "memory"),
    "endless text": ("{% for i in range(99999) %}{{ 'y' * 100 }}{% endfor %}", "longer than"),
    "endless recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "Recursion"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "range"),
    "syntax": ("{% if %}", "Syntax"),
    "its own refusal": ("{{ raise_exception('no system role') }}", "no system role"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
}


@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.parametrize("prompt", [False, True])
def test_honest_templates_render_as_in_transformers(kind, prompt):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HONEST[kind]
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(tokenizer, CHAT, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_are_refused(kind):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, why = HOSTILE[kind]
    with pytest.raises(InputRejected, match="chat template") as refused:
        render_chat(tokenizer, CHAT)
    assert refused.value.exit_code == 4 and why.lower() in str(refused.value).lower()


def test_an_endless_loop_is_killed():
    sandbox = Sandbox("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", seconds=0.5)
    started = time.monotonic()
    with pytest.raises(InputRejected, match=r"longer than 0\.5 s"):
        sandbox.render({})
    assert time.monotonic() - started < 5
    assert sandbox._process.poll() is not None
    with pytest.raises(InputRejected, match="ended"):
        sandbox.render({})


def test_a_template_of_megabytes_is_not_even_started(monkeypatch):
    monkeypatch.setattr(chat_template, "TEMPLATE_CHARACTERS", 10)
    with pytest.raises(InputRejected, match="limit 10"):
        render_chat(tiny_tokenizer(), CHAT)


def test_a_sandbox_serves_many_chats_and_survives_a_failing_one():
    sandbox = Sandbox("{{ messages[0].content.upper() }}")
    assert sandbox.render({"messages": [{"content": "a\nb"}]}) == "A\nB"
    with pytest.raises(InputRejected):
        sandbox.render({"messages": []})
    assert sandbox.render({"messages": [{"content": "ü"}]}) == "Ü"
    sandbox.close()
    sandbox.close()


def test_foreign_templates_are_rendered_nowhere_else():
    """Only the demo teacher's own template, which is ours, goes through transformers directly."""
    package = Path(moe_edge.__file__).parent
    callers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("apply_chat_template", "from_string")
    }
    assert callers == {"demo/corpus.py", "models/template_worker.py"}
