"""Who holds which key: only digests are kept, and they are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from img_serving.domain.tenants import ANONYMOUS, Tenant


def digest_of(key: str | bytes) -> bytes:
    """The SHA-256 digest of a key (32 bytes). Keys are long and random, so no slow hash is called for."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


class KeyRing:
    """Tenants by the digest of their key."""

    def __init__(self, entries: Iterable[tuple[bytes, Tenant]]) -> None:
        """`entries` are (digest, tenant); of two equal digests the first stands."""
        self._tenants: dict[bytes, tuple[bytes, Tenant]] = {}
        for digest, tenant in entries:
            self._tenants.setdefault(digest, (digest, tenant))

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant_named(self, name: str) -> Tenant:
        """The owner of a job from before a restart; whose key is gone may do no more than any user."""
        for _, tenant in self._tenants.values():
            if tenant.name == name:
                return tenant
        return ANONYMOUS if name == ANONYMOUS.name else Tenant(name=name)

    def authenticate(self, key: bytes) -> Tenant | None:
        """The owner of `key`, or None.

        The look-up goes by digest, so what its timing could tell is about digests, not keys; the stored one is still
        compared in constant time.
        """
        digest = digest_of(key)
        found = self._tenants.get(digest)
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1]
