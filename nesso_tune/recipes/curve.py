"""The learning-rate curve as a small plot for the terminal."""

from __future__ import annotations

from nesso_tune.recipes.plan import SchedulePlan

BLOCKS = " ▁▂▃▄▅▆▇█"


def curve(schedule: SchedulePlan, width: int = 60, height: int = 6, shares: bool = False) -> list[str]:
    """Lines of a bar plot: one column per share of the run, the peak at the top, steps (or shares) along the foot."""
    last = max(schedule.total_steps - 1, 1)
    values = [schedule.multiplier(round(x * last / (width - 1))) for x in range(width)]
    labels = [f"{schedule.peak:.2g}", f"{schedule.peak / 2:.2g}", "0"]
    margin = max(map(len, labels))
    lines = []
    for row in range(height, 0, -1):
        cells = "".join(_cell(value * height - (row - 1)) for value in values)
        label = labels[0] if row == height else labels[1] if row == height // 2 else ""
        lines.append(f"{label:>{margin}} |{cells}")
    start, end = ("0 %", "100 %") if shares else ("step 0", str(schedule.total_steps))
    foot = f"{start}{end:>{width - len(start)}}"
    return [*lines, f"{labels[2]:>{margin}} +{'-' * width}", f"{'':>{margin}}  {foot}"]


def _cell(filled: float) -> str:
    return BLOCKS[max(0, min(8, round(filled * 8)))]
