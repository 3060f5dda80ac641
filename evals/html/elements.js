"use strict";

// Elements and numbers. Text becomes text nodes and attributes only; nothing here reads a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

const whole = (value) => value.toLocaleString("en-US");

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e9) return trimmed(value / 1e9) + "B";
  if (size >= 1e6) return trimmed(value / 1e6) + "M";
  if (size >= 1e4) return trimmed(value / 1e3) + "k";
  if (size >= 100) return whole(Math.round(value));
  if (size >= 1e-4) return String(Number(value.toPrecision(3)));
  return value.toExponential(0).replace("e-", "e−");
}

const trimmed = (value) => String(Number(value.toPrecision(3)));
const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

// As narrow and as precise in every row of a column.
const three = (value) =>
  value && Math.abs(value) < 1000 && Math.abs(value) >= 0.001 ? value.toPrecision(3) : short(value);

function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0%";
  if (value < 0.001) return "<0.001%";
  return (value >= 10 ? value.toFixed(1) : value.toPrecision(2)) + "%";
}

const percentTick = (share) => String(Number((100 * share).toPrecision(3))) + "%";

const raisedTo = (exponent) =>
  [...exponent.toFixed(2)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? { "-": "⁻", ".": "·" }[c]).join("");
