"use strict";
// Draws the page's charts with uPlot: lines over steps, events as marks, values at the cursor, zoom, smoothing, log axis.

const WINDOWS = [1, 3, 5, 9, 15, 25, 51, 101, 201, 401];
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const COLOURS = 8;
const MARK_SIGNS = { resumed: "▶", stopped: "■", skipped: "×", spike: "▲", failed: "■", lost: "■" };
const TABLE_ROWS = 200;

function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function trimmed(text) {
  return text.includes(".") ? text.replace(/0+(e|$)/, "$1").replace(/\.(e|$)/, "$1") : text;
}

function say(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e9) return trimmed(value.toExponential(3)).replace("e+", "e");
  if (size >= 1e5) return Math.round(value).toLocaleString("en");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : trimmed(value.toPrecision(4));
}

function sayTick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return trimmed((value / (letter === "k" ? 1e3 : unit)).toPrecision(3)) + letter;
  return size && size < 1e-3 ? trimmed(value.toExponential(2)) : String(+value.toPrecision(6));
}

// The mean of the `width` values around each place, of fewer at both ends; a gap stays one.
function smoothed(values, width) {
  const half = (width - 1) / 2, sums = [0], counts = [0];
  for (const value of values) {
    sums.push(sums.at(-1) + (value ?? 0));
    counts.push(counts.at(-1) + (value === null ? 0 : 1));
  }
  return values.map((value, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1), n = counts[to] - counts[from];
    return value === null || !n ? null : (sums[to] - sums[from]) / n;
  });
}

