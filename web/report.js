// Shows the report of Convert to L2P, Save L2P Delta and Merge L2P Delta in the node itself.
import { app } from "../../scripts/app.js";

const NODES = new Set(["L2PConvert", "L2PSaveDelta", "L2PMergeDelta"]);
const NAME = "report";

function reportWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === NAME);
  if (existing) return existing;
  const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  // Neither saved with the workflow nor sent to the server, which has no such input.
  widget.serialize = false;
  // Nodes 2.0 draws a text field of its own, by these options; it holds on to the object that it was given.
  Object.assign(widget.options, { serialize: false, read_only: true });
  const element = widget.element ?? widget.inputEl;
  if (element) element.readOnly = true;
  return widget;
}

app.registerExtension({
  name: "L2P.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const text = message?.text;
      if (!text) return;
      reportWidget(this).value = Array.isArray(text) ? text.join("\n") : text;
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], height + 120)]);
      this.graph?.setDirtyCanvas(true, false);
    };
  },
});
