// What our extensions share: finding a node by the id that the server gives, and this pack's folder.
import { app } from "../../scripts/app.js";

// The address is /extensions/<folder>/graph.js, whatever the folder is called.
export const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

// A node in a subgraph is named by the ids on the way to it, 12:3.
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node ?? null;
}

export const kindOf = (node) => node?.comfyClass ?? node?.type;

export function element(tag, style, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.style.cssText = style;
  return made;
}

// A widget that is an element of ours: neither saved with the workflow nor sent to the server, which has no such input.
// The classic canvas asks for its height; Nodes 2.0 takes it from the element's style, see `holdRoom`.
export function addElement(node, name, root, heights) {
  const widget = node.addDOMWidget(name, `l2p_${name}`, root, { serialize: false, hideOnZoom: false, ...heights });
  widget.serialize = false;
  return widget;
}

const MARGINS = 20; // above and below an element on the classic canvas, which its height includes

// Room for an element that fills what it is given and has no height of its own.
export function holdRoom(root, height) {
  root.style.flex = `1 0 ${Math.max(0, height - MARGINS)}px`;
}
