"""The base model, its adapters and its head."""

import logging

# peft imports bitsandbytes where it is installed, which then misses a faster kernel of its own that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
