// One feature: its line of data is read when it is opened.

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
const VALUE = new Map([...DIGITS].map((digit, i) => [digit, i]));

class Store {
  constructor(index, lines) {
    Object.assign(this, index);
    this.lines = lines;
    this.row = new Map(index.id.map((id, row) => [id, row]));
    this.haystacks = new Array(index.id.length);
  }

  read(row) {
    return JSON.parse(this.lines[row]);
  }

  piece(number) {
    return this.pieces[number] ?? "";
  }

  token(place) {
    let number = 0;
    for (let i = place * this.digits; i < (place + 1) * this.digits; i++)
      number = 64 * number + VALUE.get(this.text[i]);
    return this.piece(number);
  }

  // [place, length, at, band, value, [offset, level, ...]] as tokens with their levels, hundredths of the peak
  passage([place, length, at, band, value, levels]) {
    const tokens = Array.from({ length }, (_, i) => ({ text: this.token(place + i), level: 0 }));
    for (let i = 0; i < levels.length; i += 2) tokens[levels[i]].level = levels[i + 1];
    return { tokens, at, band, value };
  }

  // All that a search looks through.
  haystack(row) {
    if (this.haystacks[row] === undefined) {
      const { e, r, l } = this.read(row);
      const passages = e.map((passage) =>
        this.passage(passage)
          .tokens.map((token) => token.text)
          .join(""),
      );
      this.haystacks[row] = [...passages, ...[...r, ...l].map(([piece]) => this.piece(piece))].join("\n").toLowerCase();
    }
    return this.haystacks[row];
  }
}

function showFeature(store, row, host, { previous, next }) {
  const found = store.read(row);
  const id = store.id[row];
  const share = store.fired[row] / store.tokens;
  const step = (name, sign, target) =>
    el(
      "a",
      {
        class: "step",
        href: target === null ? null : `#feature-${target}`,
        "aria-label": name,
        "aria-disabled": target === null,
      },
      sign,
    );
  host.replaceChildren(
    ...[
      el("a", { class: "back", href: "#features" }, "‹ all features"),
      el(
        "div",
        { class: "feature-head" },
        el("h2", { tabindex: "-1" }, "Feature ", el("b", {}, String(id))),
        el(
          "span",
          {},
          step("previous feature in the list", "↑", previous),
          step("next feature in the list", "↓", next),
        ),
      ),
      el(
        "p",
        { class: "lead" },
        store.fired[row]
          ? `Fires on ${percent(share)} of the tokens (${whole(store.fired[row])} of ${whole(store.tokens)}), ` +
              `rank ${whole(store.ranks[row])} of ${whole(store.width)} by density. ` +
              `Mean activation ${short(store.mean[row])}, peak ${short(store.peak[row])}.`
          : `Never fired on these ${whole(store.tokens)} tokens.`,
      ),
      ...(found.e.length
        ? passages(
            store,
            found.e.map((each) => store.passage(each)),
            store.peak[row],
          )
        : []),
      el(
        "section",
        { class: "panels" },
        found.h[1].length ? histogram(found.h, store.fired[row]) : null,
        ...logits(store, found),
      ),
      store.no_logits
        ? null
        : el(
            "p",
            { class: "note" },
            `Raised and lowered logits: ${store.how_logits}; the direct path alone, without the layers between.`,
          ),
      nearest(store, found.n),
    ].filter(Boolean),
  );
  host.scrollTop = 0;
}

function passages(store, all, peak) {
  const top = all.filter((each) => each.band === 0);
  const rest = all.filter((each) => each.band > 0);
  const bands = ["strongest fifth", "second fifth", "middle fifth", "fourth fifth", "weakest fifth"];
  const list = (some, label) =>
    el("ol", { class: "passages" }, ...some.map((each) => passage(each, peak, label(each))));
  return [
    el("h3", {}, "Strongest passages"),
    list(top, () => null),
    ...(rest.length
      ? [el("h3", {}, "From each fifth of its activations"), list(rest, (each) => bands[each.band - 1])]
      : []),
  ];
}

