"""HTML pages from Jinja2 templates."""

from __future__ import annotations

from fseft_edge._version import __version__


def rendered(package: str, template: str, **values: object) -> str:
    """Return a page from a template. Every value is escaped, and a missing value is an error.

    Args:
        package: package whose folder ``templates`` contains the template. Templates may also use those of this package.
        template: name of the template file.
        values: values of the names in the template.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - only pages need it

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("fseft_edge.report")]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(version=__version__, **values)
