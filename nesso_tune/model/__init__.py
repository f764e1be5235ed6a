"""Base models: loading, attention, the LM head, the forward path, and adapters."""

import logging

# peft imports bitsandbytes if it is installed, which then warns about a missing CPU kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
