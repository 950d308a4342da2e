"""llama.cpp's log goes to Python's logging at debug level and is remembered, so that an error can quote it.

Why: libllama writes hundreds of lines to stderr and reports failures only there; a user must see neither the noise
nor a bare "failed to load".
"""

import ctypes
import logging
from collections import deque

from llama_cpp import llama_cpp as lib

_LOGGER = logging.getLogger(__name__)
_RECENT: deque[str] = deque(maxlen=40)
_ERROR, _CONTINUED = 4, 5  # ggml_log_level
_last_level = 0


@lib.llama_log_callback
def _receive(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    global _last_level
    _last_level = _last_level if level == _CONTINUED else level
    line = text.decode("utf-8", "replace").rstrip("\n")
    if not line.strip(". \n"):
        return
    if _last_level == _ERROR:
        _RECENT.append(line)
    _LOGGER.debug("%s", line)


def quiet_llama() -> None:
    """Take over the log of libllama and forget earlier errors; call before every entry into the library."""
    _RECENT.clear()
    lib.llama_log_set(_receive, ctypes.c_void_p(0))


def last_errors() -> str:
    """What libllama complained about since `quiet_llama`, or an honest empty answer."""
    return " | ".join(_RECENT) or "llama.cpp gave no reason"
