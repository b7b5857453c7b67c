"use strict";
// The page around its charts: controls, colours, copying, and news of runs that train.

(() => {
  const one = selector => document.querySelector(selector);
  const said = one("#said");
  const board = {
    data: JSON.parse(one("#data").textContent), charts: [], smoothing: 0, showMarks: true,
    announce: text => { said.textContent = text; },
    zoom: (min, max) => board.charts.forEach(chart => chart.plot.setScale("x", { min, max })),
    whole: () => board.charts.forEach(chart => chart.whole()),
    each: work => board.charts.forEach(work),
  };

  function startCharts() {
    const most = Math.max(0, ...board.data.runs.map(run => run.train.step.length));
    board.smoothing = most < 60 ? 0 : Math.max(1, WINDOWS.findLastIndex(width => width <= most / 25));
    for (const spec of board.data.charts) {
      const figure = document.getElementById(`chart-${spec.id}`);
      board.charts.push(new Chart(figure, spec, board));
      figure.chart = board.charts.at(-1);
    }
    if (!board.charts.length) return;
    const range = one("#smoothing"), says = one("#smoothing-says");
    const tell = () => { says.textContent = board.smoothing ? `mean over ${WINDOWS[board.smoothing]} rows` : "off"; };
    range.value = board.smoothing;
    tell();
    range.addEventListener("input", () => {
      board.smoothing = Number(range.value);
      tell();
      board.each(chart => chart.spec.smooth && chart.build());
    });
    one("#show-marks").addEventListener("change", event => {
      board.showMarks = event.target.checked;
      board.each(chart => { chart.plot.redraw(); chart.describe(); });
    });
    one("#whole").addEventListener("click", board.whole);
    one("#controls").hidden = false;
  }

  function startColours() {
    const button = one("#theme"), names = { auto: "as the system", dark: "dark", light: "light" }, order = Object.keys(names);
    const kept = { get: () => { try { return localStorage.getItem("phi3_dist colours"); } catch { return null; } }, set: name => { try { localStorage.setItem("phi3_dist colours", name); } catch { /* a page from a file may keep nothing */ } } };
    const apply = name => {
      if (name === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = name;
      button.textContent = `Colours: ${names[name]}`;
      if (document.documentElement.dataset.ready) board.each(chart => chart.build());
    };
    let now = order.includes(kept.get()) ? kept.get() : "auto";
    button.addEventListener("click", () => {
      now = order[(order.indexOf(now) + 1) % order.length];
      kept.set(now);
      apply(now);
      board.announce(button.textContent);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => board.each(chart => chart.build()));
    button.hidden = false;
    apply(now);
  }

  function startCopying() {
    for (const button of document.querySelectorAll(".copy")) {
      button.hidden = !navigator.clipboard;
      button.onclick = async () => {
        try {
          await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
          button.textContent = "Copied";
        } catch { button.textContent = "Not allowed here"; }
        board.announce(button.textContent);
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      };
    }
  }

  // What stands in `place` now; what its reader has opened or chosen stays so.
  function exchange(place, html) {
    if (!place || html === undefined || place.lastHtml === html) return;
    const open = [...place.querySelectorAll("details[open]")].map(details => details.id);
    const chosen = [...place.querySelectorAll("input:checked")].map(input => input.value);
    const focus = place.contains(document.activeElement) ? document.activeElement.id : "";
    place.innerHTML = html;
    place.lastHtml = html;
    for (const id of open) if (id) document.getElementById(id)?.setAttribute("open", "");
    for (const input of place.querySelectorAll("input")) input.checked = chosen.includes(input.value);
    if (focus) document.getElementById(focus)?.focus();
    startCopying();
  }

  function startNews({ url, every_ms: every }) {
    let tag = "", lost = false;
    const ask = async () => {
      if (document.hidden) return;
      try {
        const answer = await fetch(url, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (lost) board.announce("the board answers again");
        lost = false;
        document.documentElement.dataset.lost = "";
        if (answer.status === 304 || !answer.ok) return;
        tag = answer.headers.get("ETag") ?? "";
        const news = await answer.json();
        if (news.title) document.title = news.title;
        exchange(one("#above"), news.above);
        exchange(one("#below"), news.below);
        const ids = charts => charts.map(chart => chart.id).join();
        if (ids(news.charts) !== ids(board.data.charts)) return location.reload();
        board.data = { ...board.data, ...news };
        board.each(chart => chart.refresh());
      } catch {
        if (!lost) board.announce("the board does not answer: phi3-dist board has ended");
        lost = true;
        document.documentElement.dataset.lost = "yes";
      }
    };
    setInterval(ask, every);
  }

  startColours();
  startCharts();
  startCopying();
  if (board.data.live) startNews(board.data.live);
  document.documentElement.dataset.ready = "yes";
})();
