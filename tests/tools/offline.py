"""No test and no page reaches a network: a connection to anything but this machine is refused, and remembered."""
import os
import socket

LOCAL = ("127.", "localhost", "::1", "0.0.0.0")
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "all", "ftp")]


class NetworkRefused(OSError):
    "A connection that the tests do not allow"


def is_local(address) -> bool:
    "A Unix socket or an address of this machine"
    return not isinstance(address, tuple) or str(address[0]).startswith(LOCAL)


def refuse_network(attempts: list):
    "Patch the socket so that only this machine is reachable, and return the function that undoes it"
    proxies = {n: os.environ.pop(n) for o in PROXIES for n in (o, o.upper()) if n in os.environ}  # a proxy may be local
    saved = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def checked(real):
        def call(self, address, *args):
            if not is_local(address):
                attempts.append(address[:2])
                raise NetworkRefused(f"the tests reach no network: {address[:2]} was asked for")
            return real(self, address, *args)
        return call

    def getaddrinfo(host, *args, **kwargs):
        if host is not None and not str(host).startswith(LOCAL):
            attempts.append((host, *args[:1]))
            raise socket.gaierror(socket.EAI_NONAME, f"the tests reach no network: {host!r} was asked for")
        return saved[2](host, *args, **kwargs)

    def undo():
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = saved
        os.environ.update(proxies)

    socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = checked(saved[0]), checked(saved[1]), getaddrinfo
    return undo
