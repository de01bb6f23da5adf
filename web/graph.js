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
