// Views, addresses and keys.

const data = JSON.parse(byId("data").textContent);
const views = { overview: byId("overview"), features: byId("features") };
const detail = el("article", { class: "feature", tabindex: "-1" });
let list = null;
let at = null; // the address that is shown

function start() {
  const name = data.overview.name;
  document.title = `${name} · saekit report`;
  byId("name").textContent = name;
  byId("name").title = name;
  byId("views").append(el("a", { href: "#overview" }, "Overview"), el("a", { href: "#features" }, "Features"));
  showOverview(data, views.overview);
  if (data.features) {
    const store = new Store(data.features, byId("lines").textContent.split("\n"));
    list = new FeatureList(store, (row) => go(store.id[row]));
    list.onupdate = () => list.current === null || showChosen(list.current);
    views.features.append(list.node, detail);
    detail.append(welcome(store));
  } else {
    views.features.append(el("p", { class: "notice" }, `No pages of features: ${data.why_not}.`));
  }
  addEventListener("hashchange", route);
  addEventListener("keydown", key);
  route();
}

const go = (id) => visit(`#feature-${id}`);

function visit(address) {
  location.hash = address;
  route(); // now: what is typed next must find the view there
}

function route() {
  if (location.hash === at) return;
  at = location.hash;
  const wanted = /^#feature-(\d+)$/.exec(location.hash);
  const row = wanted && list ? list.store.row.get(Number(wanted[1])) : undefined;
  const view = wanted || location.hash === "#features" ? "features" : "overview";
  for (const [name, host] of Object.entries(views)) host.hidden = name !== view;
  for (const link of byId("views").children) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  views.features.classList.toggle("opened", row !== undefined);
  if (row !== undefined) {
    list.choose(row);
    showChosen(row);
  } else if (wanted && list) {
    detail.replaceChildren(
      el("a", { class: "back", href: "#features" }, "‹ all features"),
      el("p", { class: "notice" }, `Feature ${wanted[1]} has no page here.`),
    );
    views.features.classList.add("opened");
  } else if (list) {
    list.draw();
  }
}

function showChosen(row) {
  const id = (other) => (other === null ? null : list.store.id[other]);
  showFeature(list.store, row, detail, { previous: id(list.beside(row, -1)), next: id(list.beside(row, 1)) });
}

function welcome(store) {
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, "Choose a feature"),
    el(
      "p",
      {},
      `Passages and counts are from ${whole(store.tokens)} held-out tokens. Of each feature, the strongest passage of a ` +
        "context is shown, and passages that read the same once; then one passage from each fifth of a random sample of " +
        "its activations. The stronger the colour, the nearer the activation to the feature's peak.",
    ),
  );
}

function key(event) {
  if (!list || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === list.search;
  const name = event.key;
  if (name === "/" && !typing) {
    if (list.search.offsetParent === null) visit("#features");
    list.search.focus();
    list.search.select();
  } else if (views.features.hidden) {
    return;
  } else if (name === "Escape") {
    if (typing && list.search.value) {
      list.search.value = "";
      list.update();
    } else if (typing) list.body.focus();
    else if (location.hash !== "#features") visit("#features");
    else return;
  } else if (
    (!detail.contains(event.target) && (name === "ArrowDown" || name === "ArrowUp")) ||
    (!typing && (name === "j" || name === "k"))
  ) {
    const row = list.beside(list.current, name === "ArrowDown" || name === "j" ? 1 : -1);
    if (row === null) return;
    if (!typing) list.body.focus({ preventScroll: true });
    go(list.store.id[row]);
  } else if (name === "Enter" && typing) {
    if (list.rows.length) go(list.store.id[list.rows[0]]);
  } else return;
  event.preventDefault();
}

start();
