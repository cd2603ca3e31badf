"""Which addresses are public, in every form that an address has."""

from __future__ import annotations

import pytest

from img_serving.policy.public_addresses import is_public_address


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8",
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::", "::1",
        "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
        "ff02::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1",
        "2001:0:7f00:1::", "::127.0.0.1", "2001:db8::1", "localhost", "",
    ],
)  # fmt: skip
def test_addresses_of_our_own_network_and_of_nobody(address):
    assert not is_public_address(address)
