"""The fields of an object: docs/contract.md section 2."""

from __future__ import annotations

from textwrap import indent

import pytest

from provider.settings import MAX_OBJECTS, Settings
from provider.spc import Encoding, SecretRequest
from tests.spc_classes import attributes, body, fault, faults, field_fault, one, parse, parse_class, plain, value


def warning(fields: str) -> str:
    (found,) = parse_class("- {objectName: password, secretPath: a, " + fields + "}").warnings
    return found


def test_an_object_needs_a_name_and_a_path_only() -> None:
    """What else there is has its default: the whole response, GET, the request's permission, UTF-8."""
    assert parse_class("- objectName: a\n  secretPath: b\n").objects == (plain("a", SecretRequest("GET", "b"), None),)


def test_every_field_has_its_place() -> None:
    """All fields at once, in the order of the class."""
    spec = parse_class(
        """
        - objectName: certs/tls.pem
          secretPath: /v1/pki/issue/web?ttl=1h
          secretKey: certificate
          method: put
          secretArgs:
            common_name: web.shop
            ttl: 24
          filePermission: 0400
          encoding: Base64
        - objectName: b
          secretPath: c
        """
    )
    first, second = spec.objects
    assert (first.name, value(first).key, first.mode, value(first).encoding) == (
        "certs/tls.pem",
        "certificate",
        0o400,
        Encoding.BASE64,
    )
    request = first.request
    assert (request.method, request.path, request.query) == ("PUT", "pki/issue/web", (("ttl", "1h"),))
    assert request.body is not None
    assert request.body.reveal() == '{"common_name":"web.shop","ttl":24}'
    assert second.name == "b"
    assert spec.warnings == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", "~", "null", "[]", "---\n...\n"])
def test_a_class_without_objects_is_refused(text: str) -> None:
    """A mount that comes to no file would leave old files in place."""
    assert fault(text).startswith("objects: names no object")


@pytest.mark.parametrize("text", ["objectName: a\nsecretPath: b\n", "just text", "0"])
def test_objects_that_are_no_list_are_refused(text: str) -> None:
    """The remedy shows the dash that is most likely missing."""
    assert fault(text).startswith("objects: is not a YAML list (begin each object with a dash")


def test_the_spelling_of_other_providers_is_known() -> None:
    """The Azure provider's classes have a key above the list and a text for each object: the remedy names both."""
    text = "- |\n  objectName: a\n  secretPath: b\n"
    remedy = 'remove the line "array:", and | or quotes behind each dash'
    assert fault(f"array:\n{indent(text, '  ')}").startswith(f"objects: is not a YAML list ({remedy}")
    assert fault(text).startswith(f"objects[0]: is not a map of fields ({remedy}")
    # A map that happens to have that key is told what is most likely missing.
    for text in ("array: a\n", "array: []\n"):
        assert "begin each object with a dash" in fault(text)
    for text in ("- |\n  secretPath: b\n", "- objectName:password\n  secretPath:b\n"):
        assert 'add "- objectName: password"' in fault(text)


@pytest.mark.parametrize("item", ["null", "text", "[objectName, a]"])
def test_an_object_that_is_no_map_is_refused(item: str) -> None:
    """It is named by its index, and the others are checked all the same."""
    found = faults(f"- {item}\n- {{objectName: a, secretPath: ..}}")
    assert [line.split(":")[0] for line in found] == ["objects[0]", 'objects[1] (a) secretPath ".."']


def test_the_number_of_objects_is_bounded() -> None:
    """MAX_OBJECTS are read, and not one more."""
    lines = [f"- {{objectName: a{n}, secretPath: b}}" for n in range(MAX_OBJECTS + 1)]
    assert len(parse_class("\n".join(lines[:-1])).objects) == MAX_OBJECTS
    assert fault("\n".join(lines)).startswith("objects: has 1001 objects, more than 1000")


