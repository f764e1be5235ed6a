"""The command line without network access: connections to other machines are logged and refused. For tests only.

WAYS_OUT: log file.
"""

import os
import sys

EVENTS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind")


def hook(event, arguments):
    if event not in EVENTS:
        return
    where = arguments[1] if event in ("socket.connect", "socket.sendto", "socket.bind") else arguments[0]
    host = where[0] if isinstance(where, tuple) else where
    if isinstance(where, (str, bytes)) and event in ("socket.connect", "socket.sendto", "socket.bind"):
        return  # a Unix socket
    if host in (None, "", "localhost", "127.0.0.1", "::1") or str(host) == os.uname().nodename:
        return
    with open(os.environ["WAYS_OUT"], "a", encoding="utf-8") as log:
        log.write(f"{event} {where}\n")
    raise OSError(f"shut in: {event} {where}")


sys.addaudithook(hook)

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
