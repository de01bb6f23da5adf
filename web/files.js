// After a node has written a file, lists of files show it; and workflows of 0.1 open with what they say.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { kindOf, nodeOf } from "./graph.js";

const CONTROLS = new Set(["fixed", "increment", "decrement", "randomize"]);
const CONTROL_AT = 3; // in Convert to L2P of 0.1: source, variant, seed, what becomes of the seed, filename, overwrite
const LENGTH_THEN = 6;

let waiting = 0;

// One of ours that hands on the name of a file has written it.
const writes = (node) =>
  kindOf(node)?.startsWith("L2P") && node.outputs?.some(({ type }) => type === "COMBO");

// Once for nodes that end together: all lists are asked for anew, without the messages that the key R shows, where the
// frontend can do that.
function refresh() {
  clearTimeout(waiting);
  waiting = setTimeout(() => (app.reloadNodeDefs ? app.reloadNodeDefs() : app.refreshComboInNodes?.()), 300);
}

app.registerExtension({
  name: "L2P.Files",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      if (writes(nodeOf(detail?.display_node ?? detail?.node))) refresh();
    });
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "L2PConvert") return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved) {
      const values = saved?.widgets_values;
      // Today as many end with a data set's name.
      const then = values?.length === LENGTH_THEN && typeof values.at(-1) === "boolean";
      if (then && CONTROLS.has(values[CONTROL_AT])) {
        saved = { ...saved, widgets_values: values.filter((_, place) => place !== CONTROL_AT) };
      }
      return configure?.call(this, saved);
    };
  },
});