// A line with the token it was chosen for in the same place as in the lines above; a click shows all of it.
function passage({ tokens, at, value }, peak, label) {
  const part = (name, some) =>
    el("span", { class: name }, el("span", {}, ...some.flatMap((each) => token(each, peak, each === tokens[at]))));
  const line = el(
    "div",
    { class: "passage", tabindex: "0", role: "button", "aria-expanded": "false" },
    part("before", tokens.slice(0, at)),
    part("after", tokens.slice(at)),
  );
  const toggle = () => line.setAttribute("aria-expanded", String(line.classList.toggle("open")));
  line.addEventListener("click", () => getSelection().isCollapsed && toggle());
  line.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    toggle();
  });
  return el("li", {}, el("span", { class: "strength" }, short(value), label ? el("small", {}, label) : null), line);
}

// Indentation is cut short, for it would push the words out of sight; signs of line ends and tabs are pale.
function token({ text, level }, peak, chosen) {
  const shown = text.replace(/ {3,}/g, "  ");
  if (!level) return signs(shown);
  const node = el("mark", { class: chosen ? "chosen" : null, title: `about ${short((level / 100) * peak)}` });
  node.style.setProperty("--level", (0.08 + 0.92 * (level / 100)).toFixed(2));
  const word = shown.replace(/^ +| +$/g, "") || shown; // spaces around it stay uncoloured, as between words
  const start = shown.indexOf(word);
  node.append(...signs(word));
  return [shown.slice(0, start), node, shown.slice(start + word.length)].filter(Boolean);
}

const signs = (text) =>
  text
    .split(/([↵⇥]+)/)
    .filter(Boolean)
    .map((part) => (/^[↵⇥]/.test(part) ? el("span", { class: "sign" }, part) : part));

function histogram([width, counts], fired) {
  const format = (i) => `${short(width * i)} to ${short(width * (i + 1))}`;
  return chart({
    title: "Activations",
    height: 190,
    x: { label: "activation", from0: true },
    y: { from0: true, format: short },
    series: [{ kind: "bars", x: counts.map((_, i) => width * i), y: counts, width }],
    readout: (i) => (i < 0 ? `${whole(fired)} tokens` : `${whole(counts[i])} at ${format(i)}`),
    rest: -1,
  });
}

function logits(store, { r, l }) {
  if (store.no_logits) return [el("p", { class: "notice" }, `No logits: ${store.no_logits}.`)];
  const most = Math.max(...[...r, ...l].map(([, value]) => Math.abs(value)));
  const list = (title, all, side) =>
    el(
      "div",
      { class: `logits ${side}` },
      el("h4", {}, title),
      el(
        "ol",
        {},
        ...all.map(([number, value]) => {
          const bar = el("i", {});
          bar.style.setProperty("--share", (Math.abs(value) / most).toFixed(3));
          return el("li", {}, el("code", {}, visible(store.piece(number))), bar, el("span", {}, signed(value, 1)));
        }),
      ),
    );
  return [list("Raises", r, "raised"), list("Lowers", l, "lowered")];
}

// A piece by itself: its spaces are seen.
const visible = (text) => text.replaceAll(" ", "·");

function nearest(store, all) {
  const link = ([id, cosine]) => {
    const row = store.row.get(id);
    const words =
      row === undefined ? [] : store.fires_on[row].map((piece) => el("code", {}, visible(store.piece(piece))));
    const inside = [
      el("b", {}, String(id)),
      el("span", { class: "cosine" }, cosine.toFixed(2)),
      el("span", { class: "words" }, ...words),
    ];
    return el(
      "li",
      {},
      row === undefined ? el("span", { class: "gone" }, ...inside) : el("a", { href: `#feature-${id}` }, ...inside),
    );
  };
  return el(
    "section",
    { class: "nearest" },
    el("h3", {}, "Nearest decoder directions"),
    el("ul", {}, ...all.map(link)),
    el("p", { class: "note" }, "With the cosine, and the tokens that those features fire on most strongly."),
  );
}
