"""The licences of what the locks pin, and the page that lists them: `python -m requirements.licences`.

A licence is an SPDX expression, as the distribution's own metadata says it: by `License-Expression`, else by its
classifier or its `License` field, which the tables below read. What says nothing that they know has an entry of its
own, made by reading its licence file. A licence that is not in ALLOWED keeps the page from being written.
"""

from __future__ import annotations

import functools
import sys
from importlib.metadata import PackageMetadata, metadata
from typing import Final

from license_expression import ExpressionError, Licensing, get_spdx_licensing
from packaging.utils import canonicalize_name

from requirements.locks import DEV, ROOT, RUNTIME, Pin, read

PAGE: Final = ROOT / "docs" / "licences.md"

# Of what the image holds: licences that ask for no more than their notice, and the MPL, which asks for the sources of
# its own files, unchanged here.
ALLOWED: Final = frozenset({"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0"})
# Besides, of what builds and tests, which is given to nobody: programs and a database client that are run as they are.
ALLOWED_IN_DEVELOPMENT: Final = ALLOWED | {"GPL-3.0-only", "LGPL-3.0-only", "MIT-CMU"}

_CLASSIFIERS: Final = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}
# What the field says where it is no SPDX identifier.
_FIELD: Final = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "GPL-3.0": "GPL-3.0-only",
    "MIT License": "MIT",
    "PSFL": "PSF-2.0",
}
# By their licence files: "BSD License" does not say which, and some say nothing at all.
_READ: Final = {
    "google-re2": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "pgserver": "Apache-2.0",
    "uvloop": "Apache-2.0 OR MIT",
}


class UnknownLicence(Exception):
    """A distribution's licence is not known, or not allowed; the message says what to do."""


@functools.cache
def _spdx() -> Licensing:
    # Reading SPDX's list takes a second.
    return get_spdx_licensing()


def expression(about: PackageMetadata) -> str:
    """The SPDX expression of a distribution's metadata. Raises UnknownLicence."""
    name = canonicalize_name(about["Name"])
    field = _field(about, "License")
    classified = {_CLASSIFIERS[line] for line in about.get_all("Classifier") or [] if line in _CLASSIFIERS}
    said = _READ.get(name) or _field(about, "License-Expression") or _FIELD.get(field)
    if said is None and len(classified) == 1:
        (said,) = classified
    said = said or field
    if not said or _spdx().validate(said).errors:
        raise UnknownLicence(
            f"{name}: its metadata names no licence that is known: read its licence file, and say in "
            "requirements/licences.py which it is"
        )
    return str(_spdx().parse(said))


def _field(about: PackageMetadata, name: str) -> str:
    return (about[name] if name in about else "").strip()  # noqa: SIM401  # it has no get


def judge(name: str, licence: str, allowed: frozenset[str]) -> None:
    """Raise UnknownLicence where an expression cannot be met with the licences allowed."""
    try:
        parsed = _spdx().parse(licence, validate=True)
    except ExpressionError as error:
        raise UnknownLicence(f"{name}: {licence!r} is no SPDX expression") from error
    given = {symbol: _spdx().TRUE for symbol in parsed.symbols if symbol.key in allowed}
    if parsed.subs(given, simplify=True) != _spdx().TRUE:
        raise UnknownLicence(
            f"{name}: its licence, {licence}, is not among those allowed: do without it, or decide "
            "that it may be, in requirements/licences.py"
        )


def of(pins: tuple[Pin, ...], allowed: frozenset[str]) -> dict[str, str]:
    """The licence of each distribution that Linux installs, by name; all of them are installed here.

    Raises UnknownLicence.
    """
    found = {pin.name: expression(metadata(pin.name)) for pin in pins if pin.installed}
    for name, licence in found.items():
        judge(name, licence, allowed)
    return found


def page() -> str:
    """docs/licences.md, of the locks as they are. Raises UnknownLicence."""
    runtime = of(read(RUNTIME.read_text()).pins, ALLOWED)
    development = of(read(DEV.read_text()).pins, ALLOWED_IN_DEVELOPMENT)
    development = {name: licence for name, licence in development.items() if name not in runtime}
    return _PAGE.format(runtime=_table(runtime), development=_table(development))


def _table(licences: dict[str, str]) -> str:
    rows = [f"| {name} | {licence} |" for name, licence in sorted(licences.items())]
    return "\n".join(["| distribution | licence |", "|---|---|", *rows])


_PAGE: Final = """# Licences of dependencies

Made by `make lock`; a test holds it against the locks and what is installed. The provider itself is under the
[Apache License 2.0](../LICENSE). A licence that is not on the list in `requirements/licences.py` fails the build.

## In the image

{runtime}

Some wheels bring libraries in C or C++ of their own, under the licences that these wheels come with: OpenSSL
(cryptography), BoringSSL, Abseil and c-ares (grpcio), Abseil (google-re2), libuv (uvloop), llhttp and http-parser
(httptools), libyaml (PyYAML). The base image's Python and Debian packages are not of this list; their licences are in
the image, under `/usr/share/doc`.

## For building and testing

They are run on the way and given to nobody.

{development}
"""


def main() -> int:
    """Write the page; 1, and a line that says why, where a licence is unknown or not allowed."""
    try:
        PAGE.write_text(page())
    except UnknownLicence as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
