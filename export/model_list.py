"""List of the models that can be exported, as text for a terminal and as plain data for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fseft_edge.export.zoo import described

if TYPE_CHECKING:
    from pydantic import JsonValue

    from fseft_edge.export.zoo import ModelSpec

_UNKNOWN_SHA = "unknown; the bundle records the sha256 of the file that you export"


def model_lines(models: Sequence[ModelSpec]) -> Iterator[str]:
    """Yield the lines of one paragraph per model: description, file to download, command for the export."""
    for number, model in enumerate(models):
        if number:
            yield ""
        yield f"{model.name}: {model.origin}"
        for word, text in _facts(model):
            yield from _wrapped(word, text)


def model_entries(models: Sequence[ModelSpec]) -> list[dict[str, JsonValue]]:
    """Return the list of models as plain data; None means that a value is unknown or does not apply."""
    return [
        {
            "name": model.name,
            "origin": model.origin,
            "repository": model.repository or None,
            "licence": model.licence or None,
            "file": model.file or None,
            "sha256": model.sha256,
            "built_in": model.built_in is not None,
            "organs": None if (description := described(model)) is None else list(description.organs),
            "published": None if model.published is None else model.published.model_dump(mode="json"),
        }
        for model in models
    ]


def _wrapped(word: str, text: str) -> list[str]:
    """Return the wrapped lines of one entry; a command stays on one line, so that it can be copied."""
    start = f"    {word:<9} "
    if word == "export":
        return [start + text]
    return textwrap.wrap(text, 110, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


def _organs(model: ModelSpec, organs: Sequence[str]) -> str:
    """Return the organs that the head classifies. Some releases exist with and without a usable head."""
    if not organs:
        return "none: train an adapter for each organ"
    always = model.layout is None or model.layout.needs_classifier
    listed = ", ".join(organs)
    return (
        listed
        if always
        else f"none if the file computes its head from texts, as the authors' file does; with a 1x1x1 head: {listed}"
    )


def _facts(model: ModelSpec) -> Iterator[tuple[str, str]]:
    description = described(model)
    if description is not None:
        window = " x ".join(map(str, description.window))
        low, high = description.preprocessing.hu_window
        spacing = " x ".join(f"{step:g}" for step in description.preprocessing.spacing)
        yield "network", f"{description.architecture}, {window} voxels of {spacing} mm, HU {low:g} to {high:g}"
        yield "organs", _organs(model, description.organs)
    if model.published is not None:
        yield "authors", model.repository
        yield "file", f"{model.file}; download it from the authors into any folder"
        yield "sha256", model.sha256 or _UNKNOWN_SHA
    if model.licence:
        yield "licence", model.licence
    if model.built_in is not None:
        yield "export", f"fseft-edge export --output {model.name}.encoder"
    elif model.published is not None:
        yield "export", f"fseft-edge export {model.file} --model {model.name} --output {model.name}.encoder"
    else:
        yield "export", "fseft-edge export FILE [--description FILE.toml] --output NAME.encoder"
