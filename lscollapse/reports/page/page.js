// The page around the plots: controls, legends that are live readouts, tables of the numbers, theme, print.

const SPREADS = { band: "± 1 sd", excerpts: "each one", none: "mean" };

class Figure {
  constructor(host, figure, data, number) {
    Object.assign(this, { host, figure, data, number, pool: null, width: 0, at: null, named: null });
    figure.tabs.forEach(align);
    this.state = { tab: 0, measure: null, log: false, spread: "band", hidden: new Set() };
    this.build();
    this.setMeasure(Object.keys(data.measures)[0]);
    new ResizeObserver(() => { if (this.plotHost.clientWidth !== this.width) this.draw(); }).observe(this.plotHost);
  }

  get tab() { return this.figure.tabs[this.state.tab]; }
  get shown() { return this.tab.series.filter((series) => !this.state.hidden.has(series.name)); }
  get measures() { return Object.keys(this.data.measures).filter((name) => this.tab.series.some((series) => series.of[name])); }

  build() {
    const hint = "Arrow keys left and right move the crosshair, up and down choose a curve.";
    this.controls = html("div", { class: "controls" });
    this.title = html("p", { class: "view" });
    this.massive = html("p", { class: "massive" });
    this.plotHost = html("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${this.figure.title}. ${hint}` });
    this.live = html("p", { class: "hidden", "aria-live": "polite" });
    this.legend = html("div", { class: "legend" });
    this.numbers = html("details", {}, html("summary", {}, "Numbers"));
    const stage = html("div", { class: "stage" }, html("div", {}, this.title, this.massive, this.plotHost), this.legend);
    this.host.append(this.controls, stage, this.live, this.numbers);
    this.numbers.addEventListener("toggle", () => this.fillNumbers());
    this.plotHost.addEventListener("pointermove", (event) => this.point(event));
    this.plotHost.addEventListener("pointerdown", (event) => this.point(event));
    this.plotHost.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.move(null, null); });
    this.plotHost.addEventListener("keydown", (event) => this.key(event));
    this.plotHost.addEventListener("blur", () => this.move(null, null));
  }

  // --- what is shown ---

  setTab(tab) {
    this.state.tab = tab;
    this.measures.includes(this.state.measure) ? this.update() : this.setMeasure(this.measures[0]);
  }

  setMeasure(measure) {
    this.state.measure = this.measures.includes(measure) ? measure : this.measures[0];
    const values = this.tab.series.flatMap((series) => (series.of[this.state.measure] || { y: [] }).y).filter((value) => value !== null);
    const facts = this.data.measures[this.state.measure];
    const wide = values.length > 0 && Math.min(...values) > 0 && Math.max(...values) > 1e3 * Math.min(...values);
    this.set({ log: facts.log || (wide && !facts.unit) });
  }

  set(change) {
    Object.assign(this.state, change);
    this.update();
  }

  update() {
    this.at = this.named = null;
    this.fillControls();
    this.draw();
    this.fillNumbers();
    for (const table of document.querySelectorAll(`.of-tab[data-figure="${this.number}"]`)) table.hidden = Number(table.dataset.tab) !== this.state.tab;
  }

  draw() {
    const { measure, log } = this.state, facts = this.data.measures[measure];
    this.width = this.plotHost.clientWidth;
    const name = html("b", {}, facts.name);
    const line = facts.line ? ` · dotted: ${facts.means}` : "";
    const hatched = this.shown.some((series) => series.of[measure] && series.of[measure].hatched.size) ? " · hatched: unresolved, decided by rounding" : "";
    this.title.replaceChildren(this.tab.name && this.tab.name + " · ", name, log ? ", log scale" : "", line, hatched);
    const label = `${this.figure.title}: ${facts.name}${this.tab.name && ", " + this.tab.name}, ${this.shown.length} curves`;
    const view = { tab: this.tab, kind: this.figure.x, measure, facts, log, spread: this.spread, series: this.shown, pool: this.pool, width: Math.max(this.width, 260), label };
    this.plot = new Plot(view);
    this.plotHost.replaceChildren(this.plot.node);
    this.fillMassive();
    this.fillLegend();
  }

  // Where one row decides the measure: says so, and offers the ratio that shows it and the measure that it does not decide.
  fillMassive() {
    const { measure } = this.state, angular = this.data.measures[measure].angular;
    const others = angular ? [angular, "row_norm_ratio"] : measure === "row_norm_ratio" ? ["angular_mu"] : [];
    const parts = this.tab.massive && others.length ? [html("span", {}, this.tab.massive)] : [];
    for (const name of parts.length ? others.filter((other) => this.measures.includes(other)) : []) {
      const button = html("button", { type: "button", "data-name": `instead ${name}` }, `Show ${this.data.measures[name].name}`);
      button.addEventListener("click", () => {
        this.setMeasure(name);
        this.controls.querySelector("select").focus();
      });
      parts.push(button);
    }
    this.massive.replaceChildren(...parts);
  }

  get spread() { return this.state.spread === "excerpts" && !this.pool ? "band" : this.state.spread; }

  // --- controls ---

  fillControls() {
    const focused = this.controls.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const { tabs } = this.figure, { measure, log, tab } = this.state, parts = [];
    if (tabs.length > 1) parts.push(this.group("tabs", "Model", tabs.map((each, i) => [each.name, i === tab, () => this.setTab(i)])));
    if (this.measures.length > 1) {
      const select = html("select", { "aria-label": "Measure", "data-name": "measure" });
      for (const name of this.measures) select.append(html("option", { value: name, selected: name === measure }, this.data.measures[name].name));
      select.addEventListener("change", () => this.setMeasure(select.value));
      parts.push(select);
    }
    parts.push(this.group("scale", "Vertical scale", [["linear", !log, () => this.set({ log: false })], ["log", log, () => this.set({ log: true })]]));
    if (this.tab.series.some((series) => series.of[measure] && series.of[measure].s)) {
      const kinds = Object.keys(SPREADS).filter((kind) => kind !== "excerpts" || this.pool);
      const words = (kind) => (kind === "excerpts" ? `each ${this.figure.unit}` : SPREADS[kind]);
      parts.push(this.group("spread", "Spread", kinds.map((kind) => [words(kind), kind === this.spread, () => this.set({ spread: kind })])));
    }
    this.controls.replaceChildren(...parts);
    const again = focused && [...this.controls.querySelectorAll("[data-name]")].find((node) => node.dataset.name === focused);
    if (again) again.focus();
  }

  group(name, label, choices) {
    const group = html("div", { class: `group ${name}`, role: "group", "aria-label": label });
    for (const [words, pressed, act] of choices) {
      const button = html("button", { type: "button", "aria-pressed": String(pressed), "data-name": `${name} ${words}` }, words);
      button.addEventListener("click", act);
      group.append(button);
    }
    return group;
  }

  // --- the legend: toggles, and the values under the crosshair ---

  fillLegend() {
    const focused = this.legend.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.where = html("span", { class: "at" });
    const head = html("div", { class: "head" }, this.where);
    for (const [words, hidden] of [["all", []], ["none", this.tab.series.map((series) => series.name)]]) {
      const button = html("button", { type: "button", "data-name": `show ${words}`, "aria-label": `Show ${words}` }, words);
      button.addEventListener("click", () => this.set({ hidden: new Set(hidden) }));
      head.append(button);
    }
    const list = html("ul");
    this.rows = this.tab.series.filter((series) => series.of[this.state.measure]).map((series) => this.legendRow(series, list));
    this.foot = html("p", { class: "foot" });
    this.legend.replaceChildren(head, list, this.foot);
    const again = focused && [...this.legend.querySelectorAll("button")].find((node) => node.dataset.name === focused);
    if (again) again.focus();
    this.read();
  }

  legendRow(series, list) {
    const { hidden } = this.state, { end, gaps } = series.of[this.state.measure];
    const row = { series, value: html("span", { class: "value" }), sd: html("span", { class: "sd" }) };
    const key = coloured(html("span", { class: series.dash ? "key dashed" : "key" }), series.colour);
    const button = html("button", { type: "button", "aria-pressed": String(!hidden.has(series.name)), "data-name": series.name }, key, html("span", {}, series.name), row.value, row.sd);
    for (const words of [gaps, end]) if (words) button.append(html("span", { class: "note" }, words));
    row.node = html("li", {}, button);
    button.addEventListener("click", () => {
      const next = new Set(hidden);
      next.delete(series.name) || next.add(series.name);
      this.set({ hidden: next });
    });
    for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
      button.addEventListener(event, () => this.plot.pick(on ? series : null, on));
    }
    list.append(row.node);
    return row;
  }

  // Values at the crosshair, or where there is none at the last layer, at lambda = 1, at the largest |lambda|.
  read() {
    const { x } = this.tab, one = this.figure.x === "lambda" ? x.indexOf(1) : -1;
    const i = this.at === null ? (one >= 0 ? one : x.length - 1) : this.at;
    this.where.textContent = this.place(i) + (this.at === null && this.figure.x === "layer" ? " (last)" : "");
    const notes = new Map();
    for (const row of this.rows) {
      const record = row.series.of[this.state.measure], value = record.y[i];
      row.value.textContent = shown(value);
      row.sd.textContent = record.s && record.s[i] !== null && value !== null ? `± ${shown(record.s[i])}` : "";
      if (record.note[i]) notes.set(record.note[i], [...(notes.get(record.note[i]) || []), row.series.name]);
      row.node.classList.toggle("on", Boolean(this.named && this.named.series === row.series));
    }
    this.foot.textContent = [...notes].map(([words, names]) => `${words}: ${names.map((name) => name.replaceAll(" ", "\u00a0")).join(", ")}`).join("; ");
  }

  place(i) {
    const x = this.tab.x[i];
    return { layer: `layer ${x}`, lambda: `λ = ${plain(x)}`, size: `|λ| = ${plain(x)}` }[this.figure.x];
  }

  // --- crosshair ---

  point(event) {
    const { i, height } = this.plot.locate(event);
    if (i !== null) this.move(i, this.plot.nearest(i, height));
  }

  move(i, named) {
    if (i === null && this.at === null) return;
    Object.assign(this, { at: i, named });
    this.plot.cursor(i, named, named ? this.words(i, named) : "");
    this.read();
  }

  words(i, { series, record, e }) {
    const rounding = record.r && record.r[i] !== null && (e >= 0 || record.y[i] !== null) ? `, rounding ± ${rounded(record.r[i])}` : "";
    if (!(e >= 0)) return `${series.name}: ${shown(record.y[i])}${record.s && record.s[i] !== null ? ` ± ${shown(record.s[i])}` : ""}${rounding}`;
    const titles = (this.data.excerpts[this.figure.run] || {})[series.model || this.tab.model] || [];
    return `${titles[e] || `${this.figure.unit} ${e}`}: ${shown(this.pool[record.at[i] + e])} (${series.name})${rounding}`;
  }

  key(event) {
    const places = [...new Set(this.plot.records.flatMap(({ record }) => record.own))].sort((a, b) => a - b);
    if (!places.length) return;
    const curves = this.plot.records, step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    let k = this.at === null ? (step > 0 ? -1 : places.length) : places.indexOf(this.at);
    let c = this.named ? curves.findIndex(({ series }) => series === this.named.series) : 0;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") k = Math.min(Math.max(k + step, 0), places.length - 1);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") c = (c + (this.named ? step : 0) + curves.length) % curves.length;
    else if (event.key === "Home") k = 0;
    else if (event.key === "End") k = places.length - 1;
    else if (event.key === "Escape") return this.move(null, null);
    else return;
    event.preventDefault();
    const i = places[Math.min(Math.max(k, 0), places.length - 1)], named = { ...curves[c], e: -1 };
    this.move(i, named);
    this.live.textContent = `${this.place(i)}, ${this.words(i, named)}${named.record.note[i] ? ", " + named.record.note[i] : ""}`;
  }

  // --- numbers ---

  fillNumbers() {
    if (!this.numbers.open) return;
    const { measure } = this.state, shownOnes = this.plot.records, x = { layer: "layer", lambda: "λ", size: "|λ|" }[this.figure.x];
    const head = html("tr", {}, html("th", { scope: "col" }, x), ...shownOnes.map(({ series }) => html("th", { scope: "col", class: "right" }, series.name)));
    const body = this.tab.x.map((value, i) => html("tr", {}, html("th", { scope: "row" }, plain(value)),
      ...shownOnes.map(({ record }) => html("td", { class: "right nowrap" }, shown(record.y[i]) + (record.s && record.s[i] !== null ? ` ± ${shown(record.s[i])}` : "")))));
    const table = html("table", { class: "plain" }, html("thead", {}, head), html("tbody", {}, ...body));
    const save = html("button", { type: "button" }, "Save as CSV");
    save.addEventListener("click", () => this.save(`${this.figure.id}-${measure}.csv`));
    const region = html("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `Numbers of ${this.figure.title}` }, table);
    this.numbers.replaceChildren(this.numbers.firstChild, save, region);
  }

  save(name) {
    const lines = [["x", "curve", "mean", "sd", "rounding", "note"]];
    for (const { series, record } of this.plot.records) {
      for (const i of record.own) lines.push([this.tab.x[i], series.name, record.y[i] ?? "", record.s ? record.s[i] ?? "" : "", record.r ? record.r[i] ?? "" : "", record.note[i] || ""]);
    }
    const text = lines.map((line) => line.map((cell) => `"${String(cell).replaceAll('"', '""')}"`).join(",")).join("\n");
    const link = html("a", { href: URL.createObjectURL(new Blob([text + "\n"], { type: "text/csv" })), download: name });
    link.click();
    URL.revokeObjectURL(link.href);
  }
}

function theme() {
  const button = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const kept = { get: () => { try { return localStorage.getItem("lscollapse-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("lscollapse-theme", value); } catch { /* a browser may forbid it on file:// */ } } };
  const show = () => button.setAttribute("aria-pressed", String((root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark"));
  if (kept.get()) root.dataset.theme = kept.get();
  button.addEventListener("click", () => {
    root.dataset.theme = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    kept.set(root.dataset.theme);
    show();
  });
  dark.addEventListener("change", show);
  show();
}

function print() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("#runs details:not([open])")];
    closed.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
}

function start() {
  theme();
  print();
  const data = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll(".chart")].map((host) => new Figure(host, data.figures[host.dataset.figure], data, host.dataset.figure));
  document.documentElement.dataset.drawn = "figures";
  if (!("DecompressionStream" in globalThis)) return;
  unpack(document.getElementById("pack").textContent).then((pool) => {
    for (const figure of figures) {
      figure.pool = pool;
      figure.fillControls();
    }
    document.documentElement.dataset.drawn = "all";
  });
}
start();
