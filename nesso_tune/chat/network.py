"""Whether the hub can be reached: asked once, shortly, so that a machine without a network does not wait and retry."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit

PATIENCE_S = 3.0
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def offline_if_unreachable() -> None:
    """Sets `HF_HUB_OFFLINE` for this process if the hub does not answer: its libraries then look into the cache alone.

    To be called before they are imported, when they read it. Behind a proxy nothing is tried: the proxy decides.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not any(os.environ.get(name) for name in PROXIES) and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


@lru_cache(maxsize=1)
def _reachable() -> bool:
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "huggingface.co", port), timeout=PATIENCE_S):
            return True
    except OSError:
        return False
