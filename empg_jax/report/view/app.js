// The page as a whole: what is chosen, what is shown, keys, and news from a run that still trains.

const TABS = { episode: drawEpisode, group: drawGroup, curves: drawCurves };
let tab = "episode";

function draw() {
  const isNone = chosen < 0 && tab !== "curves";
  if (isNone) {
    const text = head.columns.update.length ? "No episode is chosen." : "There are no episodes; see Curves.";
    $("pane").replaceChildren(make("p", { class: "message", text }));
    return Promise.resolve();
  }
  return Promise.resolve(TABS[tab](chosen)).catch((error) => {
    $("pane").replaceChildren(make("p", { class: "message", text: `This episode cannot be opened: ${error.message || error}` }));
  });
}

function choose(i) {
  chosen = i;
  reveal(i);
  drawRows();
  if (tab === "curves") showTab("episode");
  else draw().then(() => ($("pane").scrollTop = 0));
  const name = ["update", "group", "member"].map((each) => of(each, i)).join(".");
  history.replaceState(null, "", "#" + name);
}

function showTab(name) {
  tab = name;
  for (const each of Object.keys(TABS)) $("tab-" + each).setAttribute("aria-selected", each === name);
  $("pane").setAttribute("aria-labelledby", "tab-" + name);
  return draw();
}

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = `theme: ${name}`;
  $("theme").setAttribute("aria-label", `Color scheme: ${name === "auto" ? "automatic" : name}`);
  try {
    localStorage.setItem("empg-jax-theme", name);
  } catch { /* a page from disk may have no storage */ }
}

function nextTheme() {
  const names = ["auto", "light", "dark"];
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3]);
}

const KEYS = {
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  ArrowRight: () => stepTurn(1), ArrowLeft: () => stepTurn(-1), "/": () => $("search").focus(),
  e: () => showTab("episode"), g: () => showTab("group"), c: () => showTab("curves"), d: nextTheme,
  "?": () => $("help").showModal(),
};

function onKey(event) {
  const isTyping = event.target.closest("input, select, dialog");
  if (event.key === "Escape" && isTyping) event.target.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
}

function listen() {
  document.addEventListener("keydown", onKey);
  $("list").addEventListener("scroll", drawRows, { passive: true });
  window.addEventListener("resize", drawRows);
  let waiting = 0;
  $("filters").addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => refilter());
  });
  $("filters").addEventListener("reset", () => setTimeout(refilter));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const each of ["color", "what-if"]) $(each).addEventListener("change", draw);
  for (const each of Object.keys(TABS)) $("tab-" + each).addEventListener("click", () => showTab(each));
  $("theme").addEventListener("click", nextTheme);
  $("keys").addEventListener("click", () => $("help").showModal());
}

async function refilter() {
  await applyFilters();
  $("list").scrollTop = 0;
  if (found.length && !found.includes(chosen)) choose(found[0]);
}

function takeHead(value) {
  head = value;
  searched = null;
  $("algorithm").textContent = [head.algorithm, head.modulation && head.modulation !== "none" ? head.modulation : ""].filter(Boolean).join(" · ");
  head.notes.forEach(alarm);
  fillFilters();
  fillSelect($("what-if"), head.what_if, "as trained");
  $("what-if-label").hidden = !head.what_if.length;
}

function findNamed(name) {
  const parts = name.split(".").map(Number);
  const columns = ["update", "group", "member"].map((each) => head.columns[each]);
  return parts.length === 3 ? head.columns.update.findIndex((_, i) => columns.every((values, k) => values[i] === parts[k])) : -1;
}

/** Ask every few seconds whether the run has written more. */
async function follow() {
  let state = null;
  for (;;) {
    try {
      const now = await (await fetch("state", { cache: "no-store" })).text();
      if (state !== null && now !== state) {
        const name = chosen < 0 ? "" : ["update", "group", "member"].map((each) => of(each, chosen)).join(".");
        opened.clear();
        takeHead(await read("head"));
        chosen = findNamed(name);
        await applyFilters();
        if (chosen < 0 && found.length) choose(found[0]);
        else if (tab === "curves") draw();
      }
      state = now;
      $("live").textContent = `live: update ${head.updates[head.updates.length - 1] ?? 0}`;
    } catch {
      $("live").textContent = "not connected: the program that serves this page has ended";
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

async function start() {
  let theme = "auto";
  try {
    theme = localStorage.getItem("empg-jax-theme") || "auto";
  } catch { /* a page from disk may have no storage */ }
  setTheme(theme);
  fillSelect($("color"), Object.keys(COLORS));
  takeHead(await read("head"));
  listen();
  await applyFilters();
  performance.mark("list");
  const named = findNamed(location.hash.slice(1));
  const first = named >= 0 ? named : found[0];
  if (first !== undefined) choose(first);
  else await showTab("curves");
  performance.mark("ready");
  if (LIVE) follow();
}

start().catch((error) => {
  alarm(`This page cannot be opened: ${error.message || error}`);
  $("pane").replaceChildren();
});
