// Charts as inline SVG, drawn at the width of their place and again when that changes.

const MARGIN = { top: 10, right: 12, bottom: 30, left: 46 };

// spec: title, note, x and y {label, log, from0, format}, series [{kind: line | dash | bars, x, y, name}], height,
// readout (at) => text for the point under the pointer, and for the last one where there is none
function chart(spec) {
  const readout = el("span", { class: "readout" });
  const place = el("div", { class: "plot" });
  const figure = el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("span", { class: "title" }, spec.title), readout),
    place,
    spec.note ? el("p", { class: "note" }, spec.note) : null,
  );
  let drawn = 0;
  new ResizeObserver(() => {
    if (place.clientWidth && place.clientWidth !== drawn) {
      drawn = place.clientWidth;
      place.replaceChildren(draw(spec, drawn, readout));
    }
  }).observe(place);
  return figure;
}

function draw(spec, width, readout) {
  const height = spec.height || 180;
  const series = spec.series.filter((each) => each.x.length);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const xs = series.flatMap((each) =>
    each.kind === "bars" ? [each.x[0], each.x[each.x.length - 1] + each.width] : each.x,
  );
  const x = scale(spec.x, xs, MARGIN.left, right);
  const y = scale(
    spec.y,
    series.flatMap((each) => each.y),
    bottom,
    MARGIN.top,
  );
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": spec.title });
  for (const tick of y.ticks(bottom > 120 ? 4 : 3)) {
    root.append(
      svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg(
        "text",
        { class: "tick", x: MARGIN.left - 7, y: y(tick) + 3.5, "text-anchor": "end" },
        (spec.y.format || short)(tick),
      ),
    );
  }
  for (const tick of x.ticks(Math.max(2, Math.floor((right - MARGIN.left) / 56)))) {
    root.append(
      svg(
        "text",
        { class: "tick", x: x(tick), y: bottom + 15, "text-anchor": "middle" },
        (spec.x.format || short)(tick),
      ),
    );
  }
  root.append(
    svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom + 0.5, y2: bottom + 0.5 }),
    svg("text", { class: "label", x: right, y: height - 2, "text-anchor": "end" }, spec.x.label),
  );
  for (const each of series) root.append(each.kind === "bars" ? bars(each, x, y, bottom) : line(each, x, y));
  follow(root, spec, series[0], x, y, bottom, readout);
  return root;
}

function scale(axis, values, start, end) {
  const positive = axis.log ? values.filter((value) => value > 0) : values;
  const usable = positive.length ? positive : [1];
  let low = axis.from0 ? 0 : least(usable);
  let high = -least(usable.map((value) => -value));
  if (axis.from0 && !(high > 0)) high = axis.least || 1;
  if (!(high > low))
    [low, high] = axis.log ? [low / 2, low * 2] : [low - Math.abs(low) / 10 - 1e-9, low + Math.abs(low) / 10 + 1e-9];
  else if (!axis.log && axis.padded)
    [low, high] = [Math.max(low - (high - low) / 12, low < 0 ? -Infinity : 0), high + (high - low) / 12];
  if (axis.log && axis.padded) [low, high] = [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
  const f = axis.log ? Math.log10 : (value) => value;
  const to = (value) =>
    start + ((f(axis.log ? Math.max(value, low / 10) : value) - f(low)) / (f(high) - f(low))) * (end - start);
  to.ticks = (count) => (axis.log ? powers(low, high, count) : steps(low, high, count));
  return to;
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

function steps(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const fine = power * ([1, 2, 2.5, 5].find((each) => each * power >= rough) || 10);
  const step = Math.max(fine, 1e-12 * Math.max(Math.abs(low), Math.abs(high))); // or adding it would change nothing
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function powers(low, high, count) {
  const decades = Math.log10(high / low);
  const factors = decades > count / 2 ? [1] : decades > 1 ? [1, 3] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
    }
  }
  const every = Math.ceil(found.length / (count + 2));
  return found.filter((_, i) => i % every === 0);
}

function line(series, x, y) {
  const points = series.x.map((value, i) => [x(value), y(series.y[i])]).filter(([a, b]) => isFinite(a) && isFinite(b));
  const path = points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  return svg("path", { class: series.kind === "dash" ? "dash" : "line", d: path });
}

function bars(series, x, y, bottom) {
  const all = svg("g", { class: "bars" });
  series.x.forEach((from, i) => {
    if (!series.y[i]) return;
    const left = x(from);
    const top = Math.min(y(series.y[i]), bottom - 1);
    all.append(
      svg("rect", {
        x: left + 0.5,
        y: top,
        width: Math.max(1, x(from + series.width) - left - 1),
        height: bottom - top,
      }),
    );
  });
  return all;
}

// The readout follows the pointer over the first series.
function follow(root, spec, series, x, y, bottom, readout) {
  if (!spec.readout || !series) return;
  const rest = spec.rest === undefined ? series.x.length - 1 : spec.rest;
  const mark = svg("g", { class: "mark", visibility: "hidden" });
  const rule = svg("line", { y1: MARGIN.top, y2: bottom });
  const dot = svg("circle", { r: 3 });
  mark.append(rule, dot);
  root.append(mark);
  const middle = series.kind === "bars" ? series.width / 2 : 0;
  const centres = series.x.map((value) => x(value + middle));
  const show = (i) => (readout.textContent = i === null ? "" : spec.readout(i));
  show(rest);
  root.addEventListener("pointermove", (event) => {
    const at = event.clientX - root.getBoundingClientRect().left;
    let best = 0;
    centres.forEach((centre, i) => {
      if (Math.abs(centre - at) < Math.abs(centres[best] - at)) best = i;
    });
    mark.setAttribute("visibility", "visible");
    fill(rule, { x1: centres[best], x2: centres[best] }, []);
    fill(dot, { cx: centres[best], cy: Math.min(bottom, y(series.y[best])) }, []);
    show(best);
  });
  root.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    show(rest);
  });
}
