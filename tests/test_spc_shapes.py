"""What form an object's file has, as classes say it: all keys, expressions, formats, keystores, templates, optional."""

from __future__ import annotations

import pytest

from provider.settings import Settings
from provider.spc import AllKeys, Encoding, Format, Pkcs12, SecretRequest, SingleValue, Source, Template, Whole
from provider.spc.expressions import MAX_EXPRESSION, MAX_EXPRESSIONS_TEXT, MAX_REGEXES
from provider.spc.shapes import MAX_SOURCES, MAX_TEMPLATE
from provider.spc.tables import OBJECT_FIELDS
from tests.spc_classes import attributes, fault, faults, field_fault, one, parse, parse_class

WEB = SecretRequest("GET", "secret/data/web")


def template(fields: str) -> str:
    """A class of one object with a template, from its other fields in YAML's flow style."""
    return "- {objectName: app.conf, template: 'x', " + fields + "}"


def test_objects_without_these_fields_are_plain() -> None:
    """A class of docs/contract.md section 2 comes to one value or the whole response, from one source."""
    for fields, shape in (("", Whole()), ("secretKey: a.b", SingleValue("a.b")), ("format: envelope", Whole())):
        spec = one(fields)
        assert (spec.sources, spec.shape, spec.plain, spec.optional) == ((Source("secret", WEB),), shape, True, False)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ('secretKey: "*"', AllKeys()),
        ("secretKey: '*', encoding: hex, format: YAML", AllKeys((), (), Encoding.HEX, Format.YAML)),
        ("secretKey: '*', includes: [^a, b$], excludes: [1]", AllKeys(("^a", "b$"), ("1",))),
        ("secretKey: '*', includes: null, excludes: ''", AllKeys()),
        ("secretKey: k, format: toml", SingleValue("k", Encoding.UTF8, Format.TOML)),
        ("secretKey: k, jmesPath: a.b", SingleValue("k")),
        ("jmesPath: a.b, format: dotenv, encoding: base64", SingleValue(None, Encoding.BASE64, Format.DOTENV)),
        ("format: json", Whole(Format.JSON)),
        ("format: Properties", Whole(Format.PROPERTIES)),
        ("format: pem", Whole(Format.PEM)),
        ("format: pkcs12", Pkcs12("tls")),
        ("format: pkcs12, alias: web, legacy: true", Pkcs12("web", None, True)),
        ("template: '{{ secret.a }}'", Template("{{ secret.a }}")),
    ],
)
def test_shapes(fields: str, shape: object) -> None:
    """Each combination that makes sense comes to its shape, over the object's own secretPath."""
    spec = one(fields)
    assert spec.shape == shape
    assert spec.request == WEB
    assert spec.plain is (shape in (Whole(), SingleValue("k")) and "jmesPath" not in fields)


@pytest.mark.parametrize("expression", ["a[0:2]", "[::2]", "[-1:]", "a[?b].c[1:]", "{a: b[:3], c: &d}"])
def test_every_kind_of_expression_is_taken(expression: str) -> None:
    """Slices and all else that JMESPath has pass the check, by themselves and as a source's."""
    assert one(f"jmesPath: '{expression}'").sources[0].jmes_path == expression
    assert parse_class(template(f"sources: {{a: {{secretPath: b, jmesPath: '{expression}'}}}}")).objects


def test_an_expression_belongs_to_its_source() -> None:
    """The object's own and those of a template's sources are each on their own secret."""
    assert one("secretKey: k, jmesPath: 'a[0]'").sources == (Source("secret", WEB, "a[0]"),)
    spec = parse_class(
        """
        - objectName: app.conf
          secretPath: secret/data/web
          jmesPath: a
          sources:
            db: {secretPath: database/creds/x, method: post, secretArgs: {a: 1}}
            flags: {secretPath: /v1/secret/data/flags?version=2, jmesPath: b.c}
          template: "{{ secret }}{{ db.username }}{{ flags }}"
        """
    ).objects[0]
    first, second, third = spec.sources
    assert first == Source("secret", WEB, "a")
    assert (second.alias, second.request.method, second.request.path) == ("db", "POST", "database/creds/x")
    assert second.request.body is not None
    assert second.request.body.reveal() == '{"a":1}'
    assert third == Source("flags", SecretRequest("GET", "secret/data/flags", (("version", "2"),)), "b.c")


def test_a_template_needs_no_path_of_its_own() -> None:
    """Where it has sources, secretPath may be left out; without both the path is missing."""
    (spec,) = parse_class(template("sources: {a: {secretPath: b}}")).objects
    assert spec.sources == (Source("a", SecretRequest("GET", "b")),)
    assert fault(template("mode: 1")).startswith("objects[0] (app.conf) secretPath: is missing")


