#!/usr/bin/env python
"""Write `docs/api.md` from the docstrings of the public names below: `make api`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
PUBLIC: dict[str, tuple[str, ...]] = {
    "Train": (
        "nemo_lmpo.config.recipe.load_recipe",
        "nemo_lmpo.training.run",
        "nemo_lmpo.training.session.open_session",
        "nemo_lmpo.training.preflight.preflight",
        "nemo_lmpo.training.nemo_plugin.MegatronGPTLMPOModel",
    ),
    "Losses": (
        "nemo_lmpo.loss.registry.build_loss",
        "nemo_lmpo.loss.registry.PreferenceLoss",
        "nemo_lmpo.loss.interface.LossInputs",
        "nemo_lmpo.loss.interface.LossOutputs",
    ),
    "Data": (
        "nemo_lmpo.data.preference.load_preference_dataset",
        "nemo_lmpo.data.tokenizer.load_tokenizer",
    ),
    "Models on disk": (
        "nemo_lmpo.formats.find_model.find_model",
        "nemo_lmpo.formats.model_files.open_model",
        "nemo_lmpo.formats.conversion.plan",
        "nemo_lmpo.formats.conversion.write_huggingface",
        "nemo_lmpo.formats.conversion.write_nemo",
        "nemo_lmpo.model.load_weights.load_model_weights",
    ),
    "Answers": (
        "nemo_lmpo.answers.engine.load_generator",
        "nemo_lmpo.answers.engine.Generator",
        "nemo_lmpo.answers.sampling.Sampling",
    ),
    "Out of a run": ("nemo_lmpo.report.page.write_report", "nemo_lmpo.export.write.export_run"),
}


Member = Any
"""An object of griffe, or an alias that has the attributes of the object that it stands for."""


def page() -> str:
    """The whole page."""
    package = griffe.load("nemo_lmpo", search_paths=[ROOT], submodules=True)
    lines = [
        "# API",
        "",
        "Generated from docstrings by `make api`. These names are public: they change with a line in the changelog.",
    ]
    for title, names in PUBLIC.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += entry(name, package[name.removeprefix("nemo_lmpo.")])
    return "\n".join(lines) + "\n"


def entry(name: str, found: Member) -> list[str]:
    """One name: signature and docstring, and of a class its public methods."""
    lines = ["", f"### `{name}`", "", "```python", _signature(found), "```", "", _text(found)]
    if found.is_class:
        for method in found.members.values():
            if method.is_function and not method.name.startswith("_") and method.has_docstring:
                lines += ["", f"#### `{method.name}`", "", "```python", _signature(method), "```", "", _text(method)]
    return lines


def _signature(found: Member) -> str:
    if found.is_class:
        constructor = found.members.get("__init__")
        given = _parameters(constructor) if constructor is not None else [_field(each) for each in _fields(found)]
        return f"class {found.name}({', '.join(given)})"
    returns = f" -> {found.returns}" if found.returns is not None else ""
    return f"def {found.name}({', '.join(_parameters(found))}){returns}"


def _parameters(function: Member) -> list[str]:
    text, keyword_only = [], False
    for parameter in function.parameters:
        if parameter.name == "self":
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            text.append("*")
            keyword_only = True
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
        keyword_only |= parameter.kind is griffe.ParameterKind.var_positional
        shown = stars.get(parameter.kind, "") + parameter.name
        shown += f": {parameter.annotation}" if parameter.annotation is not None else ""
        has_default = parameter.default is not None and parameter.kind not in stars
        text.append(shown + (f" = {parameter.default}" if has_default else ""))
    return text


def _fields(found: Member) -> list[Member]:
    dataclass = any("dataclass" in str(decorator.value) for decorator in found.decorators)
    return [each for each in found.members.values() if each.is_attribute and each.annotation] if dataclass else []


def _field(found: Member) -> str:
    return f"{found.name}: {found.annotation}" + (f" = {found.value}" if found.value is not None else "")


def _text(found: Member) -> str:
    """The docstring as Markdown: roles as code, sections as bold lines with lists."""
    text = found.docstring.value if found.docstring else ""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text).replace("``", "`")
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and re.match(r"    \S", line) and line.strip().partition(":")[1]:
            name, _, rest = line.strip().partition(":")
            lines.append(f"- `{name}`:{rest}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section &= not line.strip()
            lines.append(line)
    return "\n".join(lines).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
