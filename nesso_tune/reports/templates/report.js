// Draws the charts with Plotly: one colour per language, source or run in all charts, a common x axis, marks of events.
"use strict";
(() => {
  const { charts, marks } = JSON.parse(document.getElementById("chart-data").textContent);
  // Okabe and Ito's colours, which colour-blind readers can tell apart; adjusted for contrast on each background.
  const PALETTES = {
    light: { ink: "#1d1d1f", grid: "#e4e4e8", paper: "#ffffff", alarm: "#b3261e",
      colours: ["#0060a0", "#c04a00", "#00805f", "#a0487a", "#8a6100", "#2a7fb0", "#5b5b63"] },
    dark: { ink: "#ececef", grid: "#37373d", paper: "#161618", alarm: "#ff8a80",
      colours: ["#56b4e9", "#ff9a5c", "#3fcf9f", "#e89cc8", "#e9b83a", "#8ab8ff", "#b4b4bc"] },
  };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SYMBOLS = { alarm: "triangle-up", checkpoint: "diamond-open", best: "star", resumed: "line-ns-open", end: "x" };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const log = document.getElementById("log"), smoothing = document.getElementById("smoothing");
  const hidden = new Set(); // names of hidden parts, and chart:series of hidden curves
  let range = null; // of the x axis; null for the whole run

  const palette = () => (dark.matches ? PALETTES.dark : PALETTES.light);
  const colourOf = (series) => (series.colour < 0 ? palette().ink : palette().colours[series.colour % 7]);

  // Exponential moving average, corrected for its start at 0 (as Adam's moments are).
  function smooth(values, weight) {
    let average = 0, total = 0;
    return values.map((value) => {
      average = weight * average + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return average / total;
    });
  }

  function traces(chart, index) {
    const weight = Number(smoothing.value), found = [];
    chart.series.forEach((series, i) => {
      if (hidden.has(series.part) || hidden.has(`${index}:${i}`)) return;
      const line = { color: colourOf(series), width: series.colour < 0 ? 2 : 1.6, dash: DASHES[series.dash % 5] };
      const mode = series.x.length < 30 ? "lines+markers" : "lines";
      const common = { x: series.x, mode, line, marker: { size: 5, color: line.color }, name: series.name };
      if (weight > 0 && series.group !== "plan") {
        found.push({ ...common, y: series.y, opacity: 0.25, hoverinfo: "skip", mode: "lines" });
        found.push({ ...common, y: smooth(series.y, weight) });
      } else found.push({ ...common, y: series.y });
    });
    if (marks.length) found.push({
      x: marks.map((mark) => mark.step), y: marks.map(() => 0), yaxis: "y2", cliponaxis: false, mode: "markers", name: "",
      text: marks.map((mark) => mark.text.replace(/(.{60}\S*)\s/g, "$1<br>")), hovertemplate: "step %{x}<br>%{text}<extra></extra>",
      marker: { size: 9, symbol: marks.map((mark) => SYMBOLS[mark.kind]),
        color: marks.map((mark) => (["alarm", "end"].includes(mark.kind) ? palette().alarm : palette().ink)) },
    });
    return found;
  }

  function layout(chart) {
    const { ink, grid, paper, alarm } = palette();
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, nticks: 6, tickfont: { size: 11 } };
    const lines = marks.filter((mark) => ["alarm", "resumed", "end"].includes(mark.kind));
    const values = chart.series.flatMap((series) => series.y).filter((value) => value !== null);
    // of a share that never changes: Plotly would show impossible values around it
    const constant = values.length && values.every((value) => value === values[0]) && values[0] >= 0 && values[0] <= 1;
    const positive = chart.series.some((series) => series.y.some((value) => value > 0));
    return {
      autosize: true, height: 250, margin: { l: 48, r: 10, t: 6, b: 34 }, showlegend: false, paper_bgcolor: paper,
      plot_bgcolor: paper, font: { color: ink, family: "system-ui, sans-serif" }, hovermode: "x unified",
      hoverlabel: { bgcolor: paper, font: { color: ink, size: 12 } },
      xaxis: { ...axis, title: { text: "step", font: { size: 11 }, standoff: 4 }, autorange: range === null, ...(range ? { range } : {}) },
      yaxis: { ...axis, type: log.checked && positive ? "log" : "linear", exponentformat: "power", hoverformat: ".5~g",
        ...(constant && !log.checked ? { range: [-0.05, 1.05] } : {}) },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      shapes: lines.map((mark) => ({ type: "line", x0: mark.step, x1: mark.step, y0: 0, y1: 1, yref: "paper",
        line: { width: 1, dash: "dot", color: mark.kind === "resumed" ? ink : alarm } })),
    };
  }

  const elements = [...document.querySelectorAll(".chart")];
  const near = new Set(); // the charts on or near the screen
  const drawn = new Set(), current = new Set(); // the charts that were drawn, and those drawn with the present settings
  const settings = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  function draw(element) {
    const index = Number(element.dataset.chart);
    Plotly.react(element, traces(charts[index], index), layout(charts[index]), settings);
    current.add(element);
    if (drawn.has(element)) return;
    drawn.add(element);
    element.on("plotly_relayout", (change) => {
      if ("xaxis.range[0]" in change) setRange([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      else if (change["xaxis.autorange"]) setRange(null);
    });
  }

  function setRange(next) {
    if (JSON.stringify(next) === JSON.stringify(range)) return;
    range = next;
    redraw();
  }
  function redraw() { // the charts elsewhere follow when they come near the screen
    current.clear();
    near.forEach(draw);
  }

  function toggle(key, pressed) {
    if (pressed) hidden.delete(key); else hidden.add(key);
    redraw();
  }

  function button(text, key, series) {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = text;
    element.setAttribute("aria-pressed", "true");
    if (series) element.prepend(swatch(series));
    element.addEventListener("click", () => {
      const pressed = element.getAttribute("aria-pressed") !== "true";
      element.setAttribute("aria-pressed", String(pressed));
      toggle(key, pressed);
    });
    return element;
  }

  function swatch(series) {
    const found = document.createElement("i");
    found.className = "swatch";
    const colour = series.colour < 0 ? "ink" : String(series.colour % 7);
    found.dataset.colour = colour;
    found.style.borderTopStyle = ["solid", "dashed", "dotted"][series.dash % 3];
    return found;
  }

  function colourSwatches() {
    for (const element of document.querySelectorAll(".swatch")) {
      const colour = element.dataset.colour;
      element.style.borderTopColor = colour === "ink" ? palette().ink : palette().colours[Number(colour)];
    }
  }

  const parts = new Map();
  charts.forEach((chart, index) => {
    const legend = document.querySelector(`.legend[data-chart="${index}"]`);
    chart.series.forEach((series, i) => {
      if (["language", "source", "run"].includes(series.group)) parts.set(series.part, series.group);
      legend.append(button(series.name, `${index}:${i}`, series));
    });
  });
  const all = document.getElementById("parts");
  if (parts.size > 1) for (const part of parts.keys()) all.append(button(part, part));

  log.addEventListener("change", redraw);
  smoothing.addEventListener("input", () => {
    document.getElementById("smoothed").textContent = smoothing.value;
    redraw();
  });
  document.getElementById("reset").addEventListener("click", () => setRange(null));
  dark.addEventListener("change", () => { colourSwatches(); redraw(); });
  colourSwatches();
  // Charts are drawn when they come near the screen, so that a page with many of them opens at once.
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) near.add(target); else near.delete(target);
      if (isIntersecting && !current.has(target)) draw(target);
    }
  }, { rootMargin: "100px" });
  // Plotly is 5 MB of code. It runs after the first frame, so that the figures and tables of the page are shown before.
  function start() {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
    elements.forEach((element) => observer.observe(element));
  }
  addEventListener("load", () => requestAnimationFrame(() => setTimeout(start)));
  addEventListener("beforeprint", () => { start(); elements.forEach(draw); });
})();
