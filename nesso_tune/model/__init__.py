"""Base models: loading, attention, the LM head, the forward path, and adapters."""
