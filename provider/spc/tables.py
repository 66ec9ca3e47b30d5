"""What the fields of a class are called and mean: one table that parser, JSON Schema and README are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from provider.spc.model import Encoding, Format

# JSON Schema's words for what YAML text may hold in a field that takes text: it is taken as it is written.
_TEXT: Final[Mapping[str, Any]] = {"type": ["string", "number", "boolean", "null"]}
_REQUIRED: Final[Mapping[str, Any]] = {"type": ["string", "number", "boolean"], "minLength": 1}
_TEXTS: Final[Mapping[str, Any]] = {"type": ["array", "null"], "items": _REQUIRED}
_DURATION: Final[Mapping[str, Any]] = {
    "type": ["string", "integer", "null"],
    "pattern": r"^(0|([0-9]+(\.[0-9]*)?(ns|us|µs|μs|ms|s|m|h))+)?$",
    "maximum": 0,
    "minimum": 0,
}
_BOOLEAN: Final[Mapping[str, Any]] = {"enum": [True, False, None, "true", "false"]}
_TEXT_ONLY: Final[Mapping[str, Any]] = {"type": "string"}
_ANY: Final[Mapping[str, Any]] = {}


REQUIRED: Final = "required"


@dataclass(frozen=True, slots=True)
class Field:
    """A field: its name, what JSON Schema says of its value, its default and its meaning in Markdown."""

    name: str
    schema: Mapping[str, Any]
    default: str
    meaning: str


def _words(kind: type[Enum], *more: str) -> Mapping[str, Any]:
    return {"enum": [*(member.value for member in kind), *more, None]}


_SECRET_PATH: Final = Field(
    "secretPath",
    _REQUIRED,
    REQUIRED,
    "API path: `secret/data/app` for KV version 2; `/v1/` in front and `/` at the end are allowed, a query "
    "(`?version=3`) too",
)
_METHOD: Final = Field(
    "method",
    {
        "type": ["string", "null"],
        "pattern": "^[A-Za-z]{0,32}$",
        "not": {"enum": ["CONNECT", "TRACE", "OPTIONS", "HEAD", "connect", "trace", "options", "head"]},
    },
    "`GET`",
    "HTTP method, but for `CONNECT`, `TRACE`, `OPTIONS` and `HEAD`",
)
_SECRET_ARGS: Final = Field("secretArgs", _ANY, "", "request body, any YAML; numbers and booleans stay what they are")

SOURCE_FIELDS: Final = (
    _SECRET_PATH,
    _METHOD,
    _SECRET_ARGS,
    Field("jmesPath", _TEXT, "", "what of the data the alias stands for; all of it by default"),
)
PASSWORD_FIELDS: Final = (
    _SECRET_PATH,
    Field("secretKey", _REQUIRED, REQUIRED, "key in the response's data that holds the password"),
)


def map_of(fields: tuple[Field, ...]) -> dict[str, Any]:
    """JSON Schema of a map with these fields and no others."""
    return {
        "type": "object",
        "properties": {field.name: described(field) for field in fields},
        "required": [field.name for field in fields if field.default == REQUIRED],
        "additionalProperties": False,
    }


def described(field: Field) -> dict[str, Any]:
    """JSON Schema of a field's value."""
    return {**field.schema, "description": field.meaning.replace("`", "")}


PARAMETERS: Final = (
    Field("roleName", _TEXT_ONLY, REQUIRED, "the Vault role to log in with"),
    Field("objects", _TEXT_ONLY, REQUIRED, "YAML list of objects, in one string: see objects.schema.json"),
    Field("vaultAddress", _TEXT_ONLY, "", "https://host:port, http://host:port or unix:///path"),
    Field("vaultNamespace", _TEXT_ONLY, "", "Vault namespace"),
    Field("vaultAuthMountPath", _TEXT_ONLY, "", "where the kubernetes or jwt method is mounted"),
    Field("vaultKubernetesMountPath", _TEXT_ONLY, "", "older name of vaultAuthMountPath"),
    Field("audience", _TEXT_ONLY, "", "whom the login token is for"),
    Field("vaultCACertPath", _TEXT_ONLY, "", "CA certificates (PEM), a file in the provider's container"),
    Field("vaultCADirectory", _TEXT_ONLY, "", "directory of such files"),
    Field("vaultTLSServerName", _TEXT_ONLY, "", "the name that the server's certificate has to be for"),
    Field("vaultTLSClientCertPath", _TEXT_ONLY, "", "client certificate (PEM), a file in the provider's container"),
    Field("vaultTLSClientKeyPath", _TEXT_ONLY, "", "its private key"),
    Field(
        "vaultSkipTLSVerify",
        {"enum": ["", "1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"]},
        "",
        "true: do not verify the server",
    ),
    Field(
        "refreshAfter", {"type": "string", "pattern": _DURATION["pattern"]}, "", "how old a secret from memory may be"
    ),
)

