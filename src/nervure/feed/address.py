"""Addresses of feeds and papers: which ones are followed, and where a feed may send us."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urldefrag, urljoin, urlsplit

from nervure._kit import UsageError

_PRINTABLE = re.compile(r"[\x21-\x7e]{1,2000}")


def web_address(text: object) -> str:
    """Return an address if it is one of the web.

    Args:
        text: Anything.

    Returns:
        The address without its fragment; empty if it is not http or https, names no host, holds a password, blanks or
        control characters, or is longer than 2000 characters.

    Examples:
        >>> web_address("https://example.org/a#top"), web_address("javascript:alert(1)"), web_address("file:///etc/passwd")
        ('https://example.org/a', '', '')
    """
    if not isinstance(text, str) or not _PRINTABLE.fullmatch(text):
        return ""
    try:
        parts = urlsplit(text)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # no number where the port stands, or half an IPv6 address
        return ""
    return urldefrag(text).url if fine else ""


def source_address(text: str) -> str:
    """Return the address of a feed that the user names.

    Args:
        text: What the user typed.

    Returns:
        The address.

    Raises:
        UsageError: If it is not an address of the web.
    """
    if found := web_address(text.strip()):
        return found
    raise UsageError(
        "this is no feed's address", expected="http:// or https://, without a password", found=repr(text[:200])
    )


def redirected(first: str, here: str, location: str | None) -> str:
    """Return where a redirect leads, if it may be followed.

    A feed on the internet cannot send us to a machine of the user's own network, nor off TLS.

    Args:
        first: The address the user asked for.
        here: The address that redirects.
        location: What it says.

    Returns:
        The address, or an empty string if it may not be followed.
    """
    try:
        there = web_address(urljoin(here, location)) if location else ""
    except ValueError:
        return ""
    if not there or (here.startswith("https:") and not there.startswith("https:")):
        return ""
    return "" if _inside(there) and not _inside(first) else there


def _inside(address: str) -> bool:
    """Return whether a name leads to an address that is not of the internet."""
    try:
        found = socket.getaddrinfo(urlsplit(address).hostname, None)
    except (OSError, UnicodeError):
        return False  # behind a proxy names need not be known here; without one, the request itself fails
    machines = [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    return any(not (getattr(machine, "ipv4_mapped", None) or machine).is_global for machine in machines)
