"""The far side of chat_template.py: a process of its own that renders one Jinja template under limits; run, not imported.

Why a process: Jinja's sandbox stops a template from reaching Python's internals, but not from looping for ever or building a
string of gigabytes; only another process can be given a memory limit and be killed. The environment is that of
transformers' `apply_chat_template` (same filters, globals and whitespace rules), made stricter: an unsafe attribute is an
error at once, not an empty string.

Protocol, one JSON document per line: {"template", "memory_bytes", "characters"} first, then {"variables"} per rendering, each
answered by {"text"} or {"error"}.
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class StrictEnvironment(ImmutableSandboxedEnvironment):
    """Refuses an unsafe attribute where the stock sandbox would render nothing in its place."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")


class Generation(Extension):
    """`{% generation %}` of transformers marks what the assistant says; here it renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A `namespace()` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            PlainNamespace.check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace must not hold {name!r}")


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The `tojson` filter without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: object) -> NoReturn:
    """`raise_exception` of chat templates."""
    raise TemplateError(str(message))


def plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` without the methods of the type."""
    return dict(*args, **kwargs)


def environment() -> StrictEnvironment:
    """What transformers gives a chat template."""
    made = StrictEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": plain_dict,
        "namespace": PlainNamespace,
    }
    return made


def rendered(template: Template, variables: dict[str, Any], characters: int) -> str:
    """The whole text; stops as soon as it is longer than `characters`."""
    parts, length = [], 0
    for part in template.generate(**variables):
        length += len(part)
        if length > characters:
            raise TemplateError(f"the text is longer than {characters} characters")
        parts.append(part)
    return "".join(parts)


def reply_line(work: Callable[[], str]) -> str:
    """One reply line."""
    try:
        reply = {"text": work()}
    except MemoryError:
        reply = {"error": "MemoryError: the template wants more memory than the sandbox has"}
    except Exception as error:  # whatever a foreign template raises is its own fault
        reply = {"error": f"{type(error).__name__}: {error}"[:500]}
    return json.dumps(reply) + "\n"


def main() -> None:
    """Serve one template until the other side closes the pipe."""
    head = json.loads(sys.stdin.readline())
    try:
        resource.setrlimit(resource.RLIMIT_AS, (head["memory_bytes"], head["memory_bytes"]))
    except (OSError, ValueError):
        pass  # a system without address-space limits; the time limit of the other side still holds
    compiled: list[Template] = []

    def compile_template() -> str:
        compiled.append(environment().from_string(head["template"]))
        return ""

    def render(variables: dict[str, Any]) -> str:
        return rendered(compiled[0], variables, head["characters"])

    sys.stdout.write(reply_line(compile_template))
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(reply_line(partial(render, json.loads(line)["variables"])))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