class Chart {
  constructor(figure, spec, board) {
    Object.assign(this, { figure, spec, board, log: false, hidden: new Set() });
    this.box = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.logButton = figure.querySelector(".log");
    this.logButton.addEventListener("click", () => this.switchLog());
    this.box.addEventListener("keydown", event => this.key(event));
    figure.querySelector(".numbers").addEventListener("toggle", () => this.fillNumbers());
    this.build();
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.box);
  }

  size() {
    return { width: Math.max(200, this.box.clientWidth), height: this.spec.large ? 300 : 210 };
  }

  // Every line that has a number: the run, the line, its steps and values.
  lines() {
    const runs = this.board.data.runs, found = [];
    for (const [at, run] of runs.entries())
      for (const line of this.spec.lines) {
        const part = run[line.part];
        if (!part || !part[line.key] || (line.limit && runs.length > 1)) continue;
        const many = runs.length > 1, label = many ? (this.spec.lines.length > 1 ? `${run.label}, ${line.label}` : run.label) : line.label;
        const colour = many ? at : line.colour, place = this.spec.lines.indexOf(line);
        found.push({
          label, line, id: `${at}/${line.key}`, steps: part.step, values: part[line.key],
          colour: `--line-${colour % COLOURS}`,
          dash: line.limit ? [4, 4] : many ? DASHES[(Math.floor(at / COLOURS) + place) % DASHES.length] : [],
          points: Boolean(line.points),
        });
      }
    return found;
  }

  // What uPlot draws: tables to join, and a series for each line; a smoothed line has the logged one behind it.
  content() {
    const width = this.spec.smooth ? WINDOWS[this.board.smoothing] : 1, tables = [], series = [{ label: "step" }];
    this.shown = [];
    for (const line of this.lines()) {
      const hide = this.hidden.has(line.id), colour = colourOf(line.colour);
      const values = this.log ? line.values.map(v => (v > 0 ? v : null)) : line.values;
      const soft = width > 1 && !line.line.limit && !line.points && values.length > 2;
      const common = { label: line.label, show: !hide, stroke: colour, dash: line.dash, spanGaps: false };
      if (soft) {
        tables.push([line.steps, values]);
        series.push({ ...common, width: 1, alpha: 0.3, points: { show: false } });
      }
      tables.push([line.steps, soft ? smoothed(values, width) : values]);
      const few = line.steps.length <= 40;
      series.push({ ...common, width: line.line.limit ? 1 : 2, points: { show: line.points || (few && !soft && !line.line.limit), size: line.points ? 7 : 5, fill: colour } });
      this.shown.push({ ...line, at: series.length - (soft ? 2 : 1) }); // numbers are told as they were logged
    }
    return { data: tables.length ? uPlot.join(tables) : [[]], series };
  }

  build() {
    const zoom = this.plot && this.zoomed() ? { ...this.plot.scales.x } : null;
    this.plot?.destroy();
    const { data, series } = this.content(), ink = colourOf("--ink"), grid = colourOf("--grid"), font = "12px system-ui, sans-serif";
    const axis = { stroke: ink, font, labelFont: font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    this.plot = new uPlot({
      ...this.size(), series,
      legend: { show: false },
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, dist: 6 }, points: { size: 8 } },
      scales: {
        x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { distr: this.log ? 3 : 1, range: this.log ? (u, low, high) => uPlot.rangeLog(low ?? 1, high ?? 10, 10, false) : (u, low, high) => this.range(low, high) },
      },
      axes: [
        { ...axis, label: "step", size: 34, labelSize: 20, values: (u, splits) => splits.map(v => (Number.isInteger(v) ? sayTick(v) : "")) },
        { ...axis, label: this.spec.unit, size: 66, labelSize: 20, values: (u, splits) => splits.map(sayTick) },
      ],
      hooks: { draw: [u => this.drawMarks(u)], setCursor: [() => this.tell()] },
    }, data, this.box);
    this.canvasIsNoContent();
    if (zoom) this.plot.setScale("x", { min: zoom.min, max: zoom.max });
    this.makeLegend();
    this.describe();
    this.fillNumbers();
  }

  range(low, high) {
    if (low === null || low === undefined) return [0, 1];
    if (this.spec.from_zero && low >= 0) return [0, high > 0 ? high * 1.06 : 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  }

  canvasIsNoContent() {
    this.box.querySelector(".uplot").setAttribute("aria-hidden", "true"); // the text beside it says the same
  }

  // New numbers, with the same lines or others; a part that is zoomed into stays.
  refresh() {
    const before = this.plot.series.length, zoomed = this.zoomed(), { data, series } = this.content();
    if (series.length !== before) return this.build();
    this.plot.setData(data, !zoomed);
    if (zoomed) this.plot.redraw();
    this.tell();
    this.describe();
    this.fillNumbers();
  }

  zoomed() {
    const steps = this.plot.data[0], { min, max } = this.plot.scales.x;
    return steps.length > 1 && min !== null && min !== undefined && (min > steps[0] || max < steps.at(-1));
  }

  whole() {
    const steps = this.plot.data[0];
    if (steps.length) this.plot.setScale("x", { min: steps[0], max: steps.at(-1) });
  }

  switchLog() {
    this.log = !this.log;
    this.logButton.setAttribute("aria-pressed", String(this.log));
    this.build();
  }

  marks() {
    return this.board.showMarks ? this.board.data.runs.flatMap((run, at) => run.marks.map(mark => ({ ...mark, at }))) : [];
  }

  drawMarks(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio, many = this.board.data.runs.length > 1;
    ctx.save();
    ctx.lineWidth = ratio;
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    const above = new Map(); // events of one step stand below one another
    for (const mark of this.marks()) {
      const x = Math.round(u.valToPos(mark.step, "x", true));
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      ctx.strokeStyle = ctx.fillStyle = colourOf(many ? `--line-${mark.at % COLOURS}` : mark.kind === "resumed" ? "--good" : "--bad");
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      above.set(x, (above.get(x) ?? 0) + 1);
      ctx.fillText(MARK_SIGNS[mark.kind] ?? "•", x, bbox.top + (12 * above.get(x) - 2) * ratio);
    }
    ctx.restore();
  }

  makeLegend() {
    this.legend.replaceChildren(...this.shown.map(line => {
      const item = document.createElement("li"), button = document.createElement("button"), key = document.createElement("span");
      key.className = "key";
      key.style.borderTopColor = `var(${line.colour})`;
      key.style.borderTopStyle = line.dash.length ? "dashed" : "solid";
      line.value = document.createElement("b");
      button.type = "button";
      button.className = "quiet";
      button.setAttribute("aria-pressed", String(!this.hidden.has(line.id)));
      button.title = "show or hide";
      button.append(key, ` ${line.label} `, line.value);
      button.addEventListener("click", () => {
        this.hidden[this.hidden.has(line.id) ? "delete" : "add"](line.id);
        this.build();
        this.legend.querySelectorAll("button")[this.shown.findIndex(other => other.id === line.id)]?.focus();
      });
      item.append(button);
      return item;
    }));
    this.at = document.createElement("li");
    this.at.className = "at";
    this.legend.append(this.at);
    this.tell();
  }

  // A line's value at a place, or the one before it where only other lines have one; of the last step where there is no place.
  valueAt(line, place) {
    const values = this.plot.data[line.at];
    for (let i = place ?? values.length - 1; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
    return null;
  }

  // The values at the cursor, in the legend; without a cursor the last ones.
  tell() {
    if (!this.plot || !this.at) return "";
    const place = this.plot.cursor.idx, step = this.plot.data[0][place ?? this.plot.data[0].length - 1];
    for (const line of this.shown) line.value.textContent = say(this.valueAt(line, place));
    const near = this.marks().filter(mark => place !== null && place !== undefined && mark.step === step).map(mark => mark.text);
    this.at.textContent = step === undefined ? "" : [`${place === null || place === undefined ? "last, " : ""}step ${step}`, ...near].join(" · ");
    return `${this.at.textContent}: ${this.shown.filter(l => !this.hidden.has(l.id)).map(l => `${l.label} ${l.value.textContent}`).join(", ")}`;
  }

  describe() {
    const parts = this.lines().map(line => {
      const sound = line.values.filter(v => v !== null);
      return sound.length ? `${line.label}: from ${say(sound[0])} at step ${line.steps[line.values.indexOf(sound[0])]} to ${say(sound.at(-1))} at step ${line.steps[line.values.lastIndexOf(sound.at(-1))]}, least ${say(Math.min(...sound))}, most ${say(Math.max(...sound))}` : "";
    });
    const events = this.marks().map(mark => mark.text);
    const text = `${this.spec.unit} over steps. ${[...parts, ...events].filter(Boolean).join(". ")}. Arrow keys move along the steps; the numbers follow as a table.`;
    this.figure.querySelector(`#about-${this.spec.id}`).textContent = text;
  }

  key(event) {
    const u = this.plot, steps = u.data[0], last = steps.length - 1, now = u.cursor.idx ?? last;
    const { min, max } = u.scales.x, page = Math.max(1, Math.round(last / 20));
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -last, End: last };
    if (event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    if (event.key in moves) this.moveTo(Math.min(last, Math.max(0, now + moves[event.key])));
    else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const middle = steps[now], half = ((max - min) / 2) * (event.key === "-" ? 2 : 0.5);
      if (half < 0.5) return;
      this.board.zoom(Math.max(steps[0], middle - half), Math.min(steps[last], middle + half));
    } else if (event.key === "0" || event.key === "Escape") this.board.whole();
    else if (event.key === "l" || event.key === "L") this.switchLog();
    else return;
    event.preventDefault();
  }

  moveTo(place) {
    const u = this.plot, step = u.data[0][place], { min, max } = u.scales.x;
    if (step < min || step > max) this.board.zoom(...(step < min ? [step, step + max - min] : [step - max + min, step]));
    u.setCursor({ left: u.valToPos(step, "x"), top: u.over.clientHeight / 2 });
    if (u.cursor.idx !== place) u.cursor.idx = place;
    this.board.announce(this.tell());
  }

  // The chart as a table, for who reads rather than looks.
  fillNumbers() {
    const details = this.figure.querySelector(".numbers");
    if (!details.open) return;
    const { data } = this.plot, steps = data[0], every = Math.max(1, Math.ceil(steps.length / TABLE_ROWS));
    const table = document.createElement("table"), caption = table.createCaption(), head = table.createTHead().insertRow();
    caption.textContent = `${this.spec.title}, ${this.spec.unit}${every > 1 ? `; one step in ${every}` : ""}`;
    for (const text of ["step", ...this.shown.map(line => line.label)]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = table.createTBody();
    for (let i = 0; i < steps.length; i += 1) {
      if (i % every && i !== steps.length - 1) continue;
      const row = body.insertRow(), name = document.createElement("th");
      name.scope = "row";
      name.textContent = steps[i].toLocaleString("en");
      row.append(name);
      for (const line of this.shown) row.insertCell().textContent = data[line.at][i] === undefined ? "" : say(data[line.at][i]);
    }
    details.querySelector("div").replaceChildren(table);
  }
}
