"""The service's API as a page, docs/api.md, from the OpenAPI that the service answers with.

python -m tools.api_page          # the page
python -m tools.api_page --write  # write docs/api.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from patchpipe.serve.settings import Settings
from patchpipe.serve.web.app import make_app
from patchpipe.serve.web.described import REFUSALS, Problem

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HOST = "localhost:8000"
_TEXT = "-H 'content-type: application/json'"
CURLS: Mapping[tuple[str, str], str] = {
    ("post", "/v1/images/generations"): (
        f"curl -s {HOST}/v1/images/generations {_TEXT} \\\n"
        '  -d \'{"prompt": "red heart, flat style", "seed": 1, "num_inference_steps": 20}\''
    ),
    ("post", "/v1/images/edits"): (
        f"curl -s {HOST}/v1/images/edits -F image=@heart.png -F prompt='a blue heart' -F strength=0.6"
    ),
    ("post", "/v1/videos"): (
        f"curl -s {HOST}/v1/videos {_TEXT} \\\n"
        '  -d \'{"model": "wan", "prompt": "waves at dusk", "seconds": 2, "deadline_s": 600}\''
    ),
    ("get", "/v1/videos"): f"curl -s '{HOST}/v1/videos?limit=5&order=desc'",
    ("get", "/v1/videos/{video_id}"): f"curl -s {HOST}/v1/videos/$VIDEO",
    ("delete", "/v1/videos/{video_id}"): f"curl -s -X DELETE {HOST}/v1/videos/$VIDEO",
    ("get", "/v1/videos/{video_id}/content"): f"curl -s {HOST}/v1/videos/$VIDEO/content -o waves.mp4",
    ("get", "/v1/models"): f"curl -s {HOST}/v1/models",
    ("get", "/v1/models/{name}"): f"curl -s {HOST}/v1/models/wan",
    ("get", "/v1/state"): f"curl -s {HOST}/v1/state",
    ("get", "/healthz"): f"curl -s {HOST}/healthz",
    ("get", "/readyz"): f"curl -s {HOST}/readyz",
    ("get", "/metrics"): f"curl -s {HOST}/metrics",
}
FIELDS = ("field", "type and limits", "default", "what")
Row = tuple[str, ...]
STREAM = """## Events of a stream

With `"stream": true` the answer is `text/event-stream`. Each event is JSON with a `type`; NAME is
`image_generation` or `image_edit`.

| event | what |
| --- | --- |
| `NAME.partial_image` | a picture on the way: `b64_json`, `partial_image_index` |
| `NAME.completed` | the picture: `b64_json`, `seed`, `seconds` |
| `patchpipe.progress` | with `"progress": true`, every step: `step`, `total` |
| `error` | an error, after which nothing comes |
"""
HEAD = """# The service's API

Every route of `patchpipe serve`, its fields with their types and limits, its answers and its errors. `python -m
tools.api_page --write` writes this page from the service's own OpenAPI, with the limits it has by default. A running
service tells its own at `GET /openapi.json`. [Serving](serving.md) says what the service does with all this.

- The routes below `/v1/images`, `/v1/videos` and `/v1/models` are OpenAI's, so its client works unchanged. What it does
  not know goes into its `extra_body`.
- Where the service has keys, `/v1/…` and `/metrics` need `-H 'authorization: Bearer KEY'`.
- A field that is left out, or `null` in JSON, has its default. The defaults of steps, sizes, guidance and frames are
  the model's, from its `call.json` or its pipeline. An unknown field is an error.
