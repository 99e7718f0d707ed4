"""HTML pages that open offline, from the templates beside this file.

base.html holds what all pages share: the head, colours in light and dark, and the data for the page's script.
A page extends it with its own style, body and script. Whatever a label or a document says stays inert: values
are escaped as they are filled in, and the JSON of the script's data holds no "<".
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, *, data: dict[str, Any], **values: Any) -> str:
    """A page as text, from the template of this name.

    data: what the page's script reads, as plain JSON values. values: what the template's body names.
    Raises ValueError for NaN or infinity in the data, which JSON does not have.
    """
    return _environment().get_template(template).render(data=data, **values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("holdall.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
