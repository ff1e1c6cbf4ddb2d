// A group side by side: a column per attempt, a row per turn.

function membersOf(i) {
  const places = [];
  for (let other = 0; other < head.columns.update.length; other++)
    if (["update", "group", "chunk"].every((name) => of(name, other) === of(name, i))) places.push(other);
  return places;
}

async function drawGroup(i) {
  const places = membersOf(i);
  const opened = await Promise.all(places.map(openEpisode));
  if (i !== chosen || tab !== "group") return;
  const heads = places.map((place) => {
    const cell = make("th", { scope: "col" }, make("button", { text: `attempt ${of("member", place)}`, onclick: () => {
      choose(place);
      showTab("episode");
    } }), " ", verdict(place), make("div", { class: "dim", text: `${of("reason", place)}, return ${show(of("return", place))}` }));
    if (place === i) cell.style.background = "var(--chosen)";
    return cell;
  });
  const depth = Math.max(0, ...opened.map(({ episode }) => episode.turns.length));
  const rows = Array.from({ length: depth }, (_, k) => make("tr", {}, make("th", { scope: "row", text: k + 1 }),
    ...opened.map(({ episode, others, algorithm }) => groupCell(episode.turns[k], others && others[k], algorithm))));
  const table = make("table", { class: "group" }, make("thead", {}, make("tr", {}, make("th", { text: "turn" }), ...heads)),
    make("tbody", {}, ...rows));
  const title = `${of("split", i) || "?"} task ${show(of("task", i))}, update ${of("update", i)}, group ${of("group", i)}: ${places.length} attempts`;
  $("pane").replaceChildren(make("h2", { text: title }), make("p", { class: "facts", text: of("goal", i) }), table);
}

function groupCell(turn, other, algorithm) {
  if (!turn) return make("td", {});
  const credit = other || turn, largest = Math.max(head.scale.advantage, head.scale.advantage_base);
  const name = factorName(other ? algorithm : "");
  const text = turn.response.length > 600 ? turn.response.slice(0, 600) + " …" : turn.response;
  const color = COLORS[$("color").value];
  const value = color && (color.turn === "advantage" ? credit.advantage : turn[color.turn]);
  const told = `H ${show(turn.entropy)}, ${name} ${show(credit.factor)}, ${signed(credit.advantage_base)} → ${signed(credit.advantage)}`;
  return make("td", { title: turn.observation.slice(0, 1000) },
    make("div", { class: "text response" }, make("mark", { text, ...tint($("color").value, value) })),
    make("div", { class: "dim", text: told }), bar(credit.advantage, largest, { isSigned: true }));
}
