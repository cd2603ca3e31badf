"""Where a request came from and how the client reached us, seen through proxies that the operator trusts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from img_serving.api.exchange import Exchange

_HOST = re.compile(rb"[A-Za-z0-9._~-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_PREFIX = re.compile(rb"(/[A-Za-z0-9._~-]+)+")


class Origin:
    """Reads `X-Forwarded-*` from trusted proxies only: from anybody else they are a claim."""

    def __init__(self, trusted_proxies: Sequence[str], public_url: str | None) -> None:
        """`trusted_proxies` are addresses or networks; "*" trusts everybody. `public_url` settles the base URL."""
        self._everybody = "*" in trusted_proxies
        self._networks: list[IPv4Network | IPv6Network] = [
            ip_network(one, strict=False) for one in trusted_proxies if one != "*"
        ]
        self._public_url = public_url.rstrip("/") if public_url else None

    def _trusts(self, address: str) -> bool:
        if self._everybody:
            return True
        if not self._networks:
            return False
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(parsed, "ipv4_mapped", None)
        return any((mapped or parsed) in network for network in self._networks)

    def client_of(self, exchange: Exchange) -> str:
        """The client's address: the last one in X-Forwarded-For that is not a trusted proxy, else the connection's."""
        address = exchange.client_address
        if not self._trusts(address):
            return address
        forwarded = exchange.header(b"x-forwarded-for")
        if forwarded is None:
            return address
        hops = [hop.strip() for hop in forwarded.decode("latin-1").split(",")]
        for hop in reversed(hops):
            if not _is_address(hop):
                break
            address = hop
            if not self._trusts(hop):
                break
        return address

    def base_url(self, exchange: Exchange) -> str:
        """Scheme, host and port as the client used them, without a slash at the end.

        A Host that is no host name (an injection, or nothing at all) is replaced by the address that was connected to.
        """
        if self._public_url is not None:
            return self._public_url
        scheme = exchange.connection.scheme
        host = exchange.header(b"host")
        prefix = b""
        if self._trusts(exchange.client_address):
            proto = _first(exchange.header(b"x-forwarded-proto"))
            if proto in {b"http", b"https"}:
                scheme = proto.decode()
            host = _first(exchange.header(b"x-forwarded-host")) or host
            port = _first(exchange.header(b"x-forwarded-port"))
            if port and port.isdigit() and host and b":" not in host and port not in {b"80", b"443"}:
                host = host + b":" + port
            claimed = (_first(exchange.header(b"x-forwarded-prefix")) or b"").rstrip(b"/")
            prefix = claimed if _PREFIX.fullmatch(claimed) else b""
        if host is None or len(host) > 255 or not _HOST.fullmatch(host):
            address, port_number = exchange.connection.server or ("localhost", None)
            name = f"[{address}]" if ":" in address else address
            host = (f"{name}:{port_number}" if port_number else name).encode()
        return f"{scheme}://{host.decode()}{prefix.decode()}"


def _first(value: bytes | None) -> bytes | None:
    return value.partition(b",")[0].strip() if value else None


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
