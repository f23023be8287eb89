"""Which addresses a tool may connect to: public ones, and those of hosts that the operator names."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable

import httpcore2

from jaxcept.tools.output import ToolError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

# Where clouds answer for a machine's own credentials: refused even for a host on the allow-list, unless the address
# itself is on it. The last one lies in a public range.
_METADATA = {"169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"}
# What the standard library's is_global lets through, or did in some version.
_SPECIAL = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "3fff::/20")]
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressGuard:
    """Resolves names and refuses what is not public, but for `allow_hosts`: names or addresses."""

    def __init__(self, allow_hosts: Collection[str] = (), resolve: Resolve | None = None) -> None:
        self._allowed = {_plain(host) for host in allow_hosts}
        self._resolve = resolve or _getaddrinfo

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses to connect to: exactly these, for a name may resolve differently the next time.

        Raises ToolError if any of them may not be connected to, OSError where the name does not resolve.
        """
        found = await self._resolve(host, port)
        if not found:
            raise OSError(f"the name {host[:80]!r} has no address")
        refused = [each for each in found if not self._is_allowed(_plain(host), each)]
        if refused:
            raise ToolError(
                f"{host[:80]!r} is not a public address, and tools may connect to public ones alone "
                "(whoever runs this server can allow the host)"
            )
        return found

    def _is_allowed(self, host: str, text: str) -> bool:
        try:
            address = _innermost(ipaddress.ip_address(text.partition("%")[0]))
        except ValueError:
            return False
        if str(address) in self._allowed:
            return True
        if str(address) in _METADATA:
            return False
        return host in self._allowed or _is_public(address)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses that the guard has checked, whatever connection asks for them."""

    def __init__(self, guard: AddressGuard) -> None:
        self._guard = guard
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first checked address of the host that answers."""
        failure: Exception | None = None
        for address in await self._guard.addresses(host, port):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        assert failure is not None, "there is at least one address"
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Refused: a URL never means a local socket."""
        raise ToolError("tools may not connect to local sockets")

    async def sleep(self, seconds: float) -> None:
        """Wait, between attempts to connect."""
        await asyncio.sleep(seconds)


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast or any(address in network for network in _SPECIAL):
        return False
    return isinstance(address, ipaddress.IPv4Address) or address in _UNICAST


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it stands for one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else address)


def _plain(host: str) -> str:
    """A host as it is compared: lower case, no brackets, no final dot, addresses in their one spelling."""
    host = host.strip().strip("[]").rstrip(".").lower()
    try:
        return str(_innermost(ipaddress.ip_address(host)))
    except ValueError:
        return host


async def _getaddrinfo(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"the name {host[:80]!r} does not resolve") from error
    return list(dict.fromkeys(str(where[4][0]) for where in found))
