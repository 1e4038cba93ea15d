"""The encoders that can be exported by name, as text for a terminal and as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import JsonValue

    from fseft_edge.export.zoo import ModelSpec

_UNKNOWN_SHA = "not known here; the bundle records that of the file that was used"


def model_lines(models: Sequence[ModelSpec]) -> Iterator[str]:
    """Yield a paragraph for each model: what it is, what to fetch, and how to export it."""
    for number, model in enumerate(models):
        if number:
            yield ""
        yield f"{model.name}: {model.origin}"
        for word, text in _facts(model):
            yield from _wrapped(word, text)


def model_entries(models: Sequence[ModelSpec]) -> list[dict[str, JsonValue]]:
    """Return the same as plain data; what is not known, or does not apply, is None."""
    return [
        {
            "name": model.name,
            "origin": model.origin,
            "repository": model.repository or None,
            "licence": model.licence or None,
            "file": model.file or None,
            "sha256": model.sha256,
            "built_in": model.built_in is not None,
            "published": None if model.published is None else model.published.model_dump(mode="json"),
        }
        for model in models
    ]


def _wrapped(word: str, text: str) -> list[str]:
    """Return a fact as lines; a command stays on one, to be copied."""
    start = f"    {word:<9} "
    if word == "export":
        return [start + text]
    return textwrap.wrap(text, 110, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


def _organs(model: ModelSpec) -> str:
    """Return what the head knows; some releases are to be had with and without one that can be used."""
    organs = model.published.organs if model.published is not None else ()
    if not organs:
        return "none by itself: adapt it"
    always = model.layout is None or model.layout.needs_classifier
    listed = ", ".join(organs)
    return (
        listed
        if always
        else f"none by itself, as the authors' file makes its head from texts; with a 1x1x1 one: {listed}"
    )


def _facts(model: ModelSpec) -> Iterator[tuple[str, str]]:
    published = model.published
    if published is not None:
        window = " x ".join(map(str, published.window))
        low, high = published.preprocessing.hu_window
        spacing = " x ".join(f"{step:g}" for step in published.preprocessing.spacing)
        yield "network", f"{published.architecture}, {window} voxels of {spacing} mm, HU {low:g} to {high:g}"
        yield "organs", _organs(model)
        yield "authors", model.repository
        yield "file", f"{model.file}; fetch it from the authors and keep it where you like"
        yield "sha256", model.sha256 or _UNKNOWN_SHA
    if model.licence:
        yield "licence", model.licence
    if model.built_in is not None:
        yield "export", f"fseft-edge export --output {model.name}.encoder"
    elif published is not None:
        yield "export", f"fseft-edge export {model.file} --model {model.name} --output {model.name}.encoder"
    else:
        yield "export", "fseft-edge export FILE [--description FILE.toml] --output NAME.encoder"
