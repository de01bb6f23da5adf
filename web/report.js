// Shows the report of a node of ours, where it has one, in the node itself, and a link to its page.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element } from "./graph.js";
import { say } from "./words.js";

// The routes of the reports that are pages, by node.
const PAGES = { L2PEvaluate: "evaluation", L2PPrompts: "prompts" };
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

function pageLink(node, page, name) {
  if (!node.l2pPage) {
    const link = element("a", "font:12px sans-serif;color:inherit;text-decoration:underline;display:block;padding:4px;", {
      target: "_blank",
      rel: "noopener",
    });
    const widget = node.addDOMWidget("page", "l2p_page", link, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => 24,
      getMaxHeight: () => 24,
    });
    widget.serialize = false;
    node.l2pPage = link;
  }
  node.l2pPage.textContent = say("Open the report");
  // The number keeps a browser from showing the page of an earlier run.
  node.l2pPage.href = api.apiURL(`/l2p/${page}?${new URLSearchParams({ name, t: Date.now() })}`);
}

app.registerExtension({
  name: "L2P.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("L2P")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const text = message?.text;
      if (!text) return;
      if (message.l2p_page) pageLink(this, PAGES[nodeData.name], message.l2p_page[0]);
      reportWidget(this).value = Array.isArray(text) ? text.join("\n") : text;
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], height + 120)]);
      this.graph?.setDirtyCanvas(true, false);
    };
  },
});
