"use strict";
// The page: its data (from the server, or in the file of a report), the list of runs, charts, differences, samples.
const POLL = 2000; // ms
const COLOURS = {
  light: ["#0969da", "#d1480f", "#0f8a5f", "#8250df", "#b7791f", "#0b7285", "#bf3989", "#57606a"],
  dark: ["#58a6ff", "#f0883e", "#3fb98a", "#bc8cff", "#e3b341", "#39c5cf", "#f778ba", "#a3adb8"],
};
const SPECS = [
  { id: "loss", title: "loss", unit: "nats", format: v => v.toFixed(4), tick: small, large: true, marks: true,
    lines: [{ key: "loss", style: "raw" }, { key: "loss_smoothed", style: "smooth" }, { key: "val_loss", style: "points" }] },
  { id: "lr", title: "lr", format: small, zero: true, lines: [{ key: "lr" }] },
  { id: "grad_norm", title: "grad_norm", format: small, zero: true, lines: [{ key: "grad_norm" }] },
  { id: "tokens_per_s", title: "tokens_per_s", format: count, zero: true, lines: [{ key: "tokens_per_s" }] },
  { id: "mfu", title: "mfu", format: v => (100 * v).toFixed(1) + "%", tick: v => small(100 * v) + "%", zero: true, lines: [{ key: "mfu" }] },
  { id: "memory", title: "memory", format: bytes, steps: [...Array(50).keys()].map(n => 2 ** n), zero: true, lines: [{ key: "memory" }] },
  { id: "time", title: "time", unit: "seconds", format: small, zero: true, lines: [{ key: "time" }] },
  { id: "data_time", title: "data_time", unit: "seconds", format: small, zero: true, lines: [{ key: "data_time" }] },
  { id: "rank_times", title: "rank_times", unit: "seconds", format: small, zero: true,
    group: true, lines: ["rank_slowest", "rank_median"].map((key, place) => ({ key, name: key, place })) },
];
const KNOWN = new Set(SPECS.flatMap(s => s.lines.map(l => l.key)).concat("tokens_per_s_a_rank"));
const find = id => document.getElementById(id);

const exported = typeof EXPORTED === "undefined" ? null : EXPORTED;
async function ask(path, query = {}) {
  if (exported) {
    if (path === "runs") return exported;
    return (path === "run" ? exported.curves : exported.details)[query.id];
  }
  const answer = await fetch(`api/${path}?${new URLSearchParams(query)}`);
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
}

const board = {
  runs: [], charts: new Map(), axis: stored("axis", "iter"), smoothing: stored("smoothing", ""), range: null, version: null,
  theme: "light",
  shown() { return this.runs.filter(r => r.on); },
  palette() { return COLOURS[this.theme]; },
  place(run, iteration) { // on the x axis
    if (this.axis === "iter") return iteration;
    const axes = run.data.axes, known = axes[this.axis];
    return known.length ? interpolate(axes.iter, known, iteration) : iteration;
  },
  iterations(run) { // of the visible range, to fetch them in detail
    if (!this.range) return {};
    if (this.axis === "iter") return { from: this.range[0], to: this.range[1] };
    const known = run.data?.axes[this.axis] || [];
    const [from, to] = this.range.map(v => interpolate(known, run.data.axes.iter, v));
    return Number.isFinite(from) ? { from, to } : {};
  },
  async zoom(range) { this.range = range; await refresh(true); },
};

function joinFacts(...facts) { // lines break between facts only
  const parts = facts.map((fact, i) => element("span", {}, fact, i < facts.length - 1 ? " ·" : ""));
  return element("div", { className: "facts" }, ...parts.flatMap(part => [part, " "]));
}

