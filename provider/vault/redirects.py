"""Where a redirect leads, and whether a request may go there (docs/contract.md section 3)."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, unquote, urljoin, urlsplit

from provider.spc.addresses import AllowedAddresses, remedy
from provider.spc.findings import Refused
from provider.spc.parameters import MAX_ADDRESS, address

# Those that keep the method and the body; Vault's standbys answer 307.
FOLLOWED: Final = frozenset({307, 308})
# A standby names the active node, which may have changed meanwhile; whoever leads further leads in circles.
MAX_HOPS: Final = 3

_ADVICE: Final = "set vaultAddress to the active node or to a load balancer that finds it"


class NotFollowed(Exception):
    """A redirect that is not followed; the text says what to do about it."""


def followed(location: str, sent_to: str, path: str, allowed: AllowedAddresses) -> str:
    """The address at which the request for ``path`` (with its query) is to be sent that went ``sent_to`` an address.

    Only the same request elsewhere is one of a standby: another path would be another secret, by the token of the pod.

    Raises NotFollowed.
    """
    if len(location) > 2 * MAX_ADDRESS + len(path):
        raise NotFollowed(f"{_ADVICE}; what it points to is no address of a Vault")
    try:
        target = urlsplit(urljoin(sent_to + path, location))
        found = _same_request(target.path, target.query, path)
        if found is None:
            raise NotFollowed(f"{_ADVICE}; only the same path at another address is followed")
        to = address(f"{target.scheme}://{target.netloc}{found}")
    except (ValueError, Refused):
        raise NotFollowed(f"{_ADVICE}; what it points to is no address of a Vault") from None
    if sent_to.startswith("https:") and not to.startswith("https:"):
        raise NotFollowed(f"{_ADVICE}; from https only https is followed, so set Vault's api_addr to an https:// URL")
    # Without a list any address may be named by a class; by whoever answers in Vault's place, none.
    if allowed.open or not allowed.allows(to):
        raise NotFollowed(f"{_ADVICE}, or {remedy(to)}")
    return to


def _same_request(path: str, query: str, sent: str) -> str | None:
    """What of ``path`` comes before that of the request that was sent; None where it is another request."""
    sent_path, _, sent_query = sent.partition("?")
    prefix, *elements = path.rsplit("/", sent_path.count("/"))
    # Go writes fewer characters of a path as escapes than we do, and others.
    same = unquote("/".join(("", *elements))) == unquote(sent_path)
    return prefix if same and parse_qsl(query, True) == parse_qsl(sent_query, True) else None