def test_a_password_is_the_second_source() -> None:
    """The password's secret is read beside the certificate's."""
    spec = one("format: pkcs12, passwordFrom: {secretPath: secret/data/p, secretKey: pass}")
    assert spec.sources == (Source("secret", WEB), Source("password", SecretRequest("GET", "secret/data/p")))
    assert spec.shape == Pkcs12("tls", "pass")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("'true'", True), ("false", False), ("1", True), ("", False)]
)
def test_optional(text: str, value: bool) -> None:
    """A boolean, plain or in quotes; unset it is false."""
    assert one(f"optional: {text}").optional is value


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("includes: [a]", 'includes: belongs to secretKey: "*" (remove it)'),
        ("secretKey: k, excludes: [a]", 'excludes: belongs to secretKey: "*"'),
        ("alias: a", "alias: belongs to format: pkcs12"),
        ("format: pem, legacy: true", "legacy: belongs to format: pkcs12"),
        ("passwordFrom: {secretPath: a, secretKey: b}", "passwordFrom: belongs to format: pkcs12"),
        ("sources: {a: {secretPath: b}}", "sources: belongs to a template"),
        ("secretKey: '*', jmesPath: a", 'jmesPath: does not go with secretKey: "*" (remove one of them)'),
        ("format: pkcs12, secretKey: k", "secretKey: does not go with format: pkcs12"),
        ("format: pkcs12, jmesPath: k", "jmesPath: does not go with format: pkcs12"),
        ("template: x, format: json", "format: does not go with template"),
        ("template: x, encoding: hex", "encoding: does not go with template"),
        ("template: x, secretKey: k", "secretKey: does not go with template"),
        ("format: json, encoding: hex", "encoding: is how one value is decoded, and format: json has many"),
        ("format: xml", 'format "xml": is not a format (write envelope, json, yaml, dotenv, properties, toml, pem or'),
        ("secretKey: k, format: pem", 'format "pem": is of all the data, not of one value (remove secretKey, or write'),
        ("secretKey: '*', format: envelope", 'format "envelope": is of all the data, not of one value'),
        ("optional: maybe", 'optional "maybe": is not a boolean (write true or false)'),
        ("secretKey: '*', includes: a", "includes: is not a list of texts (write includes: and below it a dash"),
        ("secretKey: '*', includes: [a, [b]]", "includes: is not a list of texts"),
        ("secretKey: '*', includes: [a, null]", "includes: is not a list of texts"),
        ("format: pkcs12, passwordFrom: a", "passwordFrom: is not a map (write passwordFrom: and its fields below it"),
        ("format: pkcs12, passwordFrom: {secretPath: a}", "passwordFrom secretKey: is missing"),
        ("format: pkcs12, passwordFrom: {secretKey: a}", "passwordFrom secretPath: is missing"),
        ("format: pkcs12, passwordFrom: {secretPath: a, secretKey: b, secretKey: c}", "secretKey: is given twice"),
        ("template: x, sources: {secret: {secretPath: b}}", "is the name of the object's own secretPath (rename it)"),
        ("template: x, sources: {a-b: {secretPath: b}}", 'sources "a-b": is no name for a template'),
        ("template: x, sources: {loop: {secretPath: b}}", 'sources "loop": is no name for a template'),
        ("template: x, sources: {a: b}", 'sources "a": is not a map'),
        ("template: x, sources: {a: {secretPath: b}, a: {secretPath: c}}", 'sources "a": is given twice'),
        ("template: x, sources: {a: {secretPath: ../b}}", 'sources a secretPath "../b": has an element'),
        ("template: x, sources: [a]", "sources: is not a map"),
        ("secretKey: '*', includes: ['(']", 'includes "(": is not a regular expression of RE2'),
        ("secretKey: '*', excludes: ['a(?=b)']", "is not a regular expression of RE2"),
        ("secretKey: '*', excludes: ['\\pL{1000}']", "or too large a one"),
        ("jmesPath: 'a['", 'jmesPath "a[": is not a JMESPath expression (see https://jmespath.org'),
        ("jmesPath: '!" + "(" * 900 + "'", "is not a JMESPath expression"),
        ("jmesPath: 'nosuch(@)'", 'calls "nosuch", which is no function'),
        (f"jmesPath: '{'a' * (MAX_EXPRESSION + 1)}'", f"is longer than {MAX_EXPRESSION} characters"),
        ("template: x, sources: {a: {secretPath: b, jmesPath: '['}}", 'sources a jmesPath "[": is not a JMESPath'),
        (f"template: '{'a' * (MAX_TEMPLATE + 1)}'", f"template: is longer than {MAX_TEMPLATE} characters"),
        (
            "template: x, sources: {" + ",".join(f"a{n}: {{secretPath: b}}" for n in range(MAX_SOURCES)) + "}",
            f"sources: has more than {MAX_SOURCES} aliases",
        ),
    ],
)
def test_what_is_wrong_is_told(fields: str, told: str) -> None:
    """A field that is wrong, or does not go with another, is one fault that names object, field and remedy."""
    found = field_fault(fields)
    assert found.startswith("objects[0] (password) ")
    assert told in found