@pytest.mark.parametrize("value", ["", "null", "~", '""'])
@pytest.mark.parametrize("field", ["objectName", "secretPath"])
def test_an_object_without_name_or_path_is_refused(field: str, value: str) -> None:
    """Absent, null and empty are the same."""
    other = "secretPath" if field == "objectName" else "objectName"
    where = "objects[0]" if field == "objectName" else "objects[0] (b)"
    assert fault(f"- {{{other}: b}}").startswith(f"{where} {field}: is missing")
    assert fault(f"- {{{other}: b, {field}: {value}}}").startswith(f"{where} {field}: is missing")


@pytest.mark.parametrize("value", ["null", "~", "", '""'])
@pytest.mark.parametrize("field", ["secretKey", "method", "filePermission", "encoding"])
def test_null_and_empty_are_unset(field: str, value: str) -> None:
    """The field's default applies."""
    assert one(f"{field}: {value}") == one("")


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "true", "2024-01-01", "0x1F", "0600", "1_000", "1.0", "1e3", ".inf", "=", "<<", "2001:db8::1"],
)
def test_string_fields_are_taken_as_written(text: str) -> None:
    """Whatever YAML would read a plain scalar as, a name is its text."""
    spec = parse_class(f"- objectName: {text}\n  secretPath: {text}\n  secretKey: {text}\n").objects[0]
    assert (spec.name, spec.request.path, value(spec).key) == (text, text, text)


@pytest.mark.parametrize("text", ['"null"', "'~'", "!!str null", "!!str ~"])
def test_a_quoted_null_is_a_name(text: str) -> None:
    """Only the plain word is null."""
    assert value(one(f"secretKey: {text}")).key == text.split()[-1].strip("\"'")


@pytest.mark.parametrize("field", ["objectName", "secretPath", "secretKey", "method", "encoding", "filePermission"])
@pytest.mark.parametrize(("value", "kind"), [("[a]", "list"), ("{a: b}", "map")])
def test_a_field_that_is_no_scalar_is_refused(field: str, value: str, kind: str) -> None:
    """The fault names the field and what it is."""
    base = {"objectName": "b", "secretPath": "b", field: value}
    found = faults("- {" + ", ".join(f"{key}: {text}" for key, text in base.items()) + "}")
    where = "objects[0]" if field == "objectName" else "objects[0] (b)"
    assert found[0].startswith(f"{where} {field}: is a {kind}")


def test_a_fault_is_told_with_the_slip_that_it_comes_of() -> None:
    """A required field that is missing since it is misspelt: both are told, though the slip alone were a warning."""
    assert faults("- objectname: a\n  secretPath: b\n") == (
        "objects[0] objectName: is missing (name the file to write the secret to)",
        'objects[0]: unknown field "objectname" is ignored, did you mean objectName?',
    )


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("secretpath", ", did you mean secretPath?"),
        ("filePermissions", ", did you mean filePermission?"),
        ("whatever", ""),
        ("secretKey" * 8, ""),
    ],
)
def test_a_field_that_nobody_knows_is_a_warning(field: str, hint: str) -> None:
    """It is ignored, the nearest known field is named, and its value is not shown."""
    assert warning(f"{field}: hunter2") == f'objects[0] (password): unknown field "{field}" is ignored{hint}'


def test_a_field_given_twice_is_refused() -> None:
    """YAML forbids it; the fault names the field and the line."""
    found = fault("- objectName: a\n  secretPath: b\n  secretPath: c\n")
    assert found.startswith("objects[0] (a) secretPath: is given twice, again in line 3")


def test_only_the_first_document_counts() -> None:
    """More documents, even broken ones, are a warning, as Go's reader never comes to them."""
    for rest in ("---\n- objectName: b\n  secretPath: c\n", "---\n", "--- [", "%\n"):
        spec = parse_class("- {objectName: a, secretPath: b}\n...\n" + rest)
        assert [item.name for item in spec.objects] == ["a"]
        assert spec.warnings == ("objects: only the first YAML document is used, what follows it is ignored",)
    assert parse_class("---\n- {objectName: a, secretPath: b}\n...\n").warnings == ()


# --- names ------------------------------------------------------------------------------------------------


def test_two_objects_with_one_name_are_refused() -> None:
    """The fault names both, in the order of the class."""
    found = fault(
        "- {objectName: b, secretPath: x}\n- {objectName: a, secretPath: x}\n- {objectName: b, secretPath: y}"
    )
    assert found.startswith("objects[0] (b): objectName is also objects[2] (b)")


