"""The API's page says what the service says, and its examples are requests that the service takes."""

from __future__ import annotations

import itertools
import json
import shlex
from typing import Any

import pytest

pytest.importorskip("fastapi")

from patchpipe.serve.web.bodies import ClipAsked, EditAsked, PictureAsked
from tools.api_page import CURLS, PAGE, described, page

BODIES = {
    ("post", "/v1/images/generations"): PictureAsked,
    ("post", "/v1/images/edits"): EditAsked,
    ("post", "/v1/videos"): ClipAsked,
}


def test_the_page_is_what_the_service_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(described()), "python -m tools.api_page --write"


def test_every_route_has_an_example() -> None:
    routes = {(method, path) for path, found in described()["paths"].items() for method in found}
    assert routes == set(CURLS)


@pytest.mark.parametrize("route", BODIES, ids=lambda route: route[1])
def test_the_examples_are_taken(route: tuple[str, str]) -> None:
    words = shlex.split(CURLS[route].replace("\\\n", " "))
    sent: dict[str, Any] = {}
    for option, value in itertools.pairwise(words):
        if option == "-d":
            sent = json.loads(value)
        if option == "-F" and "=@" not in value:
            name, _, text = value.partition("=")
            sent[name] = text
    assert sent
    BODIES[route].model_validate(sent)
