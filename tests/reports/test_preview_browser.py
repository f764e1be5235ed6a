"""The preview page in a browser: colours follow the labels, no network requests, readable on a phone."""

import pytest

from nesso_tune import preview
from tests.support.runs import recipe

COLOURS = """() => [...document.querySelectorAll('.text .t')].map(t => {
  const style = getComputedStyle(t);
  return [t.classList.contains('supervised'), t.classList.contains('control'), style.backgroundColor, style.color];
})"""


@pytest.fixture
def file(tmp_path, talks):
    page = tmp_path / "p.html"
    page.write_text(preview(recipe("sft", tmp_path / "run", [talks]), 2).to_html(), encoding="utf-8")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_supervised_and_control_tokens_have_their_colours(browser, file, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(file.as_uri())
    tokens = page.evaluate(COLOURS)
    assert len(tokens) > 50
    backgrounds = {
        label: {background for supervised, _, background, _ in tokens if supervised is label} for label in (True, False)
    }
    assert len(backgrounds[True]) == 1
    assert backgrounds[False] == {"rgba(0, 0, 0, 0)"}, "unsupervised tokens have no background"
    inks = {control: {ink for _, c, _, ink in tokens if c is control} for control in (True, False)}
    assert len(inks[True]) == 1
    assert not inks[True] & inks[False]
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen_and_loads_nothing(browser, file, width):
    page = browser.new_page(viewport={"width": width, "height": 844})
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert requests == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate(
            "Math.min(...[...document.querySelectorAll('.t')].map(t => parseFloat(getComputedStyle(t).fontSize)))"
        )
        >= 12
    )
    page.close()


def test_token_boundaries_show_on_hover(browser, file):
    page = browser.new_page()
    page.goto(file.as_uri())
    first = page.locator(".text").first
    shadow = "t => getComputedStyle(t).boxShadow"
    assert first.locator(".t").nth(1).evaluate(shadow) == "none"
    first.hover()
    assert first.locator(".t").nth(1).evaluate(shadow) != "none"
    assert "id" in first.locator(".t").first.get_attribute("title")
    page.close()
