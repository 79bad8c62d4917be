"""The addresses of reward servers, and the keys in them, which no log may show."""

import ipaddress
import os
import re
from collections.abc import Iterable
from urllib.parse import quote

import httpx

VARIABLE = re.compile(r"([\w.-]+)=\$\{(\w+)\}")  # KEY=${VARIABLE} in a query


def split_replicas(location: str) -> tuple[str, ...]:
    """Split ``URL|URL…`` into URLs, with the values of the environment variables in their queries.

    Raises:
        ValueError: a URL is not http or https, has no host, contains a user name or password, or has a query that is
            not ``KEY=${VARIABLE}``: OpenRLHF prints its arguments, trackers and other users of the machine see them.

    >>> split_replicas("http://a:5000/get_reward|https://b/get_reward")
    ('http://a:5000/get_reward', 'https://b/get_reward')
    """
    replicas = tuple(map(_fill_in, location.split("|")))
    for url in replicas:
        if not _is_usable(url):
            # The part before an @ may be a password.
            shown = "one with '@', not shown because it may contain a password" if "@" in url else repr(redact(url))
            raise ValueError(f"a replica must be http(s)://HOST[:PORT]/PATH without user or password, found {shown}")
    return replicas


def keys_of(location: str) -> list[str]:
    """The values of the variables in the queries."""
    return [os.environ[variable] for _, variable in VARIABLE.findall(location)]


def forms_of(secrets: Iterable[str]) -> list[str]:
    """The forms in which a server, or an error of httpx about it, may repeat secrets, the longest first.

    >>> print(*forms_of(["a'b"]))
    a%27b a\\'b a'b
    """
    forms = set()
    for secret in secrets:
        of_bytes = repr(bytearray(secret.encode())).removeprefix("bytearray(b")[1:-2]
        forms |= {secret, quote(secret, safe=""), repr(secret)[1:-1], of_bytes}
    return sorted(forms, key=lambda form: (-len(form), form))


def _fill_in(url: str) -> str:
    """Replace ``${VARIABLE}`` in the query by its value."""
    address, mark, query = url.partition("?")
    if not mark:
        return url
    filled = []
    for part in query.split("&"):
        match = VARIABLE.fullmatch(part)
        if not match or not os.environ.get(match[2]):
            problem = f"the variable {match[2]} unset or empty" if match else "other text, not shown"
            raise ValueError(
                "the query of a replica may contain a key, which would be printed: it must be KEY=${VARIABLE}, in "
                f"single quotes for the shell, with an environment variable that is set; found {problem}"
            )
        filled.append(f"{match[1]}={quote(os.environ[match[2]], safe='')}")
    return f"{address}?{'&'.join(filled)}"


def _is_usable(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    has_port = url.port is None or 0 < url.port < 2**16
    plain = " " not in text and "#" not in text  # a fragment is not sent
    return url.scheme in ("http", "https") and url.host != "" and has_port and not url.userinfo and plain


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def redact(url: str) -> str:
    """The URL without its query, which may contain a key."""
    return re.split("[?#]", url)[0]
