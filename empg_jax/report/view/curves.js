// Curves over updates; a point leads to the episodes of its update.

const PANELS = [
  ["success", ["success_rate", "held_out"]],
  ["episode return", ["episode_return"]],
  ["entropy (nats per token)", ["entropy"]],
  ["turns per episode", ["episode_turns"]],
  ["modulation factor", ["modulation_mean", "modulation_max"]],
  ["turns by the sign of their advantage", ["advantage_positive", "advantage_negative"]],
  ["KL to the policy before the update", ["approx_kl"]],
  ["gradient norm", ["grad_norm"]],
];
const NS = "http://www.w3.org/2000/svg";
const WIDE = 300, HIGH = 150, LEFT = 34, RIGHT = 8, TOP = 8, BOTTOM = 18;
const PARTS = 300; // of a long curve, each of which is drawn as two points
let extra = []; // further metrics, chosen by the reader

function svg(tag, attributes) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function series(name) {
  if (name === "held_out") return head.held_out;
  return (head.metrics[name] || []).map((value, k) => [head.updates[k], value]).filter(([, value]) => value !== null);
}

function drawCurves() {
  const names = Object.keys(head.metrics);
  const more = make("select", { "aria-label": "Show another metric", onchange: (event) => {
    if (event.target.value) extra.push(event.target.value);
    drawCurves();
  } });
  fillSelect(more, names, "another metric …");
  const panels = [...PANELS, ...extra.map((name) => [name, [name]])];
  const shown = panels.map(([title, of]) => panel(title, of)).filter(Boolean);
  const hint = "Click a point, or focus a curve and press ← → and Enter: the episodes of that update. Filled points have episodes.";
  const body = shown.length ? [make("div", { id: "curves" }, ...shown)]
    : [make("p", { class: "message", text: "No metrics were recorded: metrics.jsonl is missing or empty." })];
  $("pane").replaceChildren(make("h2", { text: "Curves" }), make("p", { class: "facts" }, make("span", { text: hint + " " }), more), ...body);
}

// Not Math.min(...values): the arguments of a call lie on the stack, which has no room for a long run's.
const lowest = (values, start) => values.reduce((least, value) => Math.min(least, value), start);
const highest = (values, start) => values.reduce((most, value) => Math.max(most, value), start);

/** Keep what can be seen of a long curve: the lowest and the highest point of each of its parts. */
function thin(points) {
  if (points.length <= 2 * PARTS) return points;
  return Array.from({ length: PARTS }, (_, part) => {
    const [start, end] = [part, part + 1].map((each) => Math.floor((each * points.length) / PARTS));
    const rising = points.slice(start, end).sort((a, b) => a[1] - b[1]);
    return [rising[0], rising[rising.length - 1]].sort((a, b) => a[0] - b[0]);
  }).flat();
}

function panel(title, names) {
  const lines = names.map(series).filter((points) => points.length);
  if (!lines.length) return null;
  const all = lines.flat(), xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const low = lowest(ys, 0), top = highest(ys, -Infinity), high = top > low ? top : low + 1;
  const left = lowest(xs, Infinity), right = highest(xs, left + 1);
  const x = (update) => LEFT + ((update - left) / (right - left)) * (WIDE - LEFT - RIGHT);
  const y = (value) => HIGH - BOTTOM - ((value - low) / (high - low)) * (HIGH - TOP - BOTTOM);
  const last = lines[0][lines[0].length - 1];
  const label = `${title}, updates ${left} to ${right}: from ${show(lines[0][0][1])} to ${show(last[1])}`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "slider", tabindex: "0", "aria-label": label,
    "aria-valuemin": left, "aria-valuemax": right, "aria-valuenow": last[0], "aria-valuetext": `update ${last[0]}: ${show(last[1])}` });
  for (const value of [low, (low + high) / 2, high]) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: y(value), y2: y(value) }), words(tick(value), LEFT - 3, y(value) + 3, "end"));
  }
  for (const update of [left, Math.round((left + right) / 2), right]) picture.append(words(update, x(update), HIGH - 5, "middle"));
  const withEpisodes = new Set(head.columns.update);
  lines.forEach((points, k) => {
    const kind = k ? "second" : "";
    picture.append(svg("polyline", { class: "line " + kind, points: thin(points).map(([u, v]) => `${x(u).toFixed(1)},${y(v).toFixed(1)}`).join(" ") }));
    const has = ([update]) => withEpisodes.has(update);
    for (const point of points.length <= PARTS ? points : thin(points.filter(has)))
      picture.append(svg("circle", { class: has(point) ? kind : "none", cx: x(point[0]), cy: y(point[1]), r: has(point) ? 2.4 : 1.1 }));
  });
  link(picture, lines[0], x);
  const shown = names.filter((name) => series(name).length);
  const keys = shown.length < 2 ? [] : shown.map((name, k) =>
    make("span", { class: k ? "key second" : "key", text: name.replaceAll("_", " ") }));
  return make("figure", {}, make("figcaption", {}, make("span", { text: title }), ...keys), picture);
}

/** A number beside an axis, where there is room for few digits. */
function tick(value) {
  return value && Math.abs(value) < 1e-3 ? Number(value.toPrecision(2)).toExponential() : show(value, 2);
}

function words(text, x, y, anchor) {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = text;
  return element;
}

function link(picture, points, x) {
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HIGH - BOTTOM, x1: -9, x2: -9 });
  picture.append(cursor);
  let at = points.length - 1;
  const move = (to) => {
    at = Math.max(0, Math.min(points.length - 1, to));
    const [update, value] = points[at];
    cursor.setAttribute("x1", x(update));
    cursor.setAttribute("x2", x(update));
    picture.setAttribute("aria-valuenow", update);
    picture.setAttribute("aria-valuetext", `update ${update}: ${show(value)}`);
    picture.setAttribute("title", `update ${update}: ${show(value)}`);
  };
  const nearest = (event) => {
    const box = picture.getBoundingClientRect(), wanted = ((event.clientX - box.left) / box.width) * WIDE;
    return points.reduce((best, [update], k) => (Math.abs(x(update) - wanted) < Math.abs(x(points[best][0]) - wanted) ? k : best), 0);
  };
  picture.addEventListener("mousemove", (event) => move(nearest(event)));
  picture.addEventListener("click", (event) => {
    move(nearest(event));
    gotoUpdate(points[at][0]);
  });
  picture.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(at - 1);
    else if (event.key === "ArrowRight") move(at + 1);
    else if (event.key === "Enter") gotoUpdate(points[at][0]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

/** Show the episodes of an update, or of the nearest one that has any. */
function gotoUpdate(update) {
  const written = [...new Set(head.columns.update)];
  if (!written.length) return alarm("There are no episodes to show: the run wrote none.");
  const near = written.reduce((best, each) => (Math.abs(each - update) < Math.abs(best - update) ? each : best));
  for (const field of $("filters").elements) if (field.id && field.id !== "order") field.value = "";
  $("f-update").value = near;
  applyFilters().then(() => {
    if (near !== update) $("count").textContent += `: update ${update} was not written, ${near} is the nearest`;
    if (found.length) choose(found[0]);
    showTab("episode");
  });
}