def test_a_file_that_is_anothers_directory_is_refused() -> None:
    """The fault names both; a name that merely begins alike is no clash."""
    found = fault(
        "- {objectName: a/b, secretPath: x}\n- {objectName: a, secretPath: x}\n- {objectName: a-b, secretPath: y}"
    )
    assert found.startswith("objects[1] (a): objectName is a directory to objects[0] (a/b)")


def test_a_wrong_name_is_shown_in_one_safe_line() -> None:
    """A long or odd name is cut and escaped."""
    found = fault('- {objectName: "/\\n\\e[31m' + "x" * 500 + '", secretPath: b}')
    assert "\n" not in found
    assert "\x1b" not in found
    assert len(found) < 400


def test_the_query_of_a_path_is_not_shown() -> None:
    """A request's argument may be a secret."""
    found = fault("- {objectName: a, secretPath: 'x/../y?pin=hunter2'}")
    assert found.startswith('objects[0] (a) secretPath "x/../y": has an element')
    assert "hunter2" not in found


# --- method, encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["get", "LIST", "Patch"])
def test_a_method_is_upper_case(text: str) -> None:
    """Letters in any case are a method."""
    assert one(f"method: {text}").request.method == text.upper()


@pytest.mark.parametrize("text", ["G-T", '"GET "', '"GET\\n"', "G1", "é", "X" * 33])
def test_a_method_that_is_none_is_refused(text: str) -> None:
    """Nothing but a word can begin the request's line."""
    assert "is not an HTTP method" in field_fault(f"method: {text}")


@pytest.mark.parametrize("text", ["CONNECT", "trace", "Options", "head"])
def test_a_method_that_reads_no_secret_is_refused(text: str) -> None:
    """CONNECT would open a tunnel through a proxy, and the others answer no secret: refused with what to write."""
    found = field_fault(f"method: {text}")
    assert f'method "{text}": is no method that Vault answers with a secret' in found
    assert "write GET" in found


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("utf-8", Encoding.UTF8),
        ("UTF8", Encoding.UTF8),
        ("Utf-8", Encoding.UTF8),
        ("BASE64", Encoding.BASE64),
        ("base64", Encoding.BASE64),
        ("Hex", Encoding.HEX),
    ],
)
def test_an_encoding_is_known_in_any_case(text: str, encoding: Encoding) -> None:
    """The three encodings, UTF-8 with or without its hyphen."""
    assert value(one(f"secretKey: k, encoding: {text}")).encoding is encoding


@pytest.mark.parametrize("text", ["base32", "base-64", "latin-1"])
def test_an_unknown_encoding_is_refused(text: str) -> None:
    """The fault names the three that there are."""
    assert f'encoding "{text}": is not an encoding (write utf-8, base64 or hex)' in field_fault(f"encoding: {text}")


# --- filePermission ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("0600", 0o600),
        ("0o600", 0o600),
        ("0O600", 0o600),
        ("0777", 0o777),
        ("420", 0o644),
        ("256", 0o400),
        ("0x1ff", 0o777),
        ("0b100000000", 0o400),
        ("7", 0o007),
        ("!!int 0600", 0o600),
        ('!!int "0600"', 0o600),
        ('"600"', 0o600),
        ("'0600'", 0o600),
        ('"0o600"', 0o600),
        ('"777"', 0o777),
        ("!!str 600", 0o600),
        ("0", 0o644),
        ("0000", 0o644),
        ('"0"', 0o644),
        ('"0000"', 0o644),
    ],
)
def test_a_mode_is_read_as_yaml_reads_it_or_as_octal_in_quotes(text: str, mode: int) -> None:
    """Plain numbers by YAML's rules, quoted ones always octal; zero means the default. None is doubtful."""
    spec = parse_class("- {objectName: password, secretPath: a, filePermission: " + text + "}")
    assert spec.objects[0].mode == mode
    assert all("lets everybody on the node write" in warning for warning in spec.warnings)


