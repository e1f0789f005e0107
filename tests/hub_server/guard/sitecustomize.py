"""Refuse look-ups of other hosts in every process of the tests.

Python imports this module at its start if the folder is on PYTHONPATH, so child processes are covered too. Look-ups by
libraries that are not written in Python are not seen. A refused look-up fails as it does without a network, and is
recorded in the file that CAR_DATASETS_LOOKUPS names: conftest.py then fails the test, even if a library swallows the
error.
"""

import os
import socket
import sys

HERE = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}
# `datasets` derives this host from the endpoint's, and continues without it.
MADE_UP = "datasets-server."
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect")


def refuse_strangers(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse a look-up of, or a connection to, any other host, as an audit hook."""
    if event not in LOOKUPS:
        return
    host = arguments[0]
    if event == "socket.connect":
        address = arguments[1]
        if not isinstance(address, tuple):  # a Unix socket, whose address is a path
            return
        host = address[0]
    host = host.decode() if isinstance(host, bytes) else str(host or "")
    if host in HERE or host.startswith("127."):
        return
    record = os.environ.get("CAR_DATASETS_LOOKUPS")
    if record and not host.startswith(MADE_UP):
        with open(record, "a", encoding="utf-8") as file:
            file.write(f"{host} ({event}, process {os.getpid()}: {' '.join(sys.argv)[:80]})\n")
    raise socket.gaierror(socket.EAI_NONAME, f"the tests look up no other host than this one, and not {host}")


sys.addaudithook(refuse_strangers)
