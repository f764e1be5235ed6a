"""The run report in a browser: axes, hover values, legends, filters and zoom; no request, no error, on every screen."""

import json

import pytest

from nesso_tune.reports.run_report import write_report

SCREENS = [(1440, "light"), (390, "light"), (1440, "dark")]
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => { const [r, g, b] = c.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const background = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.endsWith(', 0)')) return c; } return 'rgb(255, 255, 255)'; };
  const texts = [...document.querySelectorAll('h1, h2, h3, p, dt, dd, td, th, button, label, header, .text, pre')];
  return Math.min(...texts.filter(e => e.textContent.trim()).map(e => {
    const [a, b] = [luminance(rgb(getComputedStyle(e).color)), luminance(rgb(background(e)))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
}"""

MANIFEST = {"nesso_tune": "0.1.0", "recipe": {"train": {"learning_rate": 0.1}}, "world_size": 1}


@pytest.fixture
def report(tmp_path):
    """The report of a run of 400 steps that was resumed and had an alarm."""
    lines = [{"step": 200, "event": "resumed"}]
    for step in range(1, 401):
        lines.append(
            {"step": step, "loss": 10.4 - step / 600, "loss/it": 10.5, "loss/en": 10.3, "grad_norm": 1e-3 * step}
        )
    for step in (100, 200, 300, 400):
        prompt = {"language": "it", "prompt": "user\nCiao?\nassistant\n", "expected": "Ciao!"}
        lines.append({"step": step, "eval_loss": 9.0, "stop_rate": 0.5})
        answer = "Ciao!" if step < 400 else "ciao ciao ciao"
        lines.append({"step": step, "event": "answer", "answer": answer, "stopped": step < 400, **prompt})
        lines.append({"step": step, "event": "answer", "answer": "Hi!", "stopped": True, "language": "en",
                      "prompt": "user\nHi?\nassistant\n", "expected": "Hi!"})  # fmt: skip
    lines.append({"step": 400, "event": "alarm", "alarm": "stop_rate_falls", "said": "half stop; lower the rate"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    return write_report(tmp_path)


@pytest.fixture
def page(request, browser, report):
    width, scheme = getattr(request, "param", SCREENS[0])
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.faults = []
    page.on(
        "console", lambda message: page.faults.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda sent: page.faults.append(sent.url) if sent.url != report.as_uri() else None)
    page.goto(report.as_uri())
    page.wait_for_selector(".chart .main-svg")
    yield page
    assert page.faults == []
    page.close()


def becomes_true(page, expression):
    """Waits for an expression; `wait_for_function` needs `eval`, which the page forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


on_all_screens = pytest.mark.parametrize("page", SCREENS, ids=lambda one: f"{one[0]}-{one[1]}", indirect=True)


@on_all_screens
def test_the_page_fits_the_screen_and_is_readable(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.evaluate(CONTRAST) >= 4.5, "WCAG AA"


def test_axes_have_ticks_and_do_not_start_at_zero(page):
    chart = page.locator(".chart").first
    texts = chart.locator(".ytick text").all_text_contents()
    assert len(texts) >= 3
    assert len(chart.locator(".xtick text").all_text_contents()) >= 3
    assert min(float(text.replace("−", "-")) for text in texts) > 9, "the loss falls from 10.4 to 9.7"


def test_hovering_shows_values(page):
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .legend, .hoverlayer .hovertext")
    shown = chart.locator(".hoverlayer").text_content()
    assert "loss/it" in shown
    assert "10.5" in shown


def test_a_curve_and_a_language_can_be_hidden_by_keyboard(page):
    def curves():
        return page.evaluate("document.querySelector('.chart').data.filter(t => t.yaxis !== 'y2').map(t => t.name)")

    assert curves() == ["loss", "loss/en", "loss/it"]
    page.locator(".legend button", has_text="loss/en").first.focus()
    page.keyboard.press("Enter")
    assert curves() == ["loss", "loss/it"]
    page.locator("#parts button", has_text="it").focus()
    page.keyboard.press("Space")
    assert curves() == ["loss"]


def test_zoom_is_shared_and_scales_can_be_changed(page):
    page.evaluate("Plotly.relayout(document.querySelector('.chart'), {'xaxis.range[0]': 100, 'xaxis.range[1]': 200})")
    page.locator(".chart").nth(1).scroll_into_view_if_needed()
    becomes_true(page, "document.querySelectorAll('.chart')[1].layout?.xaxis.range?.[0] === 100")
    page.locator("#reset").click()
    becomes_true(page, "document.querySelectorAll('.chart')[0].layout.xaxis.range[0] < 50")
    page.locator("#log").check()
    assert page.evaluate("document.querySelector('.chart').layout.yaxis.type") == "log"
    page.locator("#smoothing").fill("0.9")
    assert page.evaluate("document.querySelector('.chart').data.length") > 4, "raw and smoothed curves"


def test_events_are_marked_and_answers_can_be_filtered(page):
    marks = page.evaluate("document.querySelector('.chart').data.find(t => t.yaxis === 'y2').text")
    assert marks == ["resumed here", "stop_rate_falls: half stop; lower the rate"]
    shown = page.locator("article:visible")
    assert shown.count() == 2
    page.locator("#worse").check()
    assert shown.count() == 1
    assert "did not stop" in shown.first.text_content()
    page.locator("#language").select_option("en")
    assert shown.count() == 0
