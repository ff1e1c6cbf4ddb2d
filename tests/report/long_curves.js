// Draws a panel of a very long run with elements that only count, and prints what it consists of.

const fs = require("node:fs"), vm = require("node:vm");

const counts = {};
const element = (tag) => {
  counts[tag] = (counts[tag] || 0) + 1;
  return { setAttribute: (name, value) => name === "points" && (counts.points = value.split(" ").length), append() {}, addEventListener() {} };
};
const updates = Array.from({ length: Number(process.argv[3]) }, (_, k) => k + 1);
const metrics = { entropy: updates.map((update) => (update === 77_777 ? 9 : 0.5)) };
vm.runInNewContext(
  `${fs.readFileSync(process.argv[2], "utf8")}\npanel("entropy", ["entropy"]);`,
  {
    document: { createElementNS: (_, tag) => element(tag) },
    make: element,
    show: (value) => (counts.highest = Math.max(counts.highest || 0, value), String(value)),
    head: { updates, metrics, columns: { update: updates } },
  },
);
console.log(JSON.stringify(counts));
