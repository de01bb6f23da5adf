// A new node of ours is as wide as its labels and values need; the host's own width cuts the longer ones.
import { app } from "../../scripts/app.js";
import { kindOf } from "./graph.js";

const LETTER = 7; // pixels on average, in the frontend's 14 px letters
const AROUND = 80; // margins and arrows of a widget
const WIDEST = 420;
const SEED_LETTERS = 20; // of a number that is drawn, and of the button beside it

const labelOf = ({ label, name }) => `${label ?? name}`.length;
const valueOf = ({ name, value }) => Math.max(name === "seed" ? SEED_LETTERS : 0, `${value ?? ""}`.length);
const longest = (lengths) => Math.max(0, ...lengths);

// Nodes 2.0 stands all values in one column, beside the longest label.
function lettersOf(lines) {
  if (!globalThis.LiteGraph?.vueNodesMode) return longest(lines.map((line) => labelOf(line) + valueOf(line)));
  const rows = lines.filter(({ name }) => name !== "control_after_generate"); // a button beside the seed
  return longest(rows.map(labelOf)) + longest(rows.map(valueOf));
}

app.registerExtension({
  name: "L2P.Widths",
  nodeCreated(node) {
    if (!kindOf(node)?.startsWith("L2P")) return;
    const lines = (node.widgets ?? []).filter(({ element }) => !element);
    const needed = Math.min(WIDEST, lettersOf(lines) * LETTER + AROUND);
    if (node.size[0] < needed) node.setSize([needed, node.size[1]]);
  },
});
