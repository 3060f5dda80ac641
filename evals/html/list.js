// The list of features: searched, sorted, and drawn only where it is seen.

const ROW = 34; // pixels, as in the style
const COLUMNS = [
  { key: "id", title: "feature", up: true },
  { key: "fired", title: "density" },
  { key: "mean", title: "mean" },
  { key: "peak", title: "peak" },
  { key: "word", title: "fires on", up: true },
];

class FeatureList {
  constructor(store, open) {
    this.store = store;
    this.open = open;
    this.current = null; // a row of the store
    this.sorted = { key: "fired", up: false };
    this.search = el("input", {
      type: "search",
      id: "search",
      placeholder: "number, or text in passages and logits",
      "aria-label": "Search features",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.count = el("p", { class: "count", role: "status" });
    this.head = el("div", { class: "row head" }, ...COLUMNS.map((column) => this.header(column)));
    this.space = el("div", { class: "space" });
    this.body = el("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": "Features" }, this.space);
    this.node = el(
      "section",
      { class: "list" },
      el("div", { class: "finder" }, this.search, this.count),
      this.head,
      this.body,
      el(
        "p",
        { class: "keys" },
        el("kbd", {}, "/"),
        " search  ",
        el("kbd", {}, "↑"),
        el("kbd", {}, "↓"),
        " browse  ",
        el("kbd", {}, "esc"),
        " back",
      ),
    );
    this.body.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.body);
    let waiting = 0;
    this.search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.update(), 90);
    });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (row) this.open(Number(row.dataset.row));
    });
    this.words = store.fires_on.map((pieces) =>
      pieces.length ? store.piece(pieces[0]).trim().toLowerCase() : "\uffff",
    );
    this.update();
  }

  header(column) {
    const button = el("button", { type: "button", class: column.key }, column.title);
    button.addEventListener("click", () => {
      const again = this.sorted.key === column.key;
      this.sorted = { key: column.key, up: again ? !this.sorted.up : Boolean(column.up) };
      this.update();
    });
    column.button = button;
    return button;
  }

  matches() {
    const wanted = this.search.value.trim().toLowerCase();
    const all = this.store.id.map((_, row) => row);
    if (!wanted) return all;
    if (/^\d+$/.test(wanted)) return all.filter((row) => String(this.store.id[row]).startsWith(wanted));
    return all.filter((row) => this.store.haystack(row).includes(wanted));
  }

  update() {
    const { key, up } = this.sorted;
    const values = key === "word" ? this.words : this.store[key];
    const order = (a, b) =>
      values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : this.store.id[a] - this.store.id[b];
    this.rows = this.matches().sort(up ? order : (a, b) => order(b, a));
    this.place = new Map(this.rows.map((row, place) => [row, place]));
    for (const column of COLUMNS) {
      const mine = column.key === key;
      column.button.classList.toggle("sorted", mine);
      column.button.setAttribute(
        "aria-label",
        `sort by ${column.title}${mine ? (up ? ", ascending now" : ", descending now") : ""}`,
      );
      column.button.dataset.way = mine ? (up ? "↑" : "↓") : "";
    }
    const shown = this.store.id.length;
    const some =
      shown < this.store.width
        ? `${whole(shown)} of ${whole(this.store.width)} features, at even steps of density rank`
        : `${whole(shown)} features`;
    this.count.textContent = this.rows.length === shown ? some : `${whole(this.rows.length)} of ${whole(shown)}`;
    this.space.style.height = `${this.rows.length * ROW}px`;
    this.body.scrollTop = 0;
    this.draw();
    if (this.onupdate) this.onupdate();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.body.scrollTop / ROW) - 8);
    const last = Math.min(this.rows.length, first + Math.ceil(this.body.clientHeight / ROW) + 17);
    this.space.replaceChildren(...this.rows.slice(first, last).map((row, i) => this.item(row, first + i)));
    if (this.current !== null && this.place.has(this.current))
      this.body.setAttribute("aria-activedescendant", `row-${this.current}`);
    else this.body.removeAttribute("aria-activedescendant");
  }

  item(row, place) {
    const { store } = this;
    const words = store.fires_on[row].map((piece) => el("code", {}, visible(store.piece(piece))));
    const node = el(
      "div",
      {
        class: "row",
        role: "option",
        id: `row-${row}`,
        "data-row": row,
        "aria-selected": String(row === this.current),
        "aria-posinset": place + 1,
        "aria-setsize": this.rows.length,
      },
      el("span", { class: "id" }, String(store.id[row])),
      el("span", { class: "fired" }, store.fired[row] ? percent(store.fired[row] / store.tokens) : "dead"),
      el("span", { class: "mean" }, store.fired[row] ? three(store.mean[row]) : ""),
      el("span", { class: "peak" }, store.fired[row] ? three(store.peak[row]) : ""),
      el("span", { class: "word" }, ...words),
    );
    node.style.top = `${place * ROW}px`;
    return node;
  }

  // The neighbours in the list, of which the first is opened where none is.
  beside(row, step) {
    const place = this.place.get(row);
    const other = place === undefined ? (step > 0 ? 0 : -1) : place + step;
    return this.rows[other] ?? null;
  }

  choose(row) {
    this.current = row;
    const place = this.place.get(row);
    if (place !== undefined) {
      const top = place * ROW;
      const { scrollTop, clientHeight } = this.body;
      if (top < scrollTop || top + ROW > scrollTop + clientHeight) this.body.scrollTop = top - clientHeight / 3;
    }
    this.draw();
  }
}