function listRuns(listed) {
  const before = new Map(board.runs.map(r => [r.id, r])), palette = board.palette();
  board.runs = listed.map((run, i) => {
    const old = before.get(run.id);
    return { ...old, ...run, on: old ? old.on : run.current && i < palette.length, colour: palette[i % palette.length] };
  });
  const focused = document.activeElement?.dataset?.run;
  find("runs").replaceChildren(...board.runs.map(run => {
    const facts = [], of = run.max_iterations ? " / " + count(run.max_iterations) : "";
    facts.push(count(run.iteration) + of);
    if (run.loss !== null) facts.push(`${word("loss")} ${run.loss.toFixed(4)}`);
    if (run.val_loss !== null) facts.push(`${word("val_loss")} ${run.val_loss.toFixed(4)}`);
    const second = [run.tokens_per_s && run.state === "running" ? count(Math.round(run.tokens_per_s)) + " tok/s" : "",
      run.eta ? word("eta")(duration(run.eta)) : "", run.starts > 1 ? word("starts")(run.starts) : "",
      run.state === "running" ? run.host : ""].filter(Boolean);
    const box = element("input", { type: "checkbox", checked: run.on, "data-run": run.id,
      onchange: event => { run.on = event.target.checked; board.range = null; refresh(true); } });
    box.dataset.run = run.id;
    const label = element("label", { "--run": run.colour, className: run.on ? "" : "off", title: run.folder }, box,
      element("b", {}, run.name), joinFacts(element("span", { className: "state " + run.state }, word(run.state)), ...facts));
    if (second.length) label.append(joinFacts(...second));
    if (run.max_iterations && run.current) {
      const done = element("i"); done.style.width = Math.min(100 * run.iteration / run.max_iterations, 100) + "%";
      label.append(element("div", { className: "bar" }, done));
    }
    if (run.damaged) label.append(element("div", { className: "warning" }, word("damaged")(run.damaged)));
    if (run.warning && run.current) { // in the language of the log
      const text = run.warning.length > 160 ? run.warning.slice(0, 160) + "…" : run.warning;
      label.append(element("div", { className: "warning", title: run.warning }, word("warned"), element("span", { lang: "en" }, text)));
    }
    return element("li", {}, label);
  }));
  if (focused) [...document.querySelectorAll("#runs input")].find(i => i.dataset.run === focused)?.focus();
}

function drawCharts() {
  const keys = new Set(board.shown().flatMap(r => Object.keys(r.data?.curves || {})));
  const specs = [...SPECS], losses = [...keys].filter(k => /^(val_)?loss[/.:]/.test(k)).sort();
  const others = [...keys].filter(k => !KNOWN.has(k) && !losses.includes(k)).sort();
  const after = key => key.replace(/^.*?[/.:]/, ""), sources = [...new Set(losses.map(after))].sort();
  if (losses.length) specs.splice(1, 0, { id: "sources", title: "sources", unit: "nats", format: v => v.toFixed(4), tick: small, large: true,
    group: true, lines: losses.map(key => ({ key, place: sources.indexOf(after(key)),
      ...(key.startsWith("val_") ? { style: "points", name: `${after(key)} · ${word("val_loss")}` } : { name: after(key) }) })) });
  for (const group of new Set(others.filter(k => k.includes("/")).map(k => k.split("/")[0] + "/…"))) {
    const lines = others.filter(k => k.startsWith(group.slice(0, -1))).map((key, place) => ({ key, name: after(key), place }));
    specs.push({ id: "group-" + group, title: group, format: small, group: true, lines });
  }
  for (const key of others.filter(k => !k.includes("/"))) specs.push({ id: "other-" + key, title: key, format: small, lines: [{ key }] });
  for (const [place, spec] of specs.entries()) {
    let chart = board.charts.get(spec.id);
    if (!chart) {
      chart = new Chart(spec, board);
      const next = specs.slice(place + 1).map(s => board.charts.get(s.id)).find(Boolean);
      board.charts.set(spec.id, chart); find("charts").insertBefore(chart.node, next?.node ?? null);
    }
    chart.spec = spec;
  }
  for (const chart of board.charts.values()) chart.draw();
  const empty = find("empty");
  empty.hidden = board.shown().length > 0;
  empty.textContent = word(board.runs.length ? "unselected" : "nothing");
}

function findDifferences(configs) { // rows of [setting, its value in each]; what has several names has one, the shortest
  const keys = [...new Set(configs.flatMap(Object.keys))], parts = new Map(), first = new Map();
  const outer = key => key.split(".").slice(0, -1).map((_, i, all) => all.slice(0, i + 1).join("."));
  const write = value => value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
  for (const key of keys) for (const name of outer(key)) // contents of each dict and list
    parts.set(name, (parts.get(name) || "") + JSON.stringify([key.slice(name.length), configs.map(c => write(c[key]))]));
  const depth = name => name.split(".").length;
  for (const [name, contents] of [...parts].sort((a, b) => depth(a[0]) - depth(b[0]))) if (!first.has(contents)) first.set(contents, name);
  return keys.filter(key => outer(key).every(name => first.get(parts.get(name)) === name)).sort()
    .map(key => [key, configs.map(c => write(c[key]))]).filter(([, values]) => new Set(values).size > 1);
}

