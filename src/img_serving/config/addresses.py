"""What an address in the settings may look like: endpoint URLs, the public URL, origins, networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

HTTP_SCHEMES = frozenset({"http", "https"})
GRPC_SCHEMES = HTTP_SCHEMES | {"grpc", "grpcs"}


def _is_plain(text: str) -> bool:
    return all("!" <= char <= "~" for char in text) and "\\" not in text


def fault_of_url(url: str, schemes: Collection[str] = HTTP_SCHEMES) -> str | None:
    """Why `url` is no address to build upon, or None. The answer never repeats the URL, which may hold a password."""
    wanted = " or ".join(f"{scheme}://" for scheme in sorted(schemes))
    if not _is_plain(url):
        return "has a blank, a control character, a backslash or a letter outside ASCII: write a host as xn--…, a path as %XX"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL: the host or the port is malformed (ports are 1 to 65535)"
    if parts.scheme not in schemes or not url.lower().startswith(f"{parts.scheme}://"):
        return f"must begin with {wanted}, for example {min(schemes)}://localhost:7860"
    if "@" in parts.netloc:
        return "has a user name or password in it: use the backend's `username` and `password` keys instead"
    if "?" in url or "#" in url:
        return "has a query or a fragment: an address ends with its path"
    if not parts.hostname:
        return "has no host"
    if port == 0 or parts.netloc.endswith(":"):
        return "has no usable port: ports are 1 to 65535"
    return None


def base_of(url: str) -> str:
    """The address that API paths are appended to: no trailing slash, no `/v1` at the end; a path prefix stays."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if path == "/v1" or path.endswith("/v1"):
        path = path[: -len("/v1")].rstrip("/")
    return SplitResult(parts.scheme, parts.netloc, path, "", "").geturl()


def fault_of_origin(origin: str) -> str | None:
    """Why `origin` cannot be what a browser sends as `Origin`, or None."""
    if origin in {"*", "null"}:
        return None
    fault = fault_of_url(origin)
    if fault is None and urlsplit(origin).path:
        return "has a path: an origin is scheme://host[:port], without a slash at the end"
    return fault


def fault_of_network(text: str) -> str | None:
    """Why `text` is neither an IP address nor a network, or None."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "is neither an IP address nor a network such as 10.0.0.0/8 (0.0.0.0/0 and ::/0 mean everybody)"
    return None
