"""Log-likelihoods of token sequences under a model folder, by transformers alone.

This file imports nothing of nesso-tune, and runs by itself with any transformers from 4.56 on:

    python -P nesso_tune/export/plain_loss.py < request.json

The request is one JSON object with the arguments of `log_likelihoods`. The reply, on stdout, has `log_likelihoods` and
`transformers`, or `error`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def log_likelihoods(
    folder: str, sequences: list[dict[str, list[int]]], trust_remote_code: bool = False, gpu: int | None = None
) -> list[float]:
    """The summed log-probability of the supervised tokens of each sequence, in float32.

    Each sequence is a forward pass of its own: no padding, no packing, no attention mask, no cache.

    Args:
        folder: a model folder with config.json and weights.
        sequences: `{"ids": token ids, "supervised": positions of the supervised tokens, none of them 0}`.
        trust_remote_code: run code of the model folder.
        gpu: index of the GPU to use if the model fits on it; None for the CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    ).eval()
    device, needed = "cpu", 2 * sum(4 * weight.numel() for weight in model.parameters())
    if gpu is not None and torch.cuda.is_available() and torch.cuda.mem_get_info(gpu)[0] > needed:
        device = f"cuda:{gpu}"
        model.to(device)
    found = []
    for sequence in sequences:
        positions = torch.tensor(sequence["supervised"], device=device)
        ids = torch.tensor([sequence["ids"]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].index_select(0, positions - 1).float()
        chosen = logits.gather(1, ids[0].index_select(0, positions)[:, None])[:, 0]
        found.append(float((chosen - logits.logsumexp(dim=1)).double().sum()))
    return found


def reply(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request; see above. An error is its type and first line."""
    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return {"log_likelihoods": log_likelihoods(**request), "transformers": __version__}
    except Exception as error:  # of whatever kind the model's code raises
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}


def main() -> None:
    """Replies to the request on stdin. Signals are left to the process that started this one."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    request = sys.stdin.readline()
    if request:  # otherwise the other process has ended
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is not part of the reply
        json.dump(reply(json.loads(request)), out)
        out.close()


if __name__ == "__main__":
    main()