- In a form every value is text; a list is sent as `lora[]`, a field inside another as `lora[name]`.
"""


def described() -> dict[str, Any]:
    """What a service with the usual settings says of itself."""
    return make_app(SimpleNamespace(settings=Settings())).openapi()  # type: ignore[arg-type]


def page(told: Mapping[str, Any]) -> str:
    """The page.

    Args:
        told: The service's OpenAPI.
    """
    routes = [(method, path, one) for path, found in told["paths"].items() for method, one in found.items()]
    bodies = {(method, path): rows for method, path, one in routes if (rows := _body(one))}
    common = [row for row in next(iter(bodies.values())) if all(row in rows for rows in bodies.values())]
    parts = [
        HEAD,
        *(_route(*route, [row for row in bodies.get(route[:2], ()) if row not in common]) for route in routes),
    ]
    shared = ["## Fields that pictures and clips share", "", *_table(FIELDS, common)]
    return "\n".join([*parts, "\n".join(shared), STREAM, _objects(told), _errors()])


def _route(method: str, path: str, operation: Mapping[str, Any], fields: list[Row]) -> str:
    lines = [
        f"## `{method.upper()} {path}`",
        "",
        operation["description"],
        "",
        "```bash",
        CURLS[method, path],
        "```",
        "",
    ]
    rows = [_row(one["name"], one["schema"], one["in"], one["required"]) for one in operation.get("parameters", ())]
    if rows:
        lines += _table(("parameter", *FIELDS[1:]), rows)
    if "requestBody" in operation:
        kinds = " or ".join(f"`{kind}`" for kind in operation["requestBody"]["content"])
        shared = "[fields that pictures and clips share](#fields-that-pictures-and-clips-share)"
        lines += [f"Body: {kinds}. Beside the {shared}:", "", *_table(FIELDS, fields)]
    return "\n".join([*lines, *_answers(operation["responses"])])


def _body(operation: Mapping[str, Any]) -> list[Row]:
    """A row for each field of a body; what only a form has comes last."""
    content, rows = operation.get("requestBody", {}).get("content", {}), dict[str, Row]()
    for kind in sorted(content, key=lambda kind: kind != "application/json"):
        schema = content[kind]["schema"]
        for name, field in schema["properties"].items():
            rows.setdefault(name, _row(name, field, "", name in schema.get("required", ())))
    return list(rows.values())


def _row(name: str, field: Mapping[str, Any], what: str, needed: bool) -> Row:
    usual = field.get("default")
    default = "needed" if needed else "" if usual is None else f"`{usual}`"
    text = field.get("description") or ("In the path." if what == "path" else "")
    return f"`{name}`", _type(field), default, text


def _type(field: Mapping[str, Any]) -> str:
    """A schema's type and limits in a few words."""
    several = [one for one in field.get("anyOf", ()) if one != {"type": "null"}]
    if several:
        return " or ".join(dict.fromkeys(_type(one) for one in several))
    if "$ref" in field:
        return _link(field["$ref"].split("/")[-1])
    if "enum" in field or "const" in field:
        return " or ".join(f"`{_json(one)}`" for one in field.get("enum", [field.get("const")]))
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {_type(field['items'])}{_limits(field)}"
    if field.get("format") == "binary":
        return "file"
    return f"{kind}{_limits(field)}"


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(field: Mapping[str, Any]) -> str:
    """What a value must be beside its type."""
    least, most = field.get("minimum", field.get("minItems")), field.get("maximum", field.get("maxItems"))
    said = []
    if least is not None and most is not None:
        said.append(f"{_number(least)} to {_number(most)}")
    elif least is not None:
        said.append(f"{_number(least)} or more")
    if "exclusiveMinimum" in field:
        said.append(f"above {_number(field['exclusiveMinimum'])}" + (f", to {_number(most)}" if most else ""))
    if "multipleOf" in field:
        said.append(f"a multiple of {field['multipleOf']}")
    if "maxLength" in field:
        said.append(f"to {_number(field['maxLength'])} characters")
    return f", {', '.join(said)}" if said else ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _answers(responses: Mapping[str, Any]) -> list[str]:
    good: dict[str, list[str]] = {}
    for status, one in responses.items():
        for kind, said in one["content"].items():
            name = said["schema"].get("$ref", "").split("/")[-1]
            if name != "Problems":
                good.setdefault(f"`{kind}`" + (f", {_link(name)}" if name else ""), []).append(status)
    bad = sorted(status for status in responses if not any(status in found for found in good.values()))
    lines = [f"- {', '.join(f'`{status}`' for status in statuses)}: {what}" for what, statuses in good.items()]
    return [*lines, f"- [errors](#errors): {', '.join(f'`{status}`' for status in bad)}", ""]


def _objects(told: Mapping[str, Any]) -> str:
    """The answers' objects and their fields."""
    lines = ["## Objects", ""]
    for name, schema in told["components"]["schemas"].items():
        if name in ("Problem", "Problems"):
            continue
        fields = schema["properties"].items()
        rows = [(f"`{field}`", _type(one) + _or_null(one), one.get("description", "")) for field, one in fields]
        lines += [f"### {name}", "", schema["description"], "", *_table(("field", "type", "what"), rows)]
    return "\n".join(lines)


def _or_null(field: Mapping[str, Any]) -> str:
    return " or null" if {"type": "null"} in field.get("anyOf", ()) else ""


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _errors() -> str:
    fields = ", ".join(f"`{name}`" for name in Problem.model_fields)
    lines = [
        "## Errors",
        "",
        f'Every error is `{{"error": {{…}}}}` with {fields}.',
        "`param` is the field at fault, `code` a word for programs.",
        "`Retry-After` says after how many seconds another try may do better; `x-should-retry: false` that none will.",
        "",
    ]
    return "\n".join(
        [*lines, *_table(("status", "when"), [(f"`{status}`", text) for status, text in REFUSALS.items()])]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *rows)]
    return [line.replace("|  |", "| |") for line in lines] + [""]


def main() -> None:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/api.md")
    text = page(described())
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
