"""How fast `report.html` of a long run opens in headless Chromium. Run by hand on a quiet machine:

    python -m tests.benchmarks.report_page [--lines 10000] [--repeats 3] [--keep FOLDER]

The run has 10,000 lines of metrics in two languages and eight sources, three resumes, an alarm, answers to 200 prompts
at four evaluations, and ends with NaN. It prints medians in milliseconds. Since the navigation began: the document is
parsed, the load event, and the charts near the first screen are drawn; others are drawn when they come near it. `CPU
time` is that of the main thread of the page until then, which other programs change least. `all charts` is the time to
draw all charts of the page at once, as for printing.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nesso_tune.reports.run_report import write_report
from tests.reports.conftest import CHROMIUM
from tests.support.run_directories import write_run

SOURCES, LANGUAGES, PROMPTS, EVALUATIONS, RESUMES = 8, ("it", "en"), 200, 4, 3
WIDTHS = (1440, 390)
PAGE_TIMEOUT_S = 20
NOTE_DRAWN = """(() => {
  const isDrawn = () => {
    const charts = [...document.querySelectorAll('.chart')];
    const near = charts.filter(chart => chart.getBoundingClientRect().top < innerHeight + 50);
    return document.readyState === 'complete' && near.every(chart => chart.querySelector('.main-svg'));
  };
  const look = () => { if (isDrawn()) window.drawnAt = performance.now(); else requestAnimationFrame(look); };
  requestAnimationFrame(look);
})()"""
DRAW_ALL = """() => {
  const begin = performance.now();
  dispatchEvent(new Event('beforeprint'));
  return performance.now() - begin;
}"""


def metric_lines(lines: int) -> list[dict[str, Any]]:
    """The metrics of a long run, seeded."""
    rng, found = random.Random(0), []
    for i in range(1, lines + 1):
        step, base = 10 * i, 2 + 8 * math.exp(-4 * i / lines)
        line: dict[str, Any] = {name: base + rng.gauss(0, 0.2) for name in by_group("loss")}
        line |= {"step": step, "learning_rate": 1e-3 * (1 - i / lines), "grad_norm": rng.random()}
        line |= {"epoch": 3 * i / lines, "token_accuracy": 1 - base / 12, "mfu": 0.4, "mfu_common": 0.45}
        line |= {"tokens_per_second": 50_000 * rng.uniform(0.9, 1), "seconds": i * 10.0, "tokens": i * 500_000}
        line |= {"peak_memory_gb": 61.2, "data_wait_share": 0.01 * rng.random()}
        found.append(line)
        if i % (lines // (RESUMES + 1)) == 0 and i < lines:
            found.append({"step": step, "event": "resumed"})
        if i % (lines // EVALUATIONS) == 0:
            found += evaluation(step, base, rng)
    alarm = {"event": "alarm", "alarm": "stop_rate_falls", "said": "half of the answers stop; lower the rate"}
    return [*found, {"step": 10 * lines, **alarm}, {"step": 10 * lines + 10, "loss": "nan", "grad_norm": "nan"}]


def by_group(name: str) -> list[str]:
    """A metric over all rows, by language and by source."""
    parts = [*LANGUAGES, *(f"source/data/{i}.jsonl" for i in range(SOURCES))]
    return [name, *(f"{name}/{part}" for part in parts)]


def evaluation(step: int, base: float, rng: random.Random) -> list[dict[str, Any]]:
    """The lines of one evaluation, with an answer to each prompt."""
    line: dict[str, Any] = {"step": step} | {name: base + rng.gauss(0, 0.1) for name in by_group("eval_loss")}
    line |= {name: rng.random() for name in ("stop_rate", "exact_match", "language_fidelity", "repetition_rate")}
    found, prompts = [line], random.Random(7)
    for i in range(PROMPTS):
        prompt = {"prompt": f"user\n{words(prompts, 40)} ({i})?\nassistant\n", "expected": words(prompts, 60)}
        answer = {"language": LANGUAGES[i % 2], "answer": words(rng, 80), "stopped": rng.random() > 0.1}
        found.append({"step": step, "event": "answer", **prompt, **answer})
    return found


def words(rng: random.Random, count: int) -> str:
    """Random words."""
    return " ".join("".join(rng.choices("aeioulnrst", k=rng.randint(2, 9))) for _ in range(count))


def measure(browser: Any, report: Path, width: int) -> dict[str, float]:
    """Opens the page once; milliseconds by name. Raises RuntimeError for a message on the console or a request."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda sent: faults.append(sent.url) if sent.url != report.as_uri() else None)
    page.add_init_script(NOTE_DRAWN)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(report.as_uri())
    deadline = time.monotonic() + PAGE_TIMEOUT_S
    while not (drawn := page.evaluate("window.drawnAt")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the charts at {width} px are not drawn after {PAGE_TIMEOUT_S} s")
        page.wait_for_timeout(50)
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
    counters = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    found = {"DOMContentLoaded": timing["domContentLoadedEventEnd"], "load": timing["loadEventEnd"]}
    found |= {"charts drawn": drawn, "CPU time": 1000 * counters["TaskDuration"], "all charts": page.evaluate(DRAW_ALL)}
    undrawn = page.evaluate("document.querySelectorAll('.chart:not(:has(.main-svg))').length")
    page.close()
    if faults or undrawn:
        raise RuntimeError("; ".join(faults) or f"{undrawn} charts are not drawn")
    return found


def main() -> None:
    """Writes the run and its report, and prints a line for each width."""
    parser = argparse.ArgumentParser(description="Time to open the report of a long run")
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the run in this new folder")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = write_run((arguments.keep or Path(folder)) / "run", metric_lines(arguments.lines), state="failed")
        begin = time.perf_counter()
        report = write_report(run)
        print(f"written in {time.perf_counter() - begin:.2f} s, {report.stat().st_size / 1e6:.2f} MB")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in WIDTHS:
            times = [measure(browser, report, width) for _ in range(arguments.repeats + 1)][1:]
            medians = {name: statistics.median(each[name] for each in times) for name in times[0]}
            shown = ", ".join(f"{name} {value:.0f} ms" for name, value in medians.items())
            print(f"{width} px, {len(times)} times: {shown}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
