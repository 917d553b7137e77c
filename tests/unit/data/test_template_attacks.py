"""Chat templates from anywhere: whatever they try, they end soon, in one sentence, and reach nothing."""

from __future__ import annotations

import cProfile
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from jinja2 import Environment

from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer
from nemo_lmpo.data.chat import ChatFormat
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats import template_limits
from nemo_lmpo.formats.template_limits import TemplateFailed, within_limits

LIMITS = f"{template_limits.MAX_SECONDS:g} seconds for a call, {template_limits.MAX_BYTES >> 30} GiB of memory"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
HANGS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text that doubles": "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "list that doubles": "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "macro without end": "{% macro f(n) %}{% for a in [1, 2] %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "two macros": "{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "loop that recurs": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "sorting": "{% for a in range(99999) %}{% set x = range(99999) | sort | list | length %}{% endfor %}",
}
BOMBS = {
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "power of a variable": "{% set a = 10 ** 9 %}{{ 10 ** a }}",
    "powers": "{% set n = namespace(s=9) %}{% for a in range(99) %}{% set n.s = n.s ** 9 %}{% endfor %}",
    "products": "{% set n = namespace(s=9) %}{% for a in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "repeated text": "{{ 'a' * 10 ** 9 }}",
    "repeated from the left": "{{ 10 ** 9 * 'a' }}",
    "repeated list": "{{ [messages] * 10 ** 8 }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "percent format with a star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a format": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "format of a map": "{{ '{:1000000000}'.format_map({}) }}",
    "format as a filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "center as a method": "{{ 'a'.center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "zfill": "{{ '1'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "indent": "{{ 'a\\nb' | indent(10 ** 9) }}",
    "tojson": "{{ messages | tojson(indent=10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "join": "{{ range(99999) | join('a' * 999999) }}",
    "join as a method": "{{ ('a' * 999999).join(range(99999) | map('string') | list) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 999999) }}",
    "replace as a method": "{{ ('a' * 99999).replace('a', 'b' * 999999) }}",
    "replace of nothing": "{{ ('a' * 99999).replace('', 'b' * 999999) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}
ERRORS = {
    "division": "{{ 1 / 0 }}",
    "remainder": "{{ 1 % 0 }}",
    "floor": "{{ 1 // 0 }}",
    "overflow": "{{ 2.0 ** 9999 }}",
    "own words": "{{ raise_exception('\x1b[2Jno\\nerror: forged') }}",
    "own words without end": "{{ raise_exception('a' * 999999) }}",
    "missing": "{{ a.b.c }}",
    "types": "{{ 1 + 'a' }}",
    "lookups": "{{ [][9] | int + {}['a'].b }}",
    "syntax": "{{ 1 +",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "unknown filter": "{{ 1 | nothing }}",
    "unknown test": "{{ 1 is nothing }}",
    "unknown tag": "{% nothing %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as a %}",
    "extends": "{% extends '/etc/passwd' %}",
    "unpacking": "{% for a, b in [1] %}{% endfor %}",
    "calls": "{{ 1() }}",
    "time": "{{ strftime_now(1) }}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch PLACE').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch PLACE') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format by a name": "{{ ('{0.__cla' ~ 'ss__}').format(messages) }}",
    "format of a map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "format as an attribute": "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "attr": "{{ messages | attr('__class__') }}",
    "map of attributes": "{{ messages | map(attribute='__class__') | list }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "raise": "{{ raise_exception.__globals__ }}",
    "messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__.__builtins__.open('PLACE', 'w') }}",
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(template_limits, "MAX_BYTES", 200 << 20)
    # Hypothesis times garbage collections; an error that arrives in its function is dropped there.
    others = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = others


def refused(template: str) -> str:
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(ConfigError) as error:
        ChatFormat(tiny_tokenizer(), template + PLAIN)
    assert time.monotonic() - started < 20  # minutes to years without limits
    assert psutil.Process().memory_info().rss - before < 2 << 30
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 300
    assert text.startswith("data.chat_template cannot render a plain exchange (")
    return text


@pytest.mark.parametrize("name", HANGS)
def test_what_does_not_end_is_ended(name: str) -> None:
    text = refused(HANGS[name])
    assert "longer than 0.5 seconds" in text or "RecursionError" in text or "too large" in text


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_all_memory_is_not_begun(name: str) -> None:
    text = refused(BOMBS[name])
    assert "too large" in text or "OverflowError" in text


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_one_sentence(name: str) -> None:
    refused(ERRORS[name])


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    template = ESCAPES[name].replace("PLACE", str(place))
    try:
        rendered = ChatFormat(tiny_tokenizer(), template + PLAIN).prompt([{"role": "user", "content": "Hello"}])
    except ConfigError as error:
        rendered = str(error)
    assert not place.exists()
    for word in ("<class", "<module", "subprocess", "<built-in", os.environ.get("HOME", "/root")):
        assert word not in rendered


def test_an_ordinary_template_renders_as_without_limits() -> None:
    """What templates of models do: numbers of any size in tools, joins, indents, formats, macros."""
    template = (
        "{%- macro one(a, n) %}{{ a }}={{ n }};{% endmacro %}"
        "{{ one('maximum', 10 ** 15) }}{{ messages | map(attribute='content') | join(', ') }}"
        "{{ {'a': 10 ** 12} | tojson(indent=2) }}"
        "{{ '%05.2f' % 3.14159 }}{{ '{:>8}'.format('a') }}{{ 'ab' | replace('a', 'c') | center(8) }}{{ 'a' * 80 }}"
        "{{ 2 ** 10 + 7 * 6 - 5 // 2 % 3 }}{{ ('a', 'b') + ('c',) }}{{ 'x\\ny' | indent(2) }}{{ 3.14159 | round(2) }}"
    )
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tiny_tokenizer().apply_chat_template
    limited = within_limits(lambda: rendered(messages, chat_template=template, tokenize=False))
    plain = Environment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value, indent=None: __import__("json").dumps(value, indent=indent)
    assert limited == plain.from_string(template).render(messages=messages)


def test_the_policy_names_the_limits() -> None:
    policy = (Path(__file__).resolve().parents[3] / "SECURITY.md").read_text()
    assert LIMITS in " ".join(policy.split())


def test_the_watchdog_leaves_others_alone() -> None:
    """It ends the render of its thread only, and nothing arrives after the end of one."""
    counted = []

    def count() -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            counted.append(1)
            time.sleep(0.01)

    other = threading.Thread(target=count)
    other.start()
    for _ in range(2):
        with pytest.raises(TemplateFailed, match="longer than"):
            within_limits(lambda: [None for _ in iter(int, 1)])
    assert within_limits(lambda: "fine") == "fine"
    time.sleep(0.2)
    other.join()
    assert len(counted) > 50


def test_an_error_on_the_way_out_does_not_leave_the_thread_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it did, the error was raised for ever, in whatever the thread did later."""
    leave, tries = template_limits._Watchdog._leave, []

    def interrupted(watchdog: template_limits._Watchdog) -> None:
        tries.append(watchdog)
        if len(tries) == 1:
            raise template_limits._LimitReachedError
        leave(watchdog)

    monkeypatch.setattr(template_limits._Watchdog, "_leave", interrupted)
    with pytest.raises(TemplateFailed, match="longer than"):
        within_limits(lambda: "fine")
    assert len(tries) == 2
    assert tries[0]._watched is None


def test_renders_that_end_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """About half of them are ended; one in forty left the watchdog stuck, or a lock with it."""
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.02)
    monkeypatch.setattr(template_limits, "_POLL_SECONDS", 0.001)
    until = 0.0

    def render() -> None:
        while time.monotonic() < until:
            pass

    for turn in range(100):
        until = time.monotonic() + 0.0195 + turn % 20 * 0.0001
        with suppress(TemplateFailed):
            within_limits(render)
        assert template_limits._watchdog()._watched is None
    with pytest.raises(TemplateFailed, match="longer than"):
        within_limits(lambda: [None for _ in iter(int, 1)])


def test_every_thread_that_renders_is_watched() -> None:
    failed: list[TemplateFailed] = []

    def render() -> None:
        try:
            within_limits(lambda: [None for _ in iter(int, 1)])
        except TemplateFailed as error:
            failed.append(error)

    rendering = [threading.Thread(target=render, daemon=True) for _ in range(2)]
    for thread in rendering:
        thread.start()
    for thread in rendering:
        thread.join(60)
    assert len(failed) == 2


def test_a_profiler_may_look_at_rendering() -> None:
    """It hung where a render that ended in time left the mark of an error behind that never came."""
    within_limits(lambda: None)
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        assert within_limits(lambda: sum(range(3))) == 3
    finally:
        profiler.disable()
