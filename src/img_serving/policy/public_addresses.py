"""Which addresses belong to the public Internet: the rule behind every connection to a URL that somebody else named."""

from __future__ import annotations

import ipaddress
from typing import Final

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address that is reached through it (RFC 6052)."""


def is_public_address(address: str) -> bool:
    """Whether an address belongs to the public Internet: not private, loopback, link-local, multicast, metadata or reserved.

    IPv6 forms that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by that one too.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped
        if translated is not None:
            return is_public_address(str(translated))
        if any(not is_public_address(str(one)) for one in (ip.sixtofour, *(ip.teredo or ())) if one is not None):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