def test_all_faults_come_at_once() -> None:
    """Faults of shapes, of expressions and of the fields beside them are told together."""
    found = faults(
        "- {objectName: .., secretPath: b, secretKey: '*', includes: ['('], method: '1'}\n"
        "- {objectName: c, secretPath: d, jmesPath: '[', template: x, encoding: hex}"
    )
    assert len(found) == 5


def test_a_template_without_its_path_has_nothing_to_search() -> None:
    """method, secretArgs and jmesPath beside sources alone are of no request."""
    found = faults(template("sources: {a: {secretPath: b}}, method: PUT, secretArgs: {a: 1}, jmesPath: c"))
    assert [line.split(":")[0].split()[-1] for line in found] == ["method", "secretArgs", "jmesPath"]


def test_the_root_is_for_all_keys_alone() -> None:
    """``objectName: .`` is the volume itself, where each key is a file; no file can be called so."""
    assert parse_class("- {objectName: ., secretPath: b, secretKey: '*'}").objects[0].name == "."
    assert "is not a clean path" in fault("- {objectName: ., secretPath: b, secretKey: k}")


def test_a_directory_of_keys_may_hold_other_objects() -> None:
    """Only whether two of its files are one is left for the mount to tell; names that can never be are faults."""
    keys = "- {objectName: a, secretPath: b, secretKey: '*'}\n"
    assert len(parse_class(keys + "- {objectName: a/b, secretPath: b}\n").objects) == 2
    assert "is also objects[1]" in fault(keys + keys)
    assert "is also objects[1]" in fault(keys + "- {objectName: a, secretPath: b}\n")
    assert "is a directory to objects[1]" in fault(
        "- {objectName: a, secretPath: b}\n- {objectName: a/c, secretPath: b, secretKey: '*'}\n"
    )


def test_the_operator_can_turn_templates_off() -> None:
    """With --templates=off a class with one is refused, and says who did it; the same class passes without."""
    text = attributes(template("secretPath: a"))
    assert parse(text).objects
    with pytest.raises(Exception, match="the operator turned templates off") as refused:
        parse(text, settings=Settings(templates=False))
    assert "objects[0] (app.conf) template" in str(refused.value)


def test_the_number_of_sources_is_bounded() -> None:
    """A class reads no more secrets by sources than it could by objects."""
    sources = ", ".join(f"a{n}: {{secretPath: b{n}}}" for n in range(MAX_SOURCES))
    lines = [f"- {{objectName: f{n}, template: x, sources: {{{sources}}}}}" for n in range(21)]
    assert len(parse_class("\n".join(lines[:20])).objects) == 20
    assert "have 1050 sources, more than 1000" in fault("\n".join(lines))


def test_expressions_of_a_class_are_bounded() -> None:
    """Too many, or too long together, are refused without compiling one."""
    many = ", ".join(["a"] * (MAX_REGEXES + 1))
    assert "more than 200 includes and excludes" in field_fault(f"secretKey: '*', includes: [{many}]")
    lines = [
        f"- {{objectName: f{n}, secretPath: b, jmesPath: '{'[' * MAX_EXPRESSION}'}}"
        for n in range(MAX_EXPRESSIONS_TEXT // MAX_EXPRESSION + 1)
    ]
    assert f"expressions of more than {MAX_EXPRESSIONS_TEXT} characters" in fault("\n".join(lines))


def test_classes_with_shapes_are_kept_parsed_within_the_cache() -> None:
    """Each shape counts with its texts, so that the parser's cache keeps its bound."""
    objects = (
        "- {objectName: a, secretPath: b, secretKey: '*', includes: [c]}\n"
        "- {objectName: d, secretPath: b, template: x}\n- {objectName: e, secretPath: b, format: json}\n"
        "- {objectName: f, secretPath: b, format: pkcs12}\n"
    )
    assert parse_class(objects) == parse_class(objects)


def test_every_field_is_in_the_table_once() -> None:
    """The table that parser, schema and README are made of has no field twice, and a meaning for each."""
    names = [field.name for field in OBJECT_FIELDS]
    assert len(set(names)) == len(names)
    assert all(field.meaning for field in OBJECT_FIELDS)
