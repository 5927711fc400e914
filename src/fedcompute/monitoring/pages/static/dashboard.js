// Keeps a page fresh: asks every second whether it has changed, swaps its live parts, draws its charts again.
"use strict";
(() => {
  const PERIOD = 1000, PATIENCE = 10000, ROWS = 1000;
  const root = document.documentElement;
  const tags = new Map();
  const drawn = new Map();
  let waiting = 0;

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const shown = (text) => { const area = document.createElement("textarea"); area.textContent = text; return area.innerHTML; };

  async function ask(address) {
    const headers = tags.has(address) ? { "If-None-Match": tags.get(address) } : {};
    const answer = await fetch(address, { headers, cache: "no-store", redirect: "follow", signal: AbortSignal.timeout(PATIENCE) });
    if (answer.status === 304) return null;
    // The session is over: the page itself is led to where one signs in.
    if (answer.status === 401) location.reload();
    if (!answer.ok) throw new Error(String(answer.status));
    const tag = answer.headers.get("etag");
    if (tag) tags.set(address, tag);
    return answer;
  }

  function layout(chart) {
    const line = colour("--grid"), quiet = colour("--quiet");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: { color: quiet }, automargin: true, fixedrange: false };
    return {
      margin: { l: 48, r: 8, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
      xaxis: { ...axis, title: { text: shown(chart.x_title), font: { size: 12, color: quiet } }, showgrid: false,
        type: { time: "date", number: "linear", category: "category" }[chart.x_is] },
      yaxis: { ...axis, title: { text: shown(chart.y_title), font: { size: 12, color: quiet } }, type: chart.logarithmic ? "log" : "linear",
        rangemode: chart.logarithmic ? "normal" : "tozero", ...(chart.share ? { range: [0, 1] } : {}) },
      barmode: chart.stacked ? "stack" : "group", hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: line, font: { color: colour("--text") } },
      showlegend: chart.series.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      uirevision: "kept", dragmode: "zoom",
    };
  }

  function traces(chart) {
    return chart.series.map((one, index) => {
      const paint = colour(`--series-${((one.colour ?? index) % 8) + 1}`);
      const common = { name: shown(one.name), x: chart.x_is === "category" ? one.x.map(shown) : one.x, y: one.y };
      if (chart.kind === "bar") return { ...common, type: "bar", marker: { color: paint } };
      const few = one.marks || one.x.length < 40;
      return { ...common, type: "scatter", mode: few ? "lines+markers" : "lines", connectgaps: false, marker: { size: 5, color: paint },
        line: { color: paint, width: 2, dash: one.dashed ? "dash" : "solid" }, ...(chart.stacked ? { stackgroup: "all" } : {}) };
    });
  }

  function draw(figure) {
    const chart = drawn.get(figure), plot = figure.querySelector(".plot");
    if (!chart) return;
    const note = figure.querySelector(".note");
    note.textContent = chart.note;
    note.hidden = !chart.note;
    if (!chart.series.length) {
      window.Plotly.purge(plot);
      plot.replaceChildren(words("p", chart.empty, "quiet"));
    } else {
      if (!plot.classList.contains("js-plotly-plot")) plot.replaceChildren();
      window.Plotly.react(plot, traces(chart), layout(chart), { displaylogo: false, responsive: true, displayModeBar: false });
    }
    figure.dataset.drawn = String(chart.series.reduce((sum, one) => sum + one.x.length, 0));
    if (figure.querySelector("details").open) tabulate(figure);
  }

  function words(kind, text, name = "") {
    const made = document.createElement(kind);
    made.textContent = text;
    made.className = name;
    return made;
  }

  function tabulate(figure) {
    const chart = drawn.get(figure);
    if (!chart) return;
    const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    for (const text of ["series", chart.x_title, chart.y_title]) { const cell = words("th", text); cell.scope = "col"; head.append(cell); }
    let left = ROWS;
    for (const one of chart.series) {
      for (let at = 0; at < one.x.length && left > 0; at += 1, left -= 1) {
        const row = body.insertRow();
        for (const value of [one.name, one.x[at], one.y[at] ?? "–"]) row.append(words("td", String(value)));
      }
    }
    figure.querySelector(".numbers .scroll").replaceChildren(table);
  }

  async function load(figure) {
    try {
      const answer = await ask(figure.dataset.chart);
      if (answer) drawn.set(figure, await answer.json());
      if (answer) draw(figure);
    } catch (error) {
      if (!drawn.has(figure)) figure.querySelector(".plot").replaceChildren(words("p", "The numbers could not be loaded; the page tries again.", "quiet"));
      throw error;
    }
  }

  // A chart is fetched when it comes near the window, and again when the page has changed.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.dataset.near = entry.isIntersecting ? "yes" : "no";
      if (entry.isIntersecting && entry.target.dataset.stale !== "no") refresh(entry.target);
    }
  }, { rootMargin: "400px" });

  function refresh(figure) {
    figure.dataset.stale = "no";
    load(figure).catch(() => { figure.dataset.stale = "yes"; });
  }

  function adopt(figures) {
    for (const figure of figures) {
      seen.observe(figure);
      figure.querySelector("details").addEventListener("toggle", () => tabulate(figure));
    }
  }

  function swap(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const next = fresh.getElementById(part.id);
      if (next && next.innerHTML !== part.dataset.kept) {
        const open = [...part.querySelectorAll("details")].map((one) => one.open);
        const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
        part.dataset.kept = next.innerHTML;
        part.replaceChildren(...next.childNodes);
        part.querySelectorAll("details").forEach((one, at) => { one.open = open[at] ?? one.open; });
        if (focused) document.getElementById(focused)?.focus();
      }
    }
    // A page that gains its first round gains charts as well.
    const known = new Set([...document.querySelectorAll("[data-chart]")].map((one) => one.dataset.chart));
    for (const grid of document.querySelectorAll(".charts[id]")) {
      for (const figure of fresh.querySelectorAll(`#${CSS.escape(grid.id)} > [data-chart]`)) {
        if (!known.has(figure.dataset.chart)) { grid.append(figure); adopt([figure]); }
      }
      grid.querySelectorAll(":scope > .empty").forEach((one) => { if (grid.querySelector("[data-chart]")) one.remove(); });
    }
    const said = fresh.querySelector("[data-announce]")?.dataset.announce ?? "";
    const here = document.getElementById("announcement");
    if (said && here.textContent !== said) here.textContent = said;
    document.title = fresh.title;
    for (const figure of document.querySelectorAll("[data-chart]")) {
      if (figure.dataset.near === "yes") refresh(figure);
      else figure.dataset.stale = "yes";
    }
  }

  function tell(lost) {
    const mark = document.querySelector(".live");
    mark.hidden = false;
    mark.classList.toggle("lost", lost);
    const text = lost ? "no answer from the server" : "live";
    if (mark.querySelector(".words").textContent !== text) mark.querySelector(".words").textContent = text;
  }

  async function look() {
    if (!document.hidden) {
      try {
        const answer = await ask(location.href);
        if (answer?.redirected) location.reload();
        if (answer) swap(await answer.text());
        for (const figure of document.querySelectorAll('[data-chart][data-near="yes"][data-stale="yes"]')) refresh(figure);
        waiting = 0;
        tell(false);
      } catch {
        waiting += 1;
        if (waiting > 1) tell(true);
      }
    }
    setTimeout(look, PERIOD * Math.min(1 + waiting, 10));
  }

  function start() {
    if (document.body.dataset.tag) tags.set(location.href, document.body.dataset.tag);
    adopt(document.querySelectorAll("[data-chart]"));
    const button = document.querySelector("[data-theme-switch]");
    button.hidden = false;
    button.addEventListener("click", () => {
      const dark = getComputedStyle(root).colorScheme.includes("dark");
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("theme", root.dataset.theme);
      drawn.forEach((_, figure) => draw(figure));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((_, figure) => draw(figure)));
    if (document.querySelector("[data-live]")) setTimeout(look, PERIOD);
  }

  start();
})();
