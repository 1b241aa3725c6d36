// One plot: its data, curves and crosshair. The controls and the legend around it are in page.js.

const MARGIN = { left: 50, right: 14, top: 12, bottom: 40 };

// --- data ---

// Puts every record of a tab on the tab's x: y, s, r, at and note get one entry each x, `own` is where the record has a point.
function align(tab) {
  const places = new Map(tab.x.map((x, i) => [x, i]));
  for (const series of tab.series) {
    for (const record of Object.values(series.of)) {
      record.own = (record.x || tab.x).map((x) => places.get(x));
      const spread = (values) => {
        const whole = tab.x.map(() => null);
        record.own.forEach((place, i) => { whole[place] = values[i]; });
        return whole;
      };
      const starts = typeof record.at === "number" ? record.own.map((_, i) => record.at + i * record.n) : record.at;
      const note = record.own.map(() => "");
      for (const [first, last, words] of record.notes || []) note.fill(words, first, last + 1);
      for (const kind of ["open", "hatched"]) record[kind] = new Set((record[kind] || []).map((i) => record.own[i]));
      Object.assign(record, { y: spread(record.y), s: record.s && spread(record.s), r: record.r && spread(record.r), at: starts && spread(starts), note: spread(note) });
    }
  }
}

// The excerpts: three planes of bytes, deflated, in base64; each value is the upper 24 bits of a float64.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = planes.length / 3, values = new Float64Array(n), view = new DataView(new ArrayBuffer(8));
  for (let i = 0; i < n; i++) {
    view.setUint32(0, ((planes[i] << 24) | (planes[n + i] << 16) | (planes[2 * n + i] << 8)) >>> 0);
    values[i] = view.getFloat64(0);
  }
  return values;
}

// --- the plot ---

