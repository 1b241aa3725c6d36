"use strict";
// What every part of the page needs: nodes, numbers as text, scales.

const SVG = "http://www.w3.org/2000/svg";
function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const html = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

function coloured(node, [light, dark]) {
  node.classList.add("c");
  node.style.setProperty("--light", light);
  node.style.setProperty("--dark", dark);
  return node;
}

// --- numbers ---

const minus = (text) => text.replace("-", "−");

function power(exponent) {
  return "10" + [...String(exponent)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
}

function shown(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 5e-4 || size >= 1e5)) {
    const [digits, exponent] = value.toExponential(1).split("e");
    return minus(`${digits}·${power(Number(exponent))}`);
  }
  return minus(value.toFixed(size < 10 ? 3 : size < 1000 ? 1 : 0));
}

// Two significant digits.
const rounded = (value) => (value >= 5e-4 && value < 100 ? value.toPrecision(2) : shown(value));

const plain = (value) => minus(String(Number(value.toPrecision(6))));

// --- scales: `at` takes a value to 0..1, `ticks` are [value, text] ---

function linearScale(low, high, few = 5) {
  const rough = (high - low) / few;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((k) => k * unit >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9); k++) ticks.push([k * step, plain(k * step)]);
  return { low, at: (v) => (v - low) / (high - low), ticks };
}

function layerScale(layers) {
  const last = Math.max(1, layers[layers.length - 1]);
  const step = [1, 2, 4, 8, 16, 32, 64, 128].find((k) => last / k <= 8.01) || Math.ceil(last / 8);
  const ticks = [];
  for (let layer = 0; layer <= last; layer += step) ticks.push([layer, String(layer)]);
  return { low: 0, at: (v) => v / last, ticks };
}

function logScale(low, high) {
  const from = Math.log10(low), to = Math.log10(high);
  const every = [1, 2, 3, 5, 10, 20, 50].find((k) => (to - from) / k <= 9) || 100;
  const ticks = [];
  for (let k = Math.floor(from); k <= to; k++) {
    for (const digit of to - from < 2.5 ? [1, 2, 5] : [1]) {
      const value = digit * 10 ** k, inside = value >= low * 0.999 && value <= high * 1.001;
      if (inside && k % every === 0) ticks.push([value, k >= -2 && k <= 3 ? plain(value) : (digit > 1 ? digit + "·" : "") + power(k)]);
    }
  }
  return { low, at: (v) => (Math.log10(v) - from) / (to - from), ticks };
}

function lambdaScale(lams, room) {
  const bend = (v) => Math.sign(v) * (Math.abs(v) <= 1 ? Math.abs(v) : 1 + 1.6 * Math.log10(Math.abs(v)));
  let low = bend(lams[0]), high = bend(lams[lams.length - 1]);
  if (low === high) [low, high] = [low - 1, high + 1];
  const pad = 0.03 * (high - low);
  const at = (v) => (bend(v) - low + pad) / (high - low + 2 * pad);
  const kept = [];
  for (const lam of [...lams].sort((a, b) => (a !== 0) - (b !== 0) || Math.abs(b) - Math.abs(a))) {
    if (kept.every((other) => Math.abs(at(other) - at(lam)) >= room)) kept.push(lam);
  }
  return { low: null, at, ticks: lams.map((lam) => [lam, kept.includes(lam) ? plain(lam) : ""]) };
}

