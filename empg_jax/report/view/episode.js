// One episode: its turns, the credit of each, and the tokens in color.

const MANY = 4000; // characters of a text that are shown at once
const MANY_TOKENS = 1500;
const COLORS = {
  advantage: { turn: "advantage", token: "a", sides: 2 },
  entropy: { turn: "entropy", token: "e", sides: 1 },
  "log-prob": { turn: "logprob", token: "l", sides: 1 },
  nothing: null,
};
let turnAt = 0; // the turn that the arrow keys stand on

function factorName(algorithm) {
  const name = algorithm || head.modulation || head.algorithm;
  return /empg/.test(name) ? "g" : /aem/.test(name) ? "α" : "factor";
}

/** The tint of a value: one hue for sizes, two for signs. */
function tint(name, value) {
  const color = COLORS[name];
  if (!color || value === null || value === undefined) return {};
  const largest = head.scale[color.turn] || 1;
  const share = Math.min(1, Math.abs(value) / largest);
  const hue = color.sides === 1 ? "var(--hot)" : value < 0 ? "var(--down)" : "var(--up)";
  return { "--tint": hue, "--much": (0.62 * share).toFixed(3) };
}

/** A text, its first part when it is long, with a button for the rest. */
function longText(kind, text, fill) {
  const box = make("div", { class: "text " + kind });
  const draw = (all) => {
    box.replaceChildren(fill(all));
    if (!all && text.length > MANY)
      box.append(" … ", make("button", { text: `show all ${text.length.toLocaleString("en")} characters`, onclick: () => draw(true) }));
  };
  draw(false);
  return box;
}

function observationBox(turn) {
  const text = turn.observation;
  return longText("observation", text, (all) => make("span", { text: all ? text : text.slice(0, MANY) }));
}

function responseBox(turn, colored) {
  const text = turn.response, color = COLORS[colored];
  if (color && turn.pieces && turn[color.token]) return longText("response", text, (all) => tokenSpans(turn, color, colored, all));
  return longText("response", text, (all) =>
    make("mark", { text: all ? text : text.slice(0, MANY), ...(color ? tint(colored, turn[color.turn]) : {}) }));
}

function tokenSpans(turn, color, colored, all) {
  const part = document.createDocumentFragment();
  const count = all ? turn.pieces.length : Math.min(turn.pieces.length, MANY_TOKENS);
  for (let t = 0; t < count; t++) {
    const told = [["entropy", turn.e], ["log-prob", turn.l], ["advantage", turn.a]]
      .filter(([, values]) => values).map(([name, values]) => `${name} ${show(values[t])}`).join(", ");
    part.append(make("span", { text: turn.pieces[t], title: told, ...tint(colored, turn[color.token][t]) }));
  }
  if (count < turn.pieces.length)
    part.append(make("span", { class: "dim", text: ` … ${turn.pieces.length - count} more tokens` }));
  return part;
}

/** A bar from the left, or from the middle for numbers with a sign. */
function bar(value, largest, { isSigned = false, hue = "--hot" } = {}) {
  const box = make("span", { class: isSigned ? "bar zero" : "bar", "aria-hidden": "true" });
  if (value === null || value === undefined || !largest) return box;
  const share = 100 * Math.min(1, Math.abs(value) / largest);
  const side = isSigned ? (value < 0 ? `right:50%;width:${share / 2}%` : `left:50%;width:${share / 2}%`) : `left:0;width:${share}%`;
  const color = isSigned ? (value < 0 ? "--down" : "--up") : hue;
  box.append(make("i", { style: `${side};--tint:var(${color})` }));
  return box;
}

function barCell(name, text, drawn) {
  return make("div", {}, make("span", { class: "name", text: name + " " }), make("span", { text }), drawn);
}

/** The bars of a turn: why its tokens were pushed, and how hard. */
function creditBars(turn, other, algorithm) {
  const scale = head.scale, credit = other || turn, name = factorName(other ? algorithm : "");
  const step = Math.max(scale.advantage, scale.advantage_base);
  const cells = [
    barCell("entropy H", show(turn.entropy), bar(turn.entropy, scale.entropy)),
    // A factor of 1 changes nothing: its bar grows from there, by octaves.
    barCell(name, show(credit.factor), bar(credit.factor > 0 ? Math.log2(credit.factor) : null, 2, { isSigned: true })),
    barCell("bonus", signed(credit.bonus), bar(credit.bonus, scale.bonus, { isSigned: true })),
    barCell("A before", signed(credit.advantage_base), bar(credit.advantage_base, step, { isSigned: true })),
    barCell("A after", signed(credit.advantage), bar(credit.advantage, step, { isSigned: true })),
  ];
  if (other) cells.push(barCell("A trained", signed(turn.advantage), bar(turn.advantage, step, { isSigned: true })));
  const box = make("div", { class: "bars", role: "img" }, ...cells);
  box.setAttribute("aria-label", `entropy ${show(turn.entropy)} nats, ${why(credit, name)}`);
  return box;
}