function showDifferences() {
  const shown = board.shown().filter(r => r.details), rows = findDifferences(shown.map(r => r.details.config));
  find("differences").hidden = shown.length < 2 || !rows.length;
  find("differences").querySelector(".wide").replaceChildren(element("table", {},
    element("tr", {}, element("th", {}, word("setting")), ...shown.map(r => {
      const head = element("th", {}, r.name); head.style.color = r.colour; return head; })),
    ...rows.map(([key, values]) => element("tr", {},
      element("td", {}, ...key.split(/(?<=\.)/).flatMap(part => [part, element("wbr")])), ...values.map(v => element("td", {}, v))))));
}

function showSamples() {
  const shown = board.shown().filter(r => r.details?.samples.length);
  find("samples").hidden = !shown.length;
  const times = [...new Set(shown.flatMap(r => r.details.samples.map(s => s.iter)))].sort((a, b) => a - b);
  const slider = find("sample-at"), atEnd = +slider.value >= +slider.max;
  slider.max = Math.max(times.length - 1, 0);
  if (atEnd) slider.value = slider.max;
  const at = times[+slider.value] ?? 0;
  find("sample-iteration").textContent = `${word("iteration")} ${at}`;
  slider.setAttribute("aria-label", word("samples"));
  find("sample-texts").replaceChildren(...shown.map(run => {
    const last = Math.max(...run.details.samples.map(s => s.iter).filter(i => i <= at), -1);
    const texts = run.details.samples.filter(s => s.iter === last);
    return element("div", { "--run": run.colour }, element("h3", {}, element("span", {}, `${run.name} · ${last < 0 ? "–" : last}`)),
      ...texts.map(s => element("pre", {}, s.text)));
  }));
}

let busy = false, again = false;
async function refresh(force = false) {
  if (busy) { again ||= force; return; }
  busy = true;
  try {
    const listed = await ask("runs"), changed = force || listed.version !== board.version;
    listRuns(listed.runs);
    if (changed) {
      const buckets = Math.round(Math.min(find("charts").clientWidth || 800, 1600));
      await Promise.all(board.shown().map(async run => {
        const query = { id: run.id, buckets, ...board.iterations(run) };
        if (board.smoothing !== "") query.smoothing = board.smoothing;
        [run.data, run.details] = await Promise.all([ask("run", query), ask("details", { id: run.id })]);
      }));
      board.version = listed.version;
      drawCharts(); showDifferences(); showSamples();
    }
    const connection = find("connection");
    connection.className = exported ? "file" : "";
    connection.textContent = word(exported ? "file" : "live");
  } catch (error) {
    find("connection").className = "lost"; find("connection").textContent = word("lost");
    console.error(error);
  } finally {
    busy = false;
    if (again) { again = false; refresh(true); }
  }
}

function showControls() {
  document.documentElement.dataset.theme = board.theme;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  find("axis").replaceChildren(...["iter", "tokens", "hours"].map(key => element("button", {
    "aria-pressed": String(board.axis === key), textContent: word(key),
    onclick: () => { board.axis = key; board.range = null; store("axis", key); showControls(); refresh(true); } })));
  find("smoothing").replaceChildren(...[["", word("recorded")], ["0", word("none")], ...[10, 50, 200, 1000, 5000].map(n => [String(n), String(n)])]
    .map(([value, text]) => element("option", { value, textContent: text, selected: value === board.smoothing })));
  find("language").textContent = word("other");
  find("theme").textContent = word(board.theme === "dark" ? "light" : "dark");
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const chooseTheme = () => { board.theme = stored("theme", prefersDark.matches ? "dark" : "light"); };
const redraw = () => { showControls(); refresh(true); };
chooseTheme();
prefersDark.addEventListener("change", () => { chooseTheme(); redraw(); });
find("theme").onclick = () => { board.theme = board.theme === "dark" ? "light" : "dark"; store("theme", board.theme); redraw(); };
find("language").onclick = () => { language = language === "zh" ? "en" : "zh"; store("language", language); redraw(); };
find("smoothing").onchange = event => { board.smoothing = event.target.value; store("smoothing", board.smoothing); refresh(true); };
find("smoothing").parentNode.hidden = Boolean(exported); // smoothed as the run recorded it
find("sample-at").oninput = showSamples;
let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => refresh(true), 100); });
showControls();
refresh(true);
if (!exported) setInterval(() => { if (!document.hidden) refresh(); }, POLL);
