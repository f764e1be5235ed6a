"""Renders the results of gpu_benchmark.py as Markdown tables."""

import statistics
from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]
SIDES = ("ours", "ours, bfloat16 weights", "TRL")
ACCURACY_LABELS = {
    "loss": "loss of a packed row, relative difference",
    "gradient": "gradient of that row, relative norm of the difference",
    "hidden": "last hidden states of its documents, maximum difference relative to the maximum",
    "answers": "log-probability of an answer, maximum difference (nats/token)",
}
COLUMNS = {
    "sft": ("attention", "step, s", "slowest, s", "tokens/s", "supervised/s", "TFLOP/s", "MFU", "memory, GB",
            "first loss", "speed: ours / TRL"),
    "dpo": ("attention", "step, s", "slowest, s", "pairs/s", "TFLOP/s", "MFU", "memory, GB", "reference, s",
            "training, s", "first loss", "speed: ours / TRL", "training: TRL / ours"),
}  # fmt: skip
TITLES = {"sft": "SFT", "dpo": "DPO"}


def table(lines: Sequence[Line]) -> str:
    """The tables of all results so far."""
    parts = [_machine(line) for line in lines if line["what"] == "setup"]
    parts += [_accuracy(line) for line in lines if line["what"] == "look"]
    for method, columns in COLUMNS.items():
        cases = _medians([line for line in lines if line["what"] == method])
        if cases:
            rows = [_row(line, cases, method) for line in cases]
            parts.append(f"## {TITLES[method]}\n\n{_markdown(('case', *columns), rows)}")
    return "\n\n".join(parts) + "\n"


def _machine(line: Line) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in line["versions"].items())
    peak = "peak unknown" if line["peak"] is None else f"bfloat16 peak {line['peak'] / 1e12:g} TFLOP/s"
    return f"# {line['gpu']}\n\n{versions}; {line['parameters'] / 1e6:.1f} M parameters; {peak}"


def _accuracy(line: Line) -> str:
    title = "## Numerical accuracy\n\nbfloat16 against float32 without packing, padding or shared prompts.\n\n"
    if "error" in line:
        return title + _markdown(("quantity", *SIDES), [("failed", _cell(line["error"]), *[""] * (len(SIDES) - 1))])
    rows = [(what, *(f"{line[side][name]:.1e}" for side in SIDES)) for name, what in ACCURACY_LABELS.items()]
    losses = line["losses"]
    off = [f"{abs(losses[side] - losses['TRL']) / losses['TRL']:.1e}" for side in SIDES[:-1]]
    rows += [
        (f"loss of that row (float32: {losses['float32']:.6f})", *(f"{losses[side]:.6f}" for side in SIDES)),
        ("relative difference to the loss of TRL", *off, ""),
        ("attention kernels called", *(line[side]["attention"] for side in SIDES)),
    ]
    return title + _markdown(("quantity", *SIDES), rows)


def _medians(lines: Sequence[Line]) -> list[Line]:
    """One line per case, in order of first appearance: medians over its successful measurements."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(", ".join([line["side"], *line["traits"]]), []).append(line)
    cases = []
    for name, all_of in found.items():
        good = [line for line in all_of if "error" not in line] or all_of[:1]
        numbers = {key for key, value in good[0].items() if isinstance(value, float)}
        medians = {key: statistics.median(line[key] for line in good) for key in numbers}
        cases.append({**good[0], **medians, "name": name})
    return cases


def _row(line: Line, cases: Sequence[Line], method: str) -> tuple[str, ...]:
    if "error" in line:
        return (line["name"], f"failed: {_cell(line['error'])}", *[""] * (len(COLUMNS[method]) - 1))
    peers = [
        case
        for case in cases
        if case["side"] == "TRL" and "error" not in case
        and ("checkpointing" in case["traits"]) == ("checkpointing" in line["traits"])
    ]  # fmt: skip
    compared = peers if line["side"] == "ours" else []
    speed = line["rows_per_s"] / max(case["rows_per_s"] for case in compared) if compared else None
    done = min(case["training_s"] for case in compared) / line["training_s"] if compared else None
    rates = (
        [f"{line['tokens_per_s']:,.0f}", f"{line['supervised_tokens_per_s']:,.0f}"]
        if method == "sft" else [_number(line["rows_per_s"])]
    )  # fmt: skip
    middle = [_number(line["teraflops"]), _share(line["mfu"]), _number(line["peak_memory_gb"])]
    first = f"{line['losses'][0]:.5f}"
    if method == "sft":
        end = [first, _number(speed)]
    else:
        end = [_number(line["reference_s"]), _number(line["training_s"]), first, _number(speed), _number(done)]
    steps = [f"{line[key]:.3f}" for key in ("step_s", "slowest_step_s")]
    return (line["name"], line["attention"], *steps, *rates, *middle, *end)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(text: str) -> str:
    """Text for one table cell."""
    return " ".join(text.replace("|", "/").split())[:160]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