/** The sum behind an advantage, in words and numbers. */
function why(credit, name) {
  const { factor, bonus, advantage_base: base, advantage: after } = credit;
  if ([factor, bonus, base, after].some((value) => value === null || value === undefined)) return "no credit recorded";
  const shift = after - base * factor - bonus;
  const least = 1e-4 * Math.max(Math.abs(after), Math.abs(base), 1e-3);
  const parts = [`${signed(base)} × ${name} ${show(factor)}`];
  if (Math.abs(bonus) > least) parts.push(`${signed(bonus)} bonus`);
  if (Math.abs(shift) > least) parts.push(`${signed(shift)} centering`);
  const change = Math.abs(after) - Math.abs(base);
  const effect = after * base < 0 ? "the sign turned" : Math.abs(change) <= least ? "as without modulation"
    : Math.abs(base) <= least ? "by what was added alone" : change > 0 ? "pushed harder" : "pushed more softly";
  const way = Math.abs(after) <= least ? "not pushed" : after > 0 ? "made more likely" : "made less likely";
  return `${parts.join("  ")} = ${signed(after)}: ${way}, ${effect}`;
}

function turnNote(turn, k) {
  const notes = [`${show(turn.tokens)} tokens`];
  if (turn.logprob !== undefined) notes.push(`log-prob ${show(turn.logprob)}`);
  if (turn.reward) notes.push(`reward ${signed(turn.reward)}`);
  if (turn.valid === false) notes.push("no valid action");
  if (turn.finish_reason === "length") notes.push("cut at the length limit");
  if (turn.version !== undefined) notes.push(`weights of update ${turn.version}`);
  return make("div", { class: "dim" }, make("span", { class: "which", text: `turn ${k + 1}` }), make("span", { text: `  ${notes.join(", ")}` }));
}

function turnBox(turn, k, other, algorithm) {
  const credit = other || turn, hasCredit = credit.advantage !== undefined && credit.advantage !== null;
  const box = make("section", { class: "turn", id: "turn-" + k, "aria-label": `turn ${k + 1}` },
    turnNote(turn, k), observationBox(turn), responseBox(turn, $("color").value));
  if (hasCredit) {
    box.append(creditBars(turn, other, algorithm));
    box.append(make("p", { class: "why", text: why(credit, factorName(other ? algorithm : "")) }));
  } else box.append(make("div", { class: "bars" }, barCell("entropy H", show(turn.entropy), bar(turn.entropy, head.scale.entropy))));
  return box;
}

/** The turns of an episode, and what the chosen other algorithm gives them (null: as trained). */
async function openEpisode(i) {
  const chunk = of("chunk", i), slot = of("slot", i), algorithm = $("what-if").value;
  const episode = (await open(chunk))[slot];
  let others = null;
  if (algorithm) {
    try {
      others = (await open(`${chunk}.${algorithm}`))[slot].map(([factor, bonus, advantage_base, advantage]) =>
        ({ factor, bonus, advantage_base, advantage }));
    } catch {
      alarm(`There is no credit of ${algorithm} for update ${of("update", i)}; its episodes are shown as trained.`);
    }
  }
  return { episode, others, algorithm };
}

function headline(i) {
  const where = `${of("split", i) || "?"} task ${show(of("task", i))}, update ${of("update", i)}, group ${of("group", i)}, attempt ${of("member", i)}`;
  const end = `${of("reason", i)}, return ${show(of("return", i))}, ${of("turns", i)} turns, ${of("tokens", i)} tokens`;
  return [make("h2", {}, make("span", { text: where + ": " }), verdict(i)), make("p", { class: "facts", text: end })];
}

async function drawEpisode(i) {
  const { episode, others, algorithm } = await openEpisode(i);
  // Something else was chosen meanwhile.
  if (i !== chosen || tab !== "episode" || algorithm !== $("what-if").value) return;
  const metrics = Object.entries(episode.metrics).map(([name, value]) => `${name} ${show(value)}`).join(", ");
  const boxes = episode.turns.map((turn, k) => turnBox(turn, k, others && others[k], algorithm));
  const more = episode.detail ? [make("p", { class: "facts", text: `${of("reason", i)}: ${episode.detail}` })] : [];
  const facts = metrics ? [make("p", { class: "facts", text: metrics })] : [];
  if (others) facts.push(make("p", { class: "facts", text: `credit shown: what ${algorithm} would give this batch` }));
  if (!boxes.length) facts.push(make("p", { class: "message", text: "This record has no turns." }));
  $("pane").replaceChildren(...headline(i), ...more, ...facts, ...boxes);
  turnAt = -1;
}

function stepTurn(by) {
  const boxes = document.querySelectorAll(".turn");
  if (!boxes.length) return;
  turnAt = Math.max(0, Math.min(boxes.length - 1, turnAt + by));
  boxes.forEach((box, k) => box.classList.toggle("here", k === turnAt));
  boxes[turnAt].scrollIntoView({ block: "nearest" });
}
