"""Chat templates come with models from anywhere: they are rendered within limits, and fail in one sentence.

`transformers` renders in Jinja's sandbox, which keeps a template from files and from Python, but not from computing for
ever or taking all memory. Here operators and calls of a template refuse sizes that no conversation has, and a watchdog
ends a render that takes too long or too much.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from typing import Any, TypeVar

from nemo_lmpo.errors import shown
from nemo_lmpo.runtime.threads import Thread

MAX_SECONDS = 30.0
"""For one call, which may render many conversations; a thousand long ones take about a second."""
MAX_BYTES = 2 << 30
"""By which the process may grow meanwhile."""
MAX_SIZE = 10**6
"""Largest number that an operator or a function makes something of that size with."""
_POLL_SECONDS = 0.05
_RENDERING = threading.RLock()
"""Held by the thread that renders, as one is watched at a time. Jinja is Python: two would take turns in any case."""
_WIDE_FIELD = re.compile(r"\d{7,}")
_Rendered = TypeVar("_Rendered")


class TemplateFailed(Exception):
    """A template raised an error, or went beyond the limits; the text says why in one line."""


class _LimitReachedError(Exception):
    """Raised by the watchdog inside a template."""


def within_limits(render: Callable[[], _Rendered]) -> _Rendered:
    """What a call returns that renders chat templates by `transformers`.

    Raises:
        TemplateFailed: the template raises whatever it be, or goes beyond the limits.
    """
    try:
        with _RENDERING:
            _limit_environment()
            return _watchdog().watch(render)
    except _LimitReachedError:
        raise TemplateFailed(
            f"it takes longer than {MAX_SECONDS:g} seconds or more than {MAX_BYTES / (1 << 30):g} GiB"
        ) from None
    except Exception as error:  # a template is a program: it raises what it likes
        from jinja2 import TemplateError

        said = str(error)
        own_words = isinstance(error, TemplateError | ValueError | TypeError | LookupError | AttributeError) and said
        kind = type(error).__name__
        raise TemplateFailed(shown(said if own_words else f"{kind}: {said}" if said else kind)) from None


class _Watchdog:
    """A thread that raises an error in another one which takes too long, again and again until that is out."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._watched: int | None = None
        """The thread that renders."""
        self._raised = False
        self._until = 0.0
        self._size = 0
        Thread(self._watch, name="template-watchdog").start()

    def watch(self, render: Callable[[], _Rendered]) -> _Rendered:
        """Call it and watch this thread meanwhile; a render inside of another is watched by the outer one.

        The error can arrive on the way out, too, so there is a second try to leave. It cannot arrive between taking the
        lock and leaving: that is why the lock is taken by itself, not by the condition, whose code is Python's.
        """
        with self._lock:
            inner = self._watched is not None
            if not inner:
                self._watched, self._raised = threading.get_ident(), False
                self._until, self._size = time.monotonic() + MAX_SECONDS, _resident_bytes()
                self._changed.notify()
        if inner:
            return render()
        try:
            try:
                return render()
            finally:
                self._leave()
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            thread, self._watched = self._watched, None
            if thread is not None and self._raised:
                _take_what_was_raised(thread)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched is not None)
            time.sleep(_POLL_SECONDS)
            with self._changed:
                beyond = time.monotonic() > self._until or _resident_bytes() - self._size > MAX_BYTES
                if self._watched is not None and beyond:
                    self._raised = True
                    _raise_in(self._watched, _LimitReachedError)


def _raise_in(thread: int | None, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), ctypes.py_object(error))


def _take_what_was_raised(thread: int | None) -> None:
    """Let an error that was raised too late to arrive in the render arrive here.

    It is not taken back: CPython 3.11 would look for it from then on, and hang under a profiler or debugger.
    """
    with suppress(_LimitReachedError):
        _raise_in(thread, _LimitReachedError)  # in place of one that is under way
        while True:
            pass


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


