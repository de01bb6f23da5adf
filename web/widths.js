// A new node of ours is as wide as its labels and values need; the host's own width cuts the longer ones.
import { app } from "../../scripts/app.js";
import { kindOf } from "./graph.js";

const LETTER = 7; // pixels on average, in the frontend's 14 px letters
const AROUND = 80; // margins and arrows of a widget
const WIDEST = 420;

app.registerExtension({
  name: "L2P.Widths",
  nodeCreated(node) {
    if (!kindOf(node)?.startsWith("L2P")) return;
    const lines = (node.widgets ?? []).filter(({ element }) => !element);
    const letters = lines.map(({ name, label, value }) => `${label ?? name}${value ?? ""}`.length);
    const needed = Math.min(WIDEST, Math.max(0, ...letters) * LETTER + AROUND);
    if (node.size[0] < needed) node.setSize([needed, node.size[1]]);
  },
});