def test_the_mode_of_an_object_does_not_depend_on_the_permission() -> None:
    """The request's permission is the mode only where an object names none."""
    text = attributes("- {objectName: a, secretPath: b, filePermission: 0600}\n- {objectName: b, secretPath: b}")
    assert [spec.mode for spec in parse(text, permission="256").objects] == [0o600, 0o400]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("644", "is 01204 in octal, over 0777 (write 0644, if that is meant)"),
        ("600", "is 01130 in octal, over 0777 (write 0600, if that is meant)"),
        ("777", "is 01411 in octal, over 0777 (write 0777, if that is meant)"),
        ("01777", "is 01777 in octal, over 0777 (write an octal number"),
        ("512", "is 01000 in octal, over 0777 (write 0512, if that is meant)"),
        ("999", "is 01747 in octal, over 0777 (write an octal number"),
        ("-1", "is not a file mode"),
        ("0o800", "is not a file mode"),
        ("true", "is not a file mode"),
        ("420.0", "is not a file mode"),
        ("rw-r--r--", "is not a file mode"),
        ("0800", "is not a file mode"),
        ('"1777"', "is not a file mode"),
        ('"800"', "is not a file mode"),
        ('"0x1ff"', "is not a file mode"),
        ('"-600"', "is not a file mode"),
        ('" 600"', "is not a file mode"),
        ('"' + "0" * 21 + '"', "is not a file mode"),
    ],
)
def test_a_mode_that_is_none_is_refused(text: str, remedy: str) -> None:
    """Over 0777 the fault names what was probably meant: octal digits without their zero."""
    shown = text.strip('"')
    assert f'objects[0] (password) filePermission "{shown}": {remedy}' in field_fault(f"filePermission: {text}")


@pytest.mark.parametrize(("text", "mode"), [("400", "0620"), ("444", "0674"), ("440", "0670"), ("500", "0764")])
def test_a_decimal_mode_that_looks_octal_is_a_warning(text: str, mode: str) -> None:
    """It is legal and taken as it is, and the log says which mode that comes to."""
    assert one(f"filePermission: {text}").mode == int(text)
    assert warning(f"filePermission: {text}") == (
        f"objects[0] (password) filePermission: {text} is decimal and means mode {mode}; "
        f"if 0{text} is meant, write that"
    )


# --- lease, renewPercent, refreshAfter ---------------------------------------------------------------------


def test_a_lease_is_kept_unless_the_object_says_fresh() -> None:
    """``keep`` is the default, written or not."""
    assert one("lease: fresh").fresh is True
    assert one("lease: keep").fresh is False
    assert one("").fresh is False


@pytest.mark.parametrize("text", ["Fresh", "true", "renew", '"fresh "'])
def test_any_other_lease_is_refused(text: str) -> None:
    """The two words are all that there is."""
    assert "is neither keep nor fresh" in field_fault(f"lease: {text}")


@pytest.mark.parametrize(
    ("text", "percent"), [("1", 1.0), ("50", 50.0), ("'66.5'", 66.5), ("99", 99.0), ("99.0", 99.0)]
)
def test_renew_percent_is_the_objects(text: str, percent: float) -> None:
    """From 1 to 99, quoted or not, whole or not."""
    assert one(f"renewPercent: {text}").renew_percent == percent


@pytest.mark.parametrize("text", ["0", "0.9", "99.1", "100", "-1", "50%", "1e1", "nan", "half", "1.0000001"])
def test_a_renew_percent_out_of_range_is_refused(text: str) -> None:
    """Nothing is renewed at its birth or its end."""
    assert "is not a number from 1 to 99" in field_fault(f"renewPercent: {text}")


def test_renew_percent_is_the_operators_where_the_object_has_none() -> None:
    """The daemon's setting is the default."""
    (spec,) = parse(attributes(), settings=Settings(renew_percent=40.0)).objects
    assert spec.renew_percent == 40.0


