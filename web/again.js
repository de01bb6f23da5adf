// Shows again what a node of ours showed when its workflow's tab was left: the host keeps the results of the last run and
// gives them back to its own previews only, a moment after it has built the nodes anew.
import { app } from "../../scripts/app.js";
import { kindOf } from "./graph.js";

const OURS = /^L2P/;
const GIVEN_BACK_MILLISECONDS = 300;

// A node in a subgraph is kept under both ids, of the subgraph and its own.
function* nodesByKey(root) {
  for (const node of root?.nodes ?? []) yield [String(node.id), node];
  for (const [id, graph] of root?.subgraphs ?? []) for (const node of graph.nodes) yield [`${id}:${node.id}`, node];
}

app.registerExtension({
  name: "L2P.Again",
  afterConfigureGraph() {
    setTimeout(() => {
      for (const [key, node] of nodesByKey(app.rootGraph ?? app.graph)) {
        const shown = app.nodeOutputs?.[key];
        if (shown && OURS.test(kindOf(node))) node.onExecuted?.(shown);
      }
    }, GIVEN_BACK_MILLISECONDS);
  },
});