class Plot {
  // view: {tab, kind, measure, facts, log, spread, series (those shown), pool, width, label}
  constructor(view) {
    this.view = view;
    this.records = view.series.map((series) => ({ series, record: series.of[view.measure] })).filter((each) => each.record);
    this.width = view.width;
    this.height = Math.round(Math.min(430, Math.max(270, view.width * 0.58)));
    this.inner = { width: this.width - MARGIN.left - MARGIN.right, height: this.height - MARGIN.top - MARGIN.bottom };
    this.xScale = this.makeX();
    this.yScale = this.makeY();
    this.node = svg("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img", "aria-label": view.label });
    this.drawAxes();
    this.drawMarks();
    const clip = `clip${Plot.count++}`;
    this.node.append(svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: MARGIN.left, y: MARGIN.top - 6, width: this.inner.width + 6, height: this.inner.height + 6 }))));
    this.strips = 0;
    this.groups = new Map(this.records.map((each) => [each.series, this.drawSeries(each, clip)]));
    this.node.append(...this.groups.values());
    this.over = svg("g", { "pointer-events": "none" });
    this.node.append(this.over);
  }

  x(i) { return MARGIN.left + this.inner.width * this.xScale.at(this.view.tab.x[i]); }

  y(value) {
    const inside = this.view.log ? Math.max(value, this.yScale.low) : value;
    return MARGIN.top + this.inner.height * (1 - this.yScale.at(inside));
  }

  makeX() {
    const { kind, tab } = this.view;
    if (kind === "layer") return layerScale(tab.x);
    if (kind === "lambda") return lambdaScale(tab.x, 30 / this.inner.width);
    const ends = [...tab.x, ...(tab.marks || []).map((mark) => mark.x)];
    return logScale(Math.min(...ends) / 1.3, Math.max(...ends) * 1.6);
  }

  *values() {
    for (const { record } of this.records) {
      for (const i of record.own) {
        if (record.y[i] === null) continue;
        yield record.y[i];
        if (this.view.spread === "band" && record.s && !this.view.log) yield* [record.y[i] - record.s[i], record.y[i] + record.s[i]];
        for (let e = 0; this.view.spread === "excerpts" && e < record.n; e++) yield this.view.pool[record.at[i] + e];
      }
    }
  }

  makeY() {
    let low = Infinity, high = -Infinity, least = Infinity;
    for (const value of this.values()) {
      low = Math.min(low, Number.isNaN(value) ? low : value);
      high = Math.max(high, Number.isNaN(value) ? high : value);
      if (value > 0) least = Math.min(least, value);
    }
    const unit = this.view.facts.unit;
    if (this.view.log) {
      if (least === Infinity) return logScale(0.1, 1.3);
      const top = unit ? 1.25 : high * 1.25, decade = 10 ** Math.floor(Math.log10(least * 0.85));
      return logScale(Math.max(decade * (least * 0.85 >= 5 * decade ? 5 : least * 0.85 >= 2 * decade ? 2 : 1), Number.MIN_VALUE * 1e20), top);
    }
    if (unit) return linearScale(0, 1.03, 6);
    if (low > high) return linearScale(0, 1);
    if (low > 0 && low < 0.6 * high) low = 0;
    const pad = 0.04 * (high - low || Math.abs(high) || 1);
    return linearScale(low === 0 ? 0 : low - pad, high + pad);
  }

  drawAxes() {
    const { left, top } = MARGIN, bottom = top + this.inner.height, right = left + this.inner.width;
    const axes = svg("g");
    for (const [value, text] of this.yScale.ticks) {
      const y = this.y(value);
      axes.append(svg("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }));
      axes.append(svg("text", { x: left - 7, y: y + 4, "text-anchor": "end", class: "tick" }, text));
    }
    for (const [value, text] of this.xScale.ticks) {
      const x = left + this.inner.width * this.xScale.at(value);
      axes.append(svg("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "axis" }));
      axes.append(svg("text", { x, y: bottom + 17, "text-anchor": "middle", class: "tick", "data-x": value }, text));
    }
    axes.append(svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    const name = { layer: "layer", lambda: "λ (linear between −1 and 1)", size: "|λ| (log scale)" }[this.view.kind];
    axes.append(svg("text", { x: right, y: bottom + 34, "text-anchor": "end", class: "label" }, name));
    this.node.append(axes);
  }

  drawMarks() {
    const { left, top } = MARGIN, right = left + this.inner.width, bottom = top + this.inner.height;
    const across = (value, words) => {
      const place = this.yScale.at(value), y = this.y(value);
      if (!(place > 0.02 && place < 1)) return;
      this.node.append(svg("line", { x1: left, x2: right, y1: y, y2: y, class: "mark-line" }));
      this.node.append(svg("text", { x: right, y: y - 4, "text-anchor": "end", class: "tick" }, words));
    };
    if (this.view.facts.line) across(this.view.facts.line, "");
    const floors = new Set(this.records.map(({ record }) => record.floor).filter((floor) => floor > 0));
    for (const floor of this.view.log && this.view.facts.unit ? floors : []) across(floor, "floor of the dtype");
    let row = 0, edge = -Infinity;
    for (const mark of [...(this.view.tab.marks || [])].sort((a, b) => a.x - b.x)) {
      const x = left + this.inner.width * this.xScale.at(mark.x), text = mark.names.join(",");
      row = x < edge ? row + 1 : 0;
      edge = x + 9 + 6.5 * text.length;
      this.node.append(svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: mark.measured ? "bound measured" : "bound" }));
      this.node.append(svg("text", { x: x + 4, y: top + 10 + 15 * row, class: "halo" }, text));
    }
  }

  drawSeries({ series, record }, clip) {
    const group = coloured(svg("g", { class: series.dash ? "series dashed" : "series", "clip-path": `url(#${clip})` }), series.colour);
    const runs = this.runs(record), { kind, spread } = this.view;
    if (spread === "band" && record.s) group.append(svg("path", { class: "band", d: runs.map((run) => this.band(record, run)).join("") }));
    if (spread === "excerpts" && record.at) {
      const all = Array.from({ length: record.n }, (_, e) => this.excerpt(record, e));
      group.append(svg("path", { class: "excerpts", d: all.join("") }));
    }
    group.append(svg("path", { class: "line", d: runs.map((run) => this.path(run, (i) => record.y[i])).join("") }));
    for (const run of runs) {
      for (const i of run) {
        const x = this.x(i), y = this.y(record.y[i]);
        if (record.open.has(i) || (this.view.log && record.y[i] <= 0)) group.append(svg("path", { class: "open", d: `M${x - 4},${y - 5}h8l-4,7z` }));
        else if (kind !== "layer" || run.length === 1) group.append(svg("circle", { class: "dot", cx: x, cy: y, r: kind === "size" ? 2 : 3.2 }));
      }
    }
    if (record.hatched.size) group.append(svg("path", { class: "hatch", d: this.hatch(record) }));
    for (const [x, y] of this.crosses(record, runs)) group.append(svg("path", { class: "cross", d: `M${x - 4.5},${y - 4.5}l9,9m0,-9l-9,9` }));
    return group;
  }

  // A strip of slanted strokes along the bottom where a record is unresolved, half way to its other points.
  hatch(record) {
    const bottom = MARGIN.top + this.inner.height - 2 - 8 * this.strips++, own = record.own, strokes = [];
    own.forEach((i, k) => {
      if (!record.hatched.has(i)) return;
      const middle = (other) => (other === undefined ? this.x(i) : (this.x(i) + this.x(other)) / 2);
      const [from, to] = own.length > 1 ? [middle(own[k - 1]), middle(own[k + 1])] : [this.x(i) - 6, this.x(i) + 6];
      for (let x = 5 * Math.ceil(from / 5); x < to; x += 5) strokes.push(`M${x},${bottom}l4,-6`);
    });
    return strokes.join("");
  }

  // Stretches of a record without a masked or unresolved point.
  runs(record) {
    const runs = [[]];
    for (const i of record.own) record.y[i] === null ? runs.push([]) : runs[runs.length - 1].push(i);
    return runs.filter((run) => run.length);
  }

  crosses(record, runs) {
    if (this.view.kind === "lambda") return record.own.filter((i) => record.y[i] === null && !record.hatched.has(i)).map((i) => [this.x(i), MARGIN.top + 8]);
    if (!record.end || !runs.length) return [];
    const last = runs[runs.length - 1].at(-1);
    if (last === record.own.at(-1)) return []; // it has a hole, and goes on
    if ([...record.hatched].some((i) => i > last)) return []; // where it ends nobody knows
    return [[this.x(last), this.y(record.y[last])]];
  }

  path(places, value) {
    return places.map((i, k) => `${k ? "L" : "M"}${this.x(i).toFixed(1)},${this.y(value(i)).toFixed(1)}`).join("");
  }

  band(record, run) {
    const least = this.view.log ? this.yScale.low : -Infinity;
    const low = this.path([...run].reverse(), (i) => Math.max(record.y[i] - (record.s[i] || 0), least)).replace("M", "L");
    return this.path(run, (i) => record.y[i] + (record.s[i] || 0)) + low + "Z";
  }

  excerpt(record, e) {
    const value = (i) => this.view.pool[record.at[i] + e];
    const runs = [[]];
    for (const i of record.own) Number.isNaN(value(i)) ? runs.push([]) : runs[runs.length - 1].push(i);
    return runs.map((run) => (run.length === 1 ? this.path([run[0], run[0]], value) : this.path(run, value))).join("");
  }

  // The x nearest to a point of the page, and its height in the plot.
  locate(event) {
    const box = this.node.getBoundingClientRect(), scale = this.width / box.width;
    const px = (event.clientX - box.left) * scale;
    const has = new Set(this.records.flatMap(({ record }) => record.own));
    let nearest = null;
    for (const i of has) if (nearest === null || Math.abs(this.x(i) - px) < Math.abs(this.x(nearest) - px)) nearest = i;
    return { i: nearest, height: (event.clientY - box.top) * scale };
  }

  // The curve (and in the excerpt view the excerpt) that passes nearest to a height at x number i.
  nearest(i, height) {
    let best = null, least = Infinity;
    for (const { series, record } of this.records) {
      if (record.y[i] === null && !(this.view.spread === "excerpts" && record.at && record.at[i] !== null)) continue;
      const one = this.view.spread === "excerpts" && record.at;
      for (let e = one ? 0 : -1; e < (one ? record.n : 0); e++) {
        const away = Math.abs(this.y(one ? this.view.pool[record.at[i] + e] : record.y[i]) - height);
        if (away < least) [best, least] = [{ series, record, e }, away];
      }
    }
    return best;
  }

  // Crosshair at x number i, dots on every curve, one curve (and excerpt) named.
  cursor(i, named, words) {
    this.over.replaceChildren();
    this.pick(named && named.series, false);
    if (i === null) return;
    const x = this.x(i);
    this.over.append(svg("line", { x1: x, x2: x, y1: MARGIN.top, y2: MARGIN.top + this.inner.height, class: "cursor" }));
    for (const { series, record } of this.records) {
      if (record.y[i] !== null) this.over.append(coloured(svg("circle", { class: "dot", cx: x, cy: this.y(record.y[i]), r: 3.6 }), series.colour));
    }
    if (!named) return;
    const one = named.e >= 0, value = one ? this.view.pool[named.record.at[i] + named.e] : named.record.y[i];
    if (one) this.over.append(coloured(svg("path", { class: "one", d: this.excerpt(named.record, named.e) }), named.series.colour));
    if (value === null) return;
    const right = x > MARGIN.left + 0.55 * this.inner.width, y = Math.max(this.y(value) - 9, MARGIN.top + 8);
    this.over.append(svg("text", { class: "halo", x: right ? x - 9 : x + 9, y, "text-anchor": right ? "end" : "start" }, words));
  }

  // Brings one curve out; the others fade where `fade` is set.
  pick(series, fade) {
    for (const [each, group] of this.groups) group.classList.toggle("on", each === series);
    this.node.classList.toggle("picked", Boolean(series && fade && this.groups.has(series)));
  }
}
Plot.count = 0;