def test_refresh_after_is_the_objects_then_the_classes_then_the_operators() -> None:
    """Each object's own duration wins over the class's, and that over the daemon's; zero is a duration too."""
    objects = "- {objectName: a, secretPath: x, refreshAfter: 1h30m}\n- {objectName: b, secretPath: x}\n"
    objects += "- {objectName: c, secretPath: x, refreshAfter: 0}\n"
    settings = Settings(refresh_after=7.0)
    spec = parse(attributes(objects, refreshAfter="90s"), settings=settings)
    assert [item.refresh_after for item in spec.objects] == [5400.0, 90.0, 0.0]
    spec = parse(attributes(objects), settings=settings)
    assert [item.refresh_after for item in spec.objects] == [5400.0, 7.0, 0.0]


@pytest.mark.parametrize("text", ["soon", "90", "-1s", "1.5", "1h 30m", "1" * 100 + "s"])
def test_a_wrong_duration_is_refused(text: str) -> None:
    """In an object and in a parameter alike, saying what one looks like."""
    assert "is not a duration (write a duration like 90s" in field_fault(f"refreshAfter: {text}")
    found = fault(refreshAfter=text)
    assert found.startswith('refreshAfter "')
    assert "is not a duration (write a duration like 90s" in found


# --- secretArgs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("null", None),
        ("", None),
        ("{}", "{}"),
        ("[]", "[]"),
        ("text", '"text"'),
        ('""', '""'),
        ("7", "7"),
        ("{b: 1, a: [true, ~, x]}", '{"a":[true,null,"x"],"b":1}'),
        (
            "{a: yes, b: no, c: on, d: off, e: True, f: FALSE}",
            '{"a":"yes","b":"no","c":"on","d":"off","e":true,"f":false}',
        ),
        ('{a: "1", b: \'true\', c: !!str 1, d: !!int "1"}', '{"a":"1","b":"true","c":"1","d":1}'),
        ("[12, -3, +4, 0x1F, 0o17, 0b11, 0600, 1_000]", "[12,-3,4,31,15,3,384,1000]"),
        ("[1.5, 1e3, -0.25, .5, 1., 08]", "[1.5,1000,-0.25,0.5,1,8]"),
        ("[2024-01-01, 2024-01-01T00:00:00Z, 12:30:45]", '["2024-01-01","2024-01-01T00:00:00Z","12:30:45"]'),
        ("{1: a, true: b, ~: c, 0x10: d}", '{"0x10":"d","1":"a","true":"b","~":"c"}'),
        ('{a: é, b: "\\u2028"}', '{"a":"é","b":"\u2028"}'),
        ("!!binary aGk=", '"aGk="'),
        ("[!!map {}, !!seq []]", "[{},[]]"),
    ],
)
def test_a_body_is_canonical_json(text: str, expected: str | None) -> None:
    """Numbers and booleans keep their type as Go's yaml.v3 has it, keys become strings, and keys are sorted."""
    assert body(text) == expected


@pytest.mark.parametrize("number", [".inf", "-.Inf", ".NAN", "+.INF"])
def test_a_number_that_json_has_not_is_refused(number: str) -> None:
    """Infinity and NaN, named by their line only."""
    found = field_fault("secretArgs: {a: [" + number + "]}")
    assert found.startswith("objects[0] (password) secretArgs: line 1: a number is not finite")
    assert number not in found


def test_a_key_given_twice_in_a_body_is_refused_without_its_name() -> None:
    """Only the line is told: keys of a body are its author's own."""
    found = field_fault("secretArgs: {a: {hunter2: 1, hunter2: 2}}")
    assert found.startswith("objects[0] (password) secretArgs: line 1: a key is given twice")
    assert "hunter2" not in found


def test_equal_bodies_are_equal_requests() -> None:
    """However the keys are ordered and numbers spelled, so that one read serves both."""
    request = one("secretArgs: {a: 16, b: x}").request
    assert request == one('secretArgs: {b: "x", a: 0x10}').request
    assert {request: 1}[one('secretArgs: {b: "x", a: 0x10}').request] == 1
    assert one("secretArgs: {a: 16}").request != one('secretArgs: {a: "16"}').request


def test_a_body_is_not_shown() -> None:
    """Neither repr nor str of anything that holds it."""
    spec = parse_class("- {objectName: a, secretPath: b, secretArgs: {pin: hunter2}}")
    assert "hunter2" not in f"{spec!r} {spec} {spec.objects[0].request} {spec.objects[0].request.body}"