@cache
def _watchdog_of(process: int) -> _Watchdog:
    return _Watchdog()


def _watchdog() -> _Watchdog:
    # Threads do not survive a fork.
    return _watchdog_of(os.getpid())


_LIMITED_FILTERS = (
    *("batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"),  # their numbers are sizes
    *("format", "join", "replace"),
)
_LONGEST = 10**8
"""Characters that one operation may make."""


def _refuse_number(value: object) -> None:
    if isinstance(value, int) and (value.bit_length() > 64 or abs(value) > MAX_SIZE):
        raise _too_large("a number")


def _refuse_length(length: int) -> None:
    if length > _LONGEST:
        raise _too_large("a text")


def _refuse_wide_fields(text: object) -> None:
    if isinstance(text, str) and _WIDE_FIELD.search(text):
        raise _too_large("the field of a format")


def _too_large(what: str) -> Exception:
    from jinja2.exceptions import SecurityError

    return SecurityError(f"{what} is too large")


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation of a template whose result would be senselessly large.

    Raises:
        SecurityError: it would.
    """
    for value, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int) and value:
            _refuse_number(len(value) * times)
    if operator in ("*", "**"):
        if any(isinstance(one, int) and one.bit_length() > 4096 for one in (left, right)):
            raise _too_large("a number")
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise _too_large("a power")
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _refuse_length((len(left) + len(right)) * (1 if isinstance(left, str) else 8))  # bytes of an element
    elif operator == "%" and isinstance(left, str):
        _refuse_wide_fields(left)
        for value in right if isinstance(right, tuple) else (right,):
            _refuse_number(value)


def check_call(name: str, value: object, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse a filter, or a method of a text or list, that would make something senselessly large of ``value``.

    Raises:
        SecurityError: it would.
    """
    every = [*arguments, *named.values()]
    if name == "join":
        between = next((one for one in every if isinstance(one, str)), "")
        parts = value if hasattr(value, "__len__") else every[0] if every and hasattr(every[0], "__len__") else ()
        _refuse_length(len(parts) * max(len(between), len(str(value)) if isinstance(value, str) else 0))
    elif name == "replace" and isinstance(value, str) and len(every) > 1 and isinstance(every[1], str):
        _refuse_length((len(value) + 1 if not every[0] else value.count(str(every[0]))) * len(every[1]))
    else:
        if name in ("format", "format_map"):
            _refuse_wide_fields(value)
        for one in every:
            _refuse_number(one)


class _Filters(dict[str, Callable[..., Any]]):
    """The filters of an environment, those that are added later included."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _limited(name, function) if name in _LIMITED_FILTERS else function)


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    place = int(hasattr(function, "jinja_pass_arg"))  # Jinja's own argument stands first

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        check_call(name, arguments[place], arguments[place + 1 :], named)
        return function(*arguments, **named)

    return call


@cache
def _limit_environment() -> None:
    """Let `transformers` compile templates in an environment with limits."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    class LimitedEnvironment(ImmutableSandboxedEnvironment):
        """The same sandbox, where nothing of a senseless size is made."""

        intercepted_binops = frozenset(("**", "*", "+", "%"))

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.filters = _Filters(self.filters)
            self.globals["lipsum"] = limited_lipsum

        def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
            """Each render copies them: of one dictionary that takes a fraction of the time it takes of Jinja's two."""
            return {**self.globals, **(d or {})}

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= _LONGEST:
                return left + right  # what templates do most
            check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str | list):
                check_call(__obj.__name__, owner, arguments, named)
            return super().call(__context, __obj, *arguments, **named)

        def wrap_str_format(self, value: Any) -> Any:
            found = super().wrap_str_format(value)
            if found is None:
                return None

            def format_text(*arguments: Any, **named: Any) -> str:
                check_call("format", value.__self__, arguments, named)
                return str(found(*arguments, **named))

            return format_text

    def limited_lipsum(*_: object, **__: object) -> str:
        raise _too_large("a text")

    chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()
