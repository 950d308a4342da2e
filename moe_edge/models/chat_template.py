"""Rendering a chat with the template that came with a tokenizer: foreign code, so in a process with limits.

A template may loop for ever, ask for gigabytes, or try to reach Python's internals. `template_worker.py` renders it with
Jinja's immutable sandbox under a memory limit; here the time is limited, and whatever goes wrong is an InputRejected. The
processes of the last two templates stay open, because a calibration set renders thousands of chats.
"""

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from moe_edge.contracts.errors import InputRejected

WORKER = Path(__file__).with_name("template_worker.py")
TEMPLATE_CHARACTERS = 1 << 20
TEXT_CHARACTERS = 4 << 20  # of one rendered chat
MEMORY_BYTES = 1 << 30
START_SECONDS = 30.0  # a cold interpreter on a busy machine
RENDER_SECONDS = 5.0
READ_BYTES = 1 << 16


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> str:
    """The text that `tokenizer.apply_chat_template(messages, tools, tokenize=False)` would give.

    Args:
        tokenizer: one with a chat template.
        messages: {"role", "content"} and whatever else the template reads; entries that are None are left out, as
            transformers does.
        tools: JSON schemas of the functions that the model may call; a template that knows named ones (`tool_use`) takes that.

    Raises:
        InputRejected: the template is too long, invalid, unsafe, too slow, or its text has no end.
    """
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise _rejected(str(error)) from error
    if len(template) > TEMPLATE_CHARACTERS:
        raise _rejected(f"it has {len(template)} characters, limit {TEMPLATE_CHARACTERS}")
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    variables = tokens | {"messages": given, "add_generation_prompt": add_generation_prompt}
    return _sandbox(template, RENDER_SECONDS).render(variables | {"tools": tools, "documents": None})


def _rejected(why: str) -> InputRejected:
    return InputRejected("the tokenizer's chat template fails", where="chat_template", why=why)


class Sandbox:
    """The process that renders one template.

    Args:
        template: the Jinja source.
        seconds: for one rendering; the process is killed when they are over.

    Raises:
        InputRejected: the template does not compile.
    """

    def __init__(self, template: str, seconds: float = RENDER_SECONDS) -> None:
        self.seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._stop = weakref.finalize(self, _stop, self._process)
        head = {"template": template, "memory_bytes": MEMORY_BYTES, "characters": TEXT_CHARACTERS}
        self._ask(head, START_SECONDS)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables. Raises InputRejected, and is of no use after a time-out."""
        return self._ask({"variables": variables}, self.seconds)

    def close(self) -> None:
        """End the process; closing twice is harmless."""
        self._stop()

    def _ask(self, request: Mapping[str, Any], seconds: float) -> str:
        deadline = time.monotonic() + seconds
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # a dead process, or one that was ended
            self._fail("its sandbox has ended")
        reply = json.loads(self._line(deadline, seconds))
        if "error" in reply:
            raise _rejected(reply["error"])
        return str(reply["text"])

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pipe, received = self._process.stdout.fileno(), bytearray()
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                self._fail(f"it takes longer than {seconds:g} s")
            part = os.read(pipe, READ_BYTES)
            if not part:
                self._fail("its sandbox died, most likely of too much memory")
            received += part
        return bytes(received)

    def _fail(self, why: str) -> NoReturn:
        self.close()
        _sandbox.cache_clear()
        raise _rejected(why)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                pass  # what was still buffered for the dead process


@lru_cache(maxsize=2)  # one for rows with tools, one for those without
def _sandbox(template: str, seconds: float) -> Sandbox:
    return Sandbox(template, seconds)