OBJECT_FIELDS: Final = (
    Field("objectName", _REQUIRED, REQUIRED, "the file's path in the volume; the directory's with `secretKey: \"*\"`"),
    _SECRET_PATH,
    Field(
        "secretKey",
        _TEXT,
        "",
        'key in the response\'s data; `"*"`: a file for each key. Absent: all of the response, as `format` says',
    ),
    _METHOD,
    _SECRET_ARGS,
    Field(
        "filePermission",
        {"type": ["string", "integer", "null"], "pattern": "^((0o)?[0-7]{1,4})?$", "minimum": 0, "maximum": 777},
        "the driver's, `0644`",
        'octal: `0600`, `0o600` or `"0600"`',
    ),
    Field(
        "encoding",
        {"type": ["string", "null"], "pattern": "^([Uu][Tt][Ff]-?8|[Bb][Aa][Ss][Ee]64|[Hh][Ee][Xx])?$"},
        "`utf-8`",
        f"how the stored value is to be decoded: {', '.join(f'`{member.value}`' for member in Encoding)}",
    ),
    Field(
        "lease",
        {"enum": ["keep", "fresh", None]},
        "`keep`",
        "`fresh`: issue it anew on every mount, as for one-time codes",
    ),
    Field(
        "renewPercent",
        {
            "type": ["number", "string", "null"],
            "minimum": 1,
            "maximum": 99,
            "pattern": r"^([0-9]{1,2}(\.[0-9]{1,6})?)?$",
        },
        "`--renew-percent`, 67",
        "part of its life, 1 to 99, after which what cannot be renewed (a certificate) is issued anew",
    ),
    Field("refreshAfter", _DURATION, "the class's", "as the parameter, for this object alone"),
    Field(
        "optional",
        _BOOLEAN,
        "`false`",
        "`true`: where Vault has no such secret or key (never where it denies it), the file is left out",
    ),
    Field(
        "jmesPath",
        _TEXT,
        "",
        "a [JMESPath](https://jmespath.org) expression: the value that it finds in the data, or in the value of "
        "`secretKey`, which may be a string that holds JSON",
    ),
    Field(
        "includes",
        _TEXTS,
        "every key",
        'with `secretKey: "*"`: [RE2](https://github.com/google/re2/wiki/Syntax) expressions; '
        "a key is taken where one of them is found in it",
    ),
    Field("excludes", _TEXTS, "no key", "the same for keys that are left out; these come first"),
    Field(
        "format",
        _words(Format, "pkcs12"),
        "`envelope`",
        "without `secretKey`: the whole response (`envelope`), or its data as `json`, `yaml`, `dotenv`, "
        "`properties`, `toml`, `pem` or `pkcs12`. With it: how a value that is no string is written, `json` by default",
    ),
    Field("alias", _TEXT, "`tls`", "of a `pkcs12`: the name of its entry"),
    Field(
        "passwordFrom",
        map_of(PASSWORD_FIELDS) | {"type": ["object", "null"]},
        "an empty one",
        "of a `pkcs12`: `secretPath` and `secretKey` of its password",
    ),
    Field("legacy", _BOOLEAN, "`false`", "of a `pkcs12`: `true` for Java before 8u301, with its weak encryption"),
    Field("template", {"type": ["string", "null"]}, "", "a [template](#templates) of the file"),
    Field(
        "sources",
        {
            "type": ["object", "null"],
            "additionalProperties": map_of(SOURCE_FIELDS),
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        },
        "",
        "of a template: secrets by alias, each with `secretPath` and if need be `method`, `secretArgs`, "
        "`jmesPath`. The object's own `secretPath`, which is not required then, is the alias `secret`",
    ),
)


def markdown_table(fields: tuple[Field, ...]) -> str:
    """The fields as the README shows them."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    lines += [f"| `{field.name}` | {field.default} | {field.meaning} |" for field in fields]
    return "\n".join(lines) + "\n"
