// The list of episodes: filters, search, order, and the few rows of it that are on the screen.

const ROW = 48;
const ORDERS = {
  "update, group": null,
  "return, high first": ["return", -1],
  "return, low first": ["return", 1],
  "most turns": ["turns", -1],
  "most tokens": ["tokens", -1],
  "highest entropy": ["entropy", -1],
  "lowest entropy": ["entropy", 1],
  "highest advantage": ["advantage", -1],
  "lowest advantage": ["advantage", 1],
};

let head = null; // facts, notes, columns: see page.py
let searched = null; // text of each episode, or the promise of it
let found = []; // the episodes that pass, in order
let chosen = -1; // the episode that is shown, as a row of the columns

function fillSelect(select, values, first) {
  const before = select.value;
  select.replaceChildren(...(first ? [make("option", { value: "", text: first })] : []),
    ...values.map((value) => make("option", { value, text: value })));
  if ([...select.options].some((each) => each.value === before)) select.value = before;
}

function fillFilters() {
  const distinct = (name) => [...new Set(head.columns[name])].filter((value) => value !== "").sort();
  fillSelect($("f-reason"), distinct("reason"), "any");
  fillSelect($("f-split"), distinct("split"), "any");
  fillSelect($("f-kind"), distinct("kind"), "any");
  $("kind-label").hidden = distinct("kind").length === 0;
  if (!$("order").options.length) fillSelect($("order"), Object.keys(ORDERS));
  $("search").title = `task, responses and observations; the first ${head.searched} characters of an episode`;
}

/** Read "12", "5-20" or "1, 4-6" as a test; null accepts everything, undefined is a mistake. */
function rangeTest(text) {
  if (!text.trim() || text.trim() === "all") return null;
  const parts = text.split(",").map((part) => part.trim().match(/^(\d+)(?:\s*[-–]\s*(\d+))?$/));
  if (parts.some((part) => !part)) return undefined;
  const bounds = parts.map((part) => [Number(part[1]), Number(part[2] ?? part[1])]);
  return (value) => bounds.some(([low, high]) => value >= low && value <= high);
}

function numberTest(id, accept) {
  const text = $(id).value.trim().replace("−", "-");
  if (!text) return null;
  const bound = Number(text);
  return Number.isNaN(bound) ? undefined : (value) => value !== null && accept(value, bound);
}

function readTests() {
  const tests = [], wrong = [];
  const add = (id, column, test) => {
    const isWrong = test === undefined;
    $(id).setAttribute("aria-invalid", isWrong);
    if (isWrong) wrong.push($(id).value);
    else if (test) tests.push([head.columns[column], test]);
  };
  for (const name of ["update", "group", "task"]) add("f-" + name, name, rangeTest($("f-" + name).value));
  for (const name of ["reason", "split", "kind"]) {
    const wanted = $("f-" + name).value;
    add("f-" + name, name, wanted ? (value) => value === wanted : null);
  }
  const success = $("f-success").value;
  add("f-success", "success", success ? (value) => value === Number(success) : null);
  add("f-low", "return", numberTest("f-low", (value, bound) => value >= bound));
  add("f-high", "return", numberTest("f-high", (value, bound) => value <= bound));
  return [tests, wrong];
}

async function applyFilters() {
  const began = performance.now();
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && !Array.isArray(searched)) {
    searched = searched || read("search");
    searched = await searched;
    if (words.join(" ") !== $("search").value.toLowerCase().trim().split(/\s+/).join(" ")) return;
  }
  const [tests, wrong] = readTests();
  const count = head.columns.update.length, passed = [];
  for (let i = 0; i < count; i++) {
    let is = true;
    for (let t = 0; is && t < tests.length; t++) is = tests[t][1](tests[t][0][i]);
    for (let w = 0; is && w < words.length; w++) is = searched[i].includes(words[w]);
    if (is) passed.push(i);
  }
  const order = ORDERS[$("order").value];
  if (order) {
    const values = head.columns[order[0]];
    const last = order[1] * Infinity;
    passed.sort((a, b) => order[1] * ((values[a] ?? last) - (values[b] ?? last)) || a - b);
  }
  found = passed;
  const told = wrong.length ? ` (not understood: ${wrong.join(", ")})` : "";
  $("count").textContent = `${found.length.toLocaleString("en")} of ${count.toLocaleString("en")} episodes${told}`;
  $("spacer").style.height = found.length * ROW + "px";
  drawRows();
  performance.measure("filter", { start: began, end: performance.now() });
}

function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(found.length, first + Math.ceil(list.clientHeight / ROW) + 9);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(makeRow(place));
  list.replaceChildren($("spacer"), ...rows);
  const active = found.indexOf(chosen);
  if (active >= first && active < last) list.setAttribute("aria-activedescendant", "option-" + chosen);
  else list.removeAttribute("aria-activedescendant");
}

const of = (name, i) => head.columns[name][i];

function verdict(i) {
  const success = of("success", i);
  const word = success === null ? "unknown" : success ? "solved" : "failed";
  return make("span", { class: "verdict " + word, text: word });
}

function makeRow(place) {
  const i = found[place];
  const note = ` ${of("reason", i)}, return ${show(of("return", i))}, ${of("turns", i)} turns`;
  const line = make("div", {}, make("span", { class: "dim", text: `${of("update", i)} · ${of("group", i)}.${of("member", i)} ` }),
    verdict(i), make("span", { text: note }));
  return make("div", { class: "option", role: "option", id: "option-" + i, "aria-selected": i === chosen,
    "aria-posinset": place + 1, "aria-setsize": found.length, style: `top:${place * ROW}px`, onclick: () => choose(i) },
  line, make("div", { class: "dim", text: of("goal", i) }));
}

/** Bring an episode's row on the screen. */
function reveal(i) {
  const place = found.indexOf(i), list = $("list");
  if (place < 0) return;
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
}

function step(by) {
  if (!found.length) return;
  const place = found.indexOf(chosen);
  choose(found[Math.max(0, Math.min(found.length - 1, place < 0 ? 0 : place + by))]);
}
