"use strict";
// One chart: the same curves of several runs, their marks, a tip at the cursor, zoom by mouse, keys and touch.
const MARK_COLOURS = { save: "--dim", stop: "--bad", resume: "--accent", skipped: "--bad", spike: "--bad", plateau: "--warn", "slow rank": "--warn",
  failure: "--bad" };
const DASHES = [undefined, [8, 4], [3, 3], [12, 3, 3, 3], [1, 4]]; // of lines of one chart, where colours mean runs
const LINES = ["stop", "resume", "failure"]; // drawn from top to bottom; the others are points at an edge
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties))
    key.startsWith("--") ? node.style.setProperty(key, value) : key in node ? node[key] = value : node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function swatch(colour, dash) { // a piece of a line
  const node = element("i", { "--mark": colour });
  if (!dash) return node;
  let at = 0;
  const stops = dash.map((length, i) => `${i % 2 ? "transparent" : colour} ${at}px ${at += length}px`);
  Object.assign(node.style, { border: 0, height: "2px", width: "24px", background: `repeating-linear-gradient(90deg, ${stops})` });
  return node;
}

function shorten(name) { // so that what follows it is visible
  return name.length > 25 ? `${name.slice(0, 12)}…${name.slice(-12)}` : name;
}

function interpolate(from, to, value) {
  if (!from.length) return NaN;
  let low = 0, high = from.length - 1;
  if (value <= from[0]) return to[0];
  if (value >= from[high]) return to[high];
  while (high - low > 1) { const middle = (low + high) >> 1; from[middle] <= value ? low = middle : high = middle; }
  return to[low] + (to[high] - to[low]) * (value - from[low]) / (from[high] - from[low] || 1);
}

class Chart {
  // spec: title, unit, format, lines: [{key, style}], large, steps of the axis; group: several quantities of one kind, each
  // line with a name and a place among colours or dashes; board: see board.js
  constructor(spec, board) {
    Object.assign(this, { spec, board });
    this.reset = element("button", { hidden: true, onclick: () => board.zoom(null) });
    this.title = element("h2"); this.unit = element("span", { className: "unit" });
    this.tip = element("div", { className: "tip", hidden: true });
    this.plotted = element("div", { className: "plot", tabIndex: 0 });
    this.legend = element("div", { className: "legend" });
    this.node = element("div", { className: "card" + (spec.large ? " large" : ""), id: "chart-" + spec.id },
      element("div", { className: "head" }, this.title, this.unit, this.reset), this.plotted, this.legend);
    this.plotted.addEventListener("keydown", event => this.press(event));
    this.touch();
  }

  draw() {
    const { board, spec } = this, tables = [], series = [{}], names = [];
    const single = board.shown().length === 1; // then the lines of a group can have colours of their own
    for (const run of board.shown()) for (const line of spec.lines) {
      const found = run.data && run.data.curves[line.key];
      if (!found || !found[0].length) continue;
      tables.push([found[0].map(i => board.place(run, i)), found[1]]);
      const raw = line.style === "raw", points = line.style === "points", several = found[0].length > 1;
      const colour = spec.group && single ? board.palette()[line.place % board.palette().length] : run.colour;
      const dash = points ? [6, 4] : spec.group && !single ? DASHES[line.place % DASHES.length] : undefined;
      series.push({
        stroke: colour + (raw ? "55" : ""), width: raw ? 1 : spec.group ? 1.2 : 1.8, dash,
        points: { show: !several || (points && found[0].length < 80), size: points ? 6 : 5, fill: colour, stroke: colour },
      });
      names.push({ run, line, colour, dash });
    }
    this.node.hidden = !tables.length;
    this.title.textContent = word(spec.title); this.unit.textContent = word(spec.unit || "");
    this.plotted.setAttribute("aria-label", word(spec.title));
    this.reset.textContent = word("reset"); this.reset.hidden = !board.range;
    if (!tables.length) return this.clear();
    const data = joinTables(tables);
    this.names = names;
    const kind = [board.axis, board.theme, language, names.map(n => n.run.id + n.line.key + n.colour)].join();
    const size = { width: Math.max(this.plotted.clientWidth, 200), height: spec.large ? (innerWidth < 860 ? 260 : 340) : 190 };
    if (this.plot && this.kind === kind) {
      this.plot.setSize(size);
      this.plot.setData(data, false);
      this.plot.setScale("x", this.limits(data));
    } else {
      this.clear();
      this.kind = kind;
      this.plot = new uPlot({ ...size, series, ...this.options(data) }, data, this.plotted);
      this.plot.root.append(this.tip); // above the canvas, and moved with it
    }
    this.legend.replaceChildren(...this.describe());
  }

  clear() { this.plot?.destroy(); this.plot = null; this.tip.hidden = true; }

  limits(data) {
    if (this.board.range) return { min: this.board.range[0], max: this.board.range[1] };
    const last = data[0][data[0].length - 1];
    return { min: 0, max: last > 0 ? last : 1 };
  }

