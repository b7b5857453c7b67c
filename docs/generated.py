"""The parts of the docs that are written from the code: `python -m docs.generated` writes them into their pages.

A page holds each part between `<!-- generated: NAME -->` and `<!-- end -->`. A test holds the pages against the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main

from phi3_dist.cli import app
from phi3_dist.config.schema import RunConfig
from phi3_dist.planning.support import matrix_markdown

DOCS = Path(__file__).resolve().parent
PART = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# --- the run file -------------------------------------------------------------------------------------------------


def run_file() -> str:
    """Every section and key of a run file, with what it takes, its default and its docstring."""
    schema = RunConfig.model_json_schema()
    sections = [(name, spec) for name, spec in schema["properties"].items() if _model(spec, schema)]
    top = [(name, spec) for name, spec in schema["properties"].items() if not _model(spec, schema)]
    lines = ["## Outside the sections", "", *(line for name, spec in top for line in _key("", name, spec, schema))]
    for name, spec in sections:
        lines += [f"## The section {name}", "", *_section(f"{name}.", schema["$defs"][_model(spec, schema)], schema)]
    return "\n".join(lines)


def _section(prefix: str, model: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    for name, spec in model["properties"].items():
        below = _model(spec, schema)
        yield from _key(prefix, name, spec, schema, required=name in model.get("required", ()))
        if below:
            yield from _section(f"{prefix}{name}.", schema["$defs"][below], schema)


def _key(
    prefix: str, name: str, spec: dict[str, Any], schema: dict[str, Any], *, required: bool = False
) -> Iterator[str]:
    default = "required" if required else f"default: {_value(spec.get('default'))}"
    takes = "a section" if _model(spec, schema) else _takes(spec, schema)
    yield from (f"### {prefix}{name}", "", f"{takes} · {'each key has a default' if _model(spec, schema) else default}")
    yield from ("", _escaped(" ".join(spec.get("description", "").split())), "")


def _model(spec: dict[str, Any], schema: dict[str, Any]) -> str:
    """Name of the section that a property holds; empty where it holds a value."""
    name = str(spec.get("$ref", "")).rpartition("/")[2]
    return name if name in schema["$defs"] and "properties" in schema["$defs"][name] else ""


def _value(default: Any) -> str:
    if default is None or default in ("", [], {}):
        return "none" if default is None else "empty"
    shown = {True: "true", False: "false"}.get(default) if isinstance(default, bool) else None
    return f"`{shown or default}`"


_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
_LIMITS = (("minimum", "from"), ("exclusiveMinimum", "above"), ("exclusiveMaximum", "below"))


def _takes(spec: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(_takes(one, schema) for one in spec["anyOf"] if one.get("type") != "null")
    if "$ref" in spec:
        keys = schema["$defs"][spec["$ref"].rpartition("/")[2]]["properties"]
        return "`{" + ", ".join(keys) + "}`"
    if "enum" in spec or "const" in spec:
        return ", ".join(f"`{value}`" for value in spec.get("enum", [spec.get("const")]))
    if spec.get("type") == "array":
        inner = _takes(spec["items"], schema) if "items" in spec else ""
        return f"a list of {inner}" if inner else f"a list of {len(spec['prefixItems'])} numbers"
    if spec.get("type") == "object":
        return f"a mapping from a name to a {_takes(spec['additionalProperties'], schema)}"
    limits = [f"{word} {spec[key]}" for key, word in _LIMITS if key in spec]
    return " ".join([_KINDS[spec["type"]], *limits])


# --- the command line ---------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every verb: a table of all, then each with its arguments and options."""
    verbs = list(verbs_of(typer.main.get_command(app), "phi3-dist"))
    lines = ["| verb | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {_escaped(_paragraphs(verb)[0])} |" for name, verb in verbs]
    for name, verb in verbs:
        lines += ["", f"## {name}", "", "\n\n".join(map(_escaped, _paragraphs(verb))), ""]
        lines += ["```text", _usage(name, verb), "```", "", *_parameters(verb)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def verbs_of(group: Any, above: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs_of(command, f"{above} {name}")
        else:
            yield f"{above} {name}", command


def _paragraphs(verb: Any) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", verb.help or "")]


def _usage(name: str, verb: Any) -> str:
    words = [_argument(one) for one in verb.params if one.param_type_name == "argument"]
    if verb.context_settings.get("ignore_unknown_options"):
        words.append("OPTIONS...")
    elif any(one.param_type_name == "option" for one in verb.params):
        words.append("[OPTIONS]")
    return " ".join([name, *words])


def _argument(one: Any) -> str:
    name = str(one.metavar or one.name.upper())
    return name if one.required or name.startswith("[") else f"[{name}]"


def _parameters(verb: Any) -> list[str]:
    rows = ["| argument or option | what it is | default |", "|---|---|---|"]
    for one in verb.params:
        if getattr(one, "hidden", False):
            continue
        words = [_argument(one)] if one.param_type_name == "argument" else [*one.opts, *one.secondary_opts]
        what = _escaped(" ".join((one.help or "").split()))
        given = one.default if isinstance(one.default, (str, int, float, Path)) and one.default is not False else ""
        shown = "required" if one.required else f"`{given}`" if str(given) else ""
        rows.append(f"| {' '.join(f'`{_bars(word)}`' for word in words)} | {what} | {shown} |")
    return rows if len(rows) > 2 else []


def _bars(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    """Markdown of a help text: bars and angle brackets outside code are text."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(_bars(part if part.startswith("`") else re.sub(r"([<>*_\[\]{}])", r"\\\1", part)) for part in parts)


# --- the pages ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "run file": run_file,
    "command line": command_line,
    "strategies": matrix_markdown,
}


def filled(page: str) -> str:
    """The text of a page with its generated parts as the code has them now."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]().strip()}\n\n{found[3]}", page)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"updated: docs/{path.name}\n")


if __name__ == "__main__":
    main()
