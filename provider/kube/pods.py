"""What the API server answers when it lists the metadata of pods, and which pods it means."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

# How to ask for it. Whole pods would be several times as much, and their environment may hold secrets.
METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
# A node has 110 pods by default and few have 500, with 2 to 8 KiB of metadata each. Decoded, this much fits into
# the manifests' memory limit. A pod may have 256 KiB of annotations, so 33 pods can exceed it.
MAX_LIST_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class NodePods:
    """The pods of a listing: their UIDs, and their names as (namespace, name).

    Where ``complete`` is False the listing was cut short, or too large to be read: a pod which it lacks may well exist.
    """

    uids: frozenset[str]
    names: frozenset[tuple[str, str]]
    complete: bool


def parse(body: bytes | bytearray) -> NodePods:
    """The pods of an answer to METADATA_LIST. Raises ValueError where it is anything else.

    Strict, since a pod that is missing from it loses its credentials.
    """
    try:
        answer = json.loads(body)
        if answer["kind"] != "PartialObjectMetadataList":
            raise ValueError("another kind of answer")
        # A server in Go may write an empty list as null.
        items = [item["metadata"] for item in ([] if answer["items"] is None else answer["items"])]
        return NodePods(
            frozenset(_text(item, "uid") for item in items),
            frozenset((_text(item, "namespace"), _text(item, "name")) for item in items),
            complete=not answer["metadata"].get("continue"),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a list of metadata") from error


def _text(item: dict[str, Any], field: str) -> str:
    value = item[field]
    if not isinstance(value, str) or not value:
        raise ValueError(f"an item without {field}")
    return value