  options(data) {
    const { board, spec } = this, axis = { stroke: css("--dim"), font: "11px system-ui", ticks: { show: false },
      grid: { stroke: css("--line"), width: 1 } };
    const write = board.axis === "hours" ? v => v < 1 / 6 ? small(+(v * 60).toPrecision(3)) + "m" : small(v) + "h" : count;
    const start = this.limits(data);
    return {
      legend: { show: false }, padding: [12, 20, 0, 0],
      cursor: { sync: { key: "board", setSeries: false }, drag: { x: true, y: false, setScale: false }, focus: { prox: -1 },
        points: { size: 6 }, bind: { dblclick: () => () => { board.zoom(null); } } },
      scales: { x: { time: false, min: start.min, max: start.max, range: (u, min, max) => [min, max > min ? max : min + 1] },
        y: { range: (u, min, max) => this.height(u, min, max) } },
      axes: [{ ...axis, values: (u, v) => v.map(write), space: 64, size: 30 },
        { ...axis, values: (u, v) => v.map(spec.tick || spec.format), size: 62, space: 34,
          ...(spec.steps && { incrs: spec.steps }) }],
      hooks: {
        draw: [u => this.drawMarks(u)], setCursor: [u => this.showTip(u)],
        setSelect: [u => {
          if (u.select.width > 4) board.zoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    };
  }

  height(u, min, max) { // of visible values; a single spike of the loss must not flatten the curve
    const { min: left, max: right } = this.limits(u.data), xs = u.data[0];
    let top = -Infinity, bottom = this.spec.zero ? 0 : Infinity, raw = -Infinity;
    for (let s = 1; s < u.data.length; s++) for (let i = 0; i < xs.length; i++) {
      const value = u.data[s][i];
      if (value == null || xs[i] < left || xs[i] > right) continue;
      bottom = Math.min(bottom, value);
      if (this.names[s - 1]?.line.style === "raw") raw = Math.max(raw, value);
      else top = Math.max(top, value);
    }
    if (top === -Infinity) top = raw;
    if (top === -Infinity) return [min ?? 0, max ?? 1];
    const room = 0.06 * (top - bottom) || Math.abs(top) * 0.1 || 1;
    return [this.spec.zero ? bottom : bottom - room, top + room];
  }

  marks() {
    const found = [];
    if (this.spec.marks) for (const run of this.board.shown()) for (const [kind, all] of Object.entries(run.data?.marks || {}))
      for (const mark of all) found.push({ ...mark, kind, named: mark.kind || kind, run, x: this.board.place(run, mark.iter) });
    return found;
  }

  drawMarks(u) {
    const { ctx, bbox } = u, scale = devicePixelRatio;
    ctx.save();
    ctx.beginPath(); ctx.rect(bbox.left, bbox.top - 8 * scale, bbox.width, bbox.height + 8 * scale); ctx.clip();
    for (const mark of this.marks()) {
      const x = u.valToPos(mark.x, "x", true), colour = css(MARK_COLOURS[mark.kind]);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      ctx.strokeStyle = ctx.fillStyle = colour; ctx.lineWidth = scale;
      ctx.beginPath();
      if (LINES.includes(mark.kind)) {
        ctx.globalAlpha = 0.75; ctx.setLineDash([4 * scale, 4 * scale]);
        ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
        ctx.setLineDash([]); ctx.globalAlpha = 1;
      } else {
        const y = mark.kind === "save" ? bbox.top + bbox.height - 5 * scale : bbox.top - 2 * scale;
        ctx.arc(x, y, (mark.kind === "save" ? 2.2 : 3.2) * scale, 0, 7); ctx.fill();
      }
    }
    ctx.restore();
  }

  describe() { // what lines and marks mean; runs have their colour in the list
    const ink = css("--dim"), parts = [], seen = new Set(this.names.map(n => n.line.style));
    const names = new Set(this.names.map(n => n.run));
    if (names.size > 1 && this.spec.large) for (const run of names)
      parts.push(element("span", {}, element("i", { "--mark": run.colour }), element("span", {}, run.name)));
    if (this.spec.group) {
      const lines = new Map(this.names.map(n => [n.line.key, n]));
      for (const { line, colour, dash } of lines.values())
        parts.push(element("span", {}, swatch(names.size > 1 ? ink : colour, dash), word(line.name)));
    } else if (this.spec.lines.length > 1) {
      for (const style of ["raw", "smooth"]) if (seen.has(style))
        parts.push(element("span", {}, element("i", { "--mark": ink + (style === "raw" ? "66" : "") }), word(style === "raw" ? "raw" : "smoothed")));
      if (seen.has("points")) parts.push(element("span", {}, element("i", { className: "dashed", "--mark": ink }), word("val_loss")));
    }
    for (const kind of new Set(this.marks().map(m => m.kind))) parts.push(element("span", {},
      element("i", { className: LINES.includes(kind) ? "dashed" : "point", "--mark": css(MARK_COLOURS[kind]) }), word(kind)));
    return parts;
  }

  showTip(u) {
    const { left, top } = u.cursor, tip = this.tip;
    const reading = this.touched || this.plotted.matches(":hover, :focus-within"); // others follow without a tip
    if (!reading || left == null || left < 0) { tip.hidden = true; return; }
    const x = u.posToVal(left, "x"), { board } = this, rows = [];
    const reach = Math.abs(u.posToVal(14, "x") - u.posToVal(0, "x"));
    for (const [place, { run, line, colour }] of this.names.entries()) {
      const value = nearest(u.data[0], u.data[place + 1], x, reach);
      if (value === null) continue;
      const several = this.spec.lines.length > 1;
      const kind = line.name ? word(line.name) : word({ raw: "raw", smooth: "smoothed", points: "val_loss" }[line.style] || "");
      const name = several ? (board.shown().length > 1 ? `${shorten(run.name)} · ${kind}` : kind) : run.name;
      rows.push(element("div", { "--run": colour }, element("span", {}, name), element("em", {}, this.spec.format(value))));
    }
    const close = Math.abs(u.posToVal(6, "x") - u.posToVal(0, "x"));
    const marks = this.marks().filter(m => Math.abs(m.x - x) < close).slice(0, 4)
      .map(m => element("p", {}, `${board.shown().length > 1 ? m.run.name + " · " : ""}${word(m.named)} · ${m.iter}${m.text ? " · " + m.text : ""}`));
    const unit = word(board.axis === "iter" ? "iteration" : board.axis);
    const shown = board.axis === "iter" ? Math.round(x).toLocaleString("en") : board.axis === "hours" ? duration(x * 3600) : count(x);
    tip.replaceChildren(element("b", {}, board.axis === "hours" ? shown : `${unit} ${shown}`), ...rows, ...marks);
    tip.hidden = !rows.length && !marks.length;
    const box = u.over, at = box.offsetLeft + left, width = tip.offsetWidth;
    tip.style.left = (at + width + 24 > u.root.offsetWidth ? Math.max(at - width - 12, 0) : at + 12) + "px";
    tip.style.top = Math.max(box.offsetTop + Math.min(top ?? 0, box.offsetHeight - tip.offsetHeight), 0) + "px";
  }

  press(event) {
    const u = this.plot;
    if (!u || event.ctrlKey || event.metaKey) return;
    const { min, max } = u.scales.x, at = u.cursor.left >= 0 ? u.cursor.left : u.over.clientWidth / 2;
    const step = (event.shiftKey ? 40 : 8) * ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0);
    if (step) u.setCursor({ left: Math.min(Math.max(at + step, 0), u.over.clientWidth - 1), top: 20 });
    else if ("+=".includes(event.key)) this.board.zoom(around(u.posToVal(at, "x"), min, max, 0.5));
    else if (event.key === "-") this.board.zoom(this.board.range && around(u.posToVal(at, "x"), min, max, 2));
    else if (event.key === "0" || event.key === "Escape") this.board.zoom(null);
    else return;
    event.preventDefault();
  }

  touch() { // uPlot itself reads the mouse only
    let pinch = null;
    const positions = event => [...event.touches].map(t => t.clientX - this.plot.over.getBoundingClientRect().left);
    this.plotted.addEventListener("touchmove", event => {
      if (!this.plot) return;
      for (const chart of this.board.charts.values()) { chart.touched = chart === this; chart.tip.hidden = true; }
      const [a, b] = positions(event), u = this.plot;
      if (b === undefined) { u.setCursor({ left: Math.min(Math.max(a, 0), u.over.clientWidth - 1), top: 10 }); return; }
      event.preventDefault();
      const apart = Math.max(Math.abs(a - b), 10), centre = (a + b) / 2;
      pinch ??= { apart, min: u.scales.x.min, max: u.scales.x.max, at: u.posToVal(centre, "x") };
      const range = around(pinch.at, pinch.min, pinch.max, pinch.apart / apart);
      u.setScale("x", { min: range[0], max: range[1] });
      pinch.range = range;
    }, { passive: false });
    this.plotted.addEventListener("touchend", () => { if (pinch?.range) this.board.zoom(pinch.range); pinch = null; });
  }
}

function around(at, min, max, factor) { return [Math.max(at - (at - min) * factor, 0), at + (max - at) * factor]; }

function nearest(xs, ys, x, reach) { // the value of the point closest to x; null if there is none within reach
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; xs[middle] < x ? low = middle + 1 : high = middle; }
  let best = null, distance = reach;
  for (const step of [-1, 1])
    for (let i = step < 0 ? low - 1 : low; i >= 0 && i < xs.length && Math.abs(xs[i] - x) <= distance; i += step)
      if (ys[i] != null) { best = ys[i]; distance = Math.abs(xs[i] - x); break; }
  if (best !== null) return best;
  let i = low; while (i >= 0 && ys[i] == null) i--; // between two points: the one before
  let j = low; while (j < xs.length && ys[j] == null) j++;
  return i >= 0 && j < xs.length ? ys[i] : null;
}

function joinTables(tables) { // a missing value is undefined and drawn over; null is a gap
  return tables.length === 1 ? tables[0] : uPlot.join(tables, tables.map(() => [0, 1]));
}
