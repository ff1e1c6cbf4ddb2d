// Where the data comes from: script elements of this page, or the program that serves it.

const $ = (id) => document.getElementById(id);

/** Make an element; text goes in as text, never as markup. */
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = plain(value);
    else if (name === "class") element.className = value;
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Show characters that a browser would hide or obey: controls, and those that turn the direction of text. */
function plain(text) {
  return String(text)
    .replace(/\r\n/g, "\n")
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421")
    .replace(/[\u0080-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
      (c) => `\u27e8U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);
}

function show(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

const signed = (value, digits = 3) => (value > 0 ? "+" : "") + show(value, digits).replace("-", "−");

function alarm(text) {
  const known = [...$("alert").children].some((each) => each.textContent === text);
  if (!known) $("alert").append(make("p", { text }));
}

window.addEventListener("error", (event) => alarm(`This page failed: ${event.message}`));
window.addEventListener("unhandledrejection", (event) => alarm(`This page failed: ${event.reason}`));

async function unpack(bytes) {
  if (typeof DecompressionStream === "undefined")
    throw new Error("this browser cannot decompress (DecompressionStream); take one of 2023 or later");
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function embedded(name) {
  const element = $("data-" + name);
  return element && Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
}

const loaded = new Promise((resolve) => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", resolve);
});

async function read(name) {
  if (LIVE) {
    const answer = await fetch("data/" + encodeURIComponent(name), { cache: "no-store" });
    if (!answer.ok) throw new Error(`${name}: ${answer.status} ${await answer.text()}`);
    return unpack(await answer.arrayBuffer());
  }
  let bytes = embedded(name);
  if (!bytes) {
    await loaded; // a large page is still coming
    bytes = embedded(name);
  }
  if (!bytes) throw new Error(`the page was cut: ${name} is missing`);
  return unpack(bytes);
}

const KEPT = 24; // opened chunks; each may be megabytes
const opened = new Map();

/** Open a chunk, keeping the last few. */
function open(name) {
  if (opened.has(name)) {
    const found = opened.get(name);
    opened.delete(name);
    opened.set(name, found);
    return found;
  }
  const reading = read(name).catch((error) => {
    opened.delete(name);
    throw error;
  });
  opened.set(name, reading);
  if (opened.size > KEPT) opened.delete(opened.keys().next().value);
  return reading;
}
