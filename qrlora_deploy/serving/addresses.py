"""Addresses that a server listens on."""

import socket

from qrlora_deploy.errors import InputError


def at_port(host: str, port: int) -> str:
    """An address as URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound_socket(host: str, port: int, is_shared: bool = False) -> socket.socket:
    """A socket that has an address and does not listen yet.

    Args:
        host: address.
        port: 0: any that is free.
        is_shared: other processes of this user may listen there, too, if they say so; clients are spread over them.

    Raises:
        InputError: the address is taken or none.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be listened on: {reason}; choose another host or port") from error
    return found
