"""Which ports are free on this host."""

from __future__ import annotations

import socket

import psutil


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def why_taken(host: str, port: int) -> str:
    """ "" when a server could listen on host:port, else why not."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        return f"{host} is no address of this machine ({error.strerror})"
    try:
        with socket.create_server((host, port), family=family):
            return ""
    except PermissionError:
        return f"listening on port {port} needs more rights than this user has"
    except OSError as error:
        owner = _owner(port)
        return f"port {port} on {host} is taken{owner}" if owner else f"cannot listen on {host}:{port}: {error.strerror}"


def why_silent(host: str, port: int, patience: float = 5.0) -> str:
    """ "" when somebody listens on host:port, else why not."""
    try:
        socket.create_connection((host, port), patience).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


def _owner(port: int) -> str:
    """ " by process N (name)" where that can be found out."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:2] == (port,):
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        return ""
    return ""
