// Shows the report of a node of ours, where it has one, in the node itself, and a link to its page.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addElement, element, holdRoom } from "./graph.js";
import { say } from "./words.js";

// The routes of the reports that are pages, by node.
const PAGES = { L2PEvaluate: "evaluation", L2PPrompts: "prompts" };
const HEIGHT = 140;
const LINK_HEIGHT = 24;
const STYLE = {
  report: "box-sizing:border-box;height:100%;padding:6px 8px;overflow:auto;white-space:pre-wrap;user-select:text;" +
    "font:11px/1.4 monospace;color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border-radius:4px;",
  link: "font:12px sans-serif;color:inherit;text-decoration:underline;display:block;padding:4px;",
};

function reportOf(node) {
  if (node.l2pReport) return node.l2pReport;
  const text = element("div", STYLE.report);
  addElement(node, "report", text, { getMinHeight: () => HEIGHT });
  holdRoom(text, HEIGHT);
  // The wheel would zoom the canvas.
  text.onwheel = (event) => text.scrollHeight > text.clientHeight && event.stopPropagation();
  node.l2pReport = text;
  return text;
}

function pageLink(node, page, name) {
  if (!node.l2pPage) {
    const link = element("a", STYLE.link, { target: "_blank", rel: "noopener" });
    addElement(node, "page", link, { getMinHeight: () => LINK_HEIGHT, getMaxHeight: () => LINK_HEIGHT });
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
      reportOf(this).textContent = Array.isArray(text) ? text.join("\n") : text;
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], height)]);
      this.graph?.setDirtyCanvas(true, false);
    };
  },
});
