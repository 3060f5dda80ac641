// The first view: what was trained on what, the figures with their meaning, curves and densities.

function showOverview(data, host) {
  const told = data.overview;
  host.append(heading(told));
  if (told.headline.length) host.append(headline(told.headline));
  else
    host.append(
      el("p", { class: "notice" }, "Not judged on held-out text, so there are no figures but those of training."),
    );
  for (const note of told.notes) host.append(el("p", { class: "notice" }, note));
  if (data.comparison) host.append(compared(data.comparison));
  const part = (title, name, items) =>
    items.length && host.append(el("h2", {}, title), el("section", { class: name }, ...items));
  part("Training", "charts", training(told.curves));
  part("Densities", "charts", [density(told.density), tokensL0(told.l0)].filter(Boolean));
  part(
    "All figures",
    "tables",
    told.tables.map(([title, rows]) => table(title, rows)),
  );
  for (const note of told.errors) host.append(el("p", { class: "note" }, note));
  if (told.facts.length) {
    const rows = told.facts.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
    host.append(
      el(
        "details",
        { class: "facts" },
        el("summary", {}, "Everything the dictionary tells of its origin"),
        el("table", {}, el("tbody", {}, ...rows)),
      ),
    );
  }
}

function heading({ made, judged }) {
  const code = (text) => el("code", {}, text);
  const trained = el("p", { class: "lead" });
  trained.append(made.tokens ? `Trained on ${whole(made.tokens)} tokens` : "A dictionary");
  if (made.dataset_path) trained.append(" of ", code(made.dataset_path));
  if (made.hook_name) trained.append(made.tokens ? ", at " : " of ", code(made.hook_name));
  if (made.model_name) trained.append(" of the model ", code(made.model_name));
  trained.append(".");
  if (judged) {
    trained.append(` Judged on ${whole(judged.tokens)} held-out tokens`);
    if (judged.text && judged.text !== made.dataset_path) trained.append(" of ", code(judged.text));
    trained.append(", by the rule it is saved with.");
  }
  const what = [`${whole(made.width)} features`, made.rule.replaceAll("_", " "), made.k ? `k = ${made.k}` : null];
  return el("div", { class: "heading" }, el("h1", {}, what.filter(Boolean).join(" · ")), trained);
}

const headline = (figures) =>
  el(
    "dl",
    { class: "headline" },
    ...figures.map(([title, value, error, meaning]) =>
      el(
        "div",
        {},
        el("dt", {}, title),
        el("dd", { class: "value" }, value),
        error ? el("dd", { class: "error" }, `± ${error}`) : null,
        el("dd", { class: "meaning" }, meaning),
      ),
    ),
  );

function training(curves) {
  if (!curves || !curves.tokens) return [];
  const same = curves.loss.every((value, i) => value === curves.fvu[i]);
  const wanted = [
    same ? null : ["loss", "Loss", "the weighted sum of its terms"],
    ["fvu", "FVU", same ? "which is the loss: it has no other term" : null],
    ["l0", "L0", null],
    ["dead_share", "Dead", "share of the features that have not fired for long"],
    ...Object.keys(curves)
      .filter((key) => !["tokens", "loss", "fvu", "l0", "dead_share"].includes(key))
      .map((key) => [key, key, "a term of the loss"]),
  ];
  return wanted.filter(Boolean).map(([key, title, note]) => {
    const y = curves[key];
    const high = Math.max(...y);
    const low = Math.min(...y);
    const log = (key === "loss" || key === "fvu") && low > 0 && high / low > 4;
    const format = key === "dead_share" ? percent : short;
    return chart({
      title,
      note,
      x: { label: "tokens", from0: true },
      y: {
        log,
        from0: key === "dead_share",
        least: 0.01,
        padded: key !== "dead_share",
        format: key === "dead_share" ? percentTick : short,
      },
      series: [{ kind: "line", x: curves.tokens, y }],
      readout: (i) =>
        i === y.length - 1 ? `${format(y[i])} at the end` : `${format(y[i])} after ${short(curves.tokens[i])}`,
    });
  });
}

function density(found) {
  if (!found) return null;
  const alive = found.rank.map((_, i) => i).filter((i) => found.density[i] > 0);
  const rank = alive.map((i) => found.rank[i]);
  const y = alive.map((i) => found.density[i]);
  const series = [{ kind: "line", x: rank, y }];
  let note = "share of tokens, densest feature first";
  if (found.law) {
    const fitted = alive.map((i) => found.fitted[i]);
    series.push({ kind: "dash", x: rank, y: fitted });
    const law = `(rank + ${short(found.law.shift)})${raisedTo(-found.law.exponent)}`;
    note += `; dashed, the fitted Zipf law ∝ ${law}, R² ${found.law.r2.toFixed(3)}`;
  }
  return chart({
    title: "Density by rank",
    note,
    x: { label: "rank", log: true },
    y: { log: true, padded: true, format: percentTick },
    series,
    readout: (i) => `${percent(y[i])} at rank ${whole(rank[i])}`,
    rest: Math.floor(rank.length / 2),
  });
}

function tokensL0(found) {
  if (!found) return null;
  const { width, counts, beyond } = found;
  const total = counts.reduce((a, b) => a + b, beyond);
  const x = counts.map((_, i) => i * width);
  const y = counts.map((count) => count / total);
  const label = (i) => (width === 1 ? `${x[i]}` : `${x[i]} to ${x[i] + width - 1}`);
  return chart({
    title: "L0 of a token",
    note:
      "share of tokens on which so many features are active" +
      (beyond ? `; ${whole(beyond)} tokens with more are not drawn` : ""),
    x: { label: "active features", from0: true },
    y: { from0: true, format: percentTick },
    series: [{ kind: "bars", x, y, width }],
    readout: (i) => `${percent(y[i])} have ${label(i)}`,
    rest: y.indexOf(Math.max(...y)),
  });
}

const table = (title, rows) =>
  el(
    "table",
    { class: "figures" },
    el("caption", {}, title),
    el(
      "tbody",
      {},
      ...rows.map(([name, value, error, meaning]) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, name),
          el("td", { class: "value" }, value),
          el("td", { class: "error" }, error ? `± ${error}` : null),
          el("td", { class: "meaning" }, meaning),
        ),
      ),
    ),
  );

function compared({ columns, rows }) {
  const head = columns.map(([title, meaning]) => el("th", { scope: "col", title: meaning }, title));
  return el(
    "section",
    { class: "comparison" },
    el("h2", {}, "Compared"),
    el(
      "div",
      { class: "wide", tabindex: "0" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "dictionary"), ...head)),
        el(
          "tbody",
          {},
          ...rows.map(([name, ...values]) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, name),
              ...values.map(([value, error]) =>
                el("td", {}, value, error ? el("div", { class: "error" }, `± ${error}`) : null),
              ),
            ),
          ),
        ),
      ),
    ),
    el("p", { class: "note" }, "All that follows, and the features, are of the first."),
  );
}
