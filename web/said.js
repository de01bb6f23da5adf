// Sentences of the server in the nodes they concern: what was loaded, what a user should know of a result, and errors of
// ours, whichever node they come from, where the host would show a general hint.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { PACK, addElement, element, kindOf, nodeOf } from "./graph.js";
import { closeHint } from "./hint.js";
import { say } from "./words.js";

const OURS = /^L2P/;
const OUT_OF_MEMORY = /OutOfMemory|OOM/; // of which the host's hint says what to do
const STYLE =
  "box-sizing:border-box;padding:4px 6px;font:12px/1.35 sans-serif;color:inherit;" +
  "white-space:normal;overflow:auto;height:100%;user-select:text;";
const LINE = 17;
const LEAST_WIDTH = 240;
const COLOURS = { progress: "inherit", said: "var(--fg-color,#ddd)", error: "var(--error-text,#ff6b6b)" };
const MESSAGE_MILLISECONDS = 15000;
const MOUNTED_MILLISECONDS = 200;
const ABOVE_ALL = "10000";
const READABLE = 0.4; // the canvas's zoom

// What is on display of errors, until the next run: nodes with their ids, and messages for nodes that are out of sight.
const shown = new Map();
const messages = new Set();
let run = 0;

// What a stock node makes of pixels, which its own sentence does not tell.
const HINTS = [
  {
    node: /^VAEDecode/,
    message: /channels, but got 3 channels|expected input.*to have \d+ channels, but got 3/,
    sentence: "These are the pixels of an L2P model, not a latent: use Pixels to Image in place of VAE Decode.",
  },
];

// The host's own loaders: the folder and the input that name their file. Where they fail on an L2P file before they ask us,
// the server says what is wrong with it.
const LOADERS = {
  UNETLoader: ["diffusion_models", "unet_name"],
  CheckpointLoaderSimple: ["checkpoints", "ckpt_name"],
  ImageOnlyCheckpointLoader: ["checkpoints", "ckpt_name"],
  unCLIPCheckpointLoader: ["checkpoints", "ckpt_name"],
};

async function sentenceOfFile({ node_type, current_inputs, exception_type }) {
  const [folder, input] = LOADERS[node_type] ?? [];
  const name = [current_inputs?.[input]].flat()[0];
  if (!name || OUT_OF_MEMORY.test(exception_type)) return "";
  const answer = await api.fetchApi(`/l2p/refused?${new URLSearchParams({ folder, name })}`);
  return answer.ok ? answer.text() : "";
}

function sentenceOf({ node_type, exception_message, traceback }) {
  const message = String(exception_message ?? "").trim();
  const hint = HINTS.find((hint) => hint.node.test(node_type) && hint.message.test(message));
  if (hint) return hint.sentence;
  const fromPack = OURS.test(node_type) || (traceback ?? []).join("").includes(PACK);
  return fromPack ? message : "";
}

function textWidget(node) {
  if (node.l2pSaid) return node.l2pSaid;
  const text = element("div", STYLE);
  const parts = { text, height: 0, texts: {} };
  const height = () => parts.height;
  parts.widget = addElement(node, "said", text, { getMinHeight: height, getMaxHeight: height });
  node.l2pSaid = parts;
  return parts;
}

function write(node, sentence, kind) {
  if (!sentence && !node.l2pSaid) return;
  const parts = textWidget(node);
  parts.texts[kind] = sentence;
  const texts = Object.entries(parts.texts).filter(([, text]) => text);
  if (texts.length && node.size[0] < LEAST_WIDTH) node.setSize([LEAST_WIDTH, node.size[1]]);
  const characters = (node.size[0] - 40) / 6.3;
  const lines = texts.reduce((count, [, text]) => count + Math.ceil(text.length / characters), 0);
  parts.height = lines && (lines + 1) * LINE + 10;
  parts.text.replaceChildren(
    ...texts.map(([kind, text]) => element("div", `color:${COLOURS[kind]};`, { textContent: say(text) })),
  );
  parts.text.style.display = lines ? "block" : "none";
  if (lines) {
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  node.graph?.setDirtyCanvas(true, true);
}

function showError(node, id, sentence) {
  if (shown.has(node)) return;
  shown.set(node, id);
  node.l2pSizeBefore = [...node.size];
  write(node, sentence, "error");
  node.l2pSizeThen = [...node.size];
  raise(node);
}

// Nodes beside it may lie where it has grown. In Nodes 2.0 it is an element of the page, which is there a moment later.
function raise(node) {
  app.canvas?.bringToFront?.(node);
  setTimeout(() => {
    const frame = node.l2pSaid?.text.closest?.("[data-node-id]");
    if (!frame || !shown.has(node)) return;
    const { zIndex } = frame.style;
    frame.style.zIndex = ABOVE_ALL;
    node.l2pLower = () => (frame.style.zIndex = zIndex);
  }, MOUNTED_MILLISECONDS);
}

// The node is as it was, in the size that it had unless the user has changed that since.
function takeBack(node) {
  node.l2pLower?.();
  write(node, "", "error");
  if (!OURS.test(kindOf(node))) remove(node);
  if (node.size.every((side, i) => side === node.l2pSizeThen[i])) node.setSize(node.l2pSizeBefore);
}

// Other people's nodes do not keep a widget of ours.
function remove(node) {
  const { widget } = node.l2pSaid;
  delete node.l2pSaid;
  if (node.removeWidget) return node.removeWidget(widget);
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
}

function clear() {
  run += 1;
  // Nodes 2.0 keeps sizes by ids: one of a workflow that has been closed would give its size to another's node.
  for (const [node, id] of shown) if (nodeOf(id) === node) takeBack(node);
  shown.clear();
  messages.forEach((message) => app.extensionManager?.toast?.remove?.(message));
  messages.clear();
}

// Whether any of it is in the part of the graph that the user sees, large enough to read.
function isInSight(node) {
  const { canvas } = app;
  if (!canvas || node.graph !== (canvas.graph ?? node.graph)) return false;
  const { offset, scale } = canvas.ds;
  if (scale < READABLE) return false;
  return [canvas.canvas.clientWidth, canvas.canvas.clientHeight].every((room, i) => {
    const start = (node.pos[i] + offset[i]) * scale;
    return start < room && start + node.size[i] * scale > 0;
  });
}

async function show({ detail }) {
  let sentence = sentenceOf(detail);
  if (!sentence && detail.node_type in LOADERS) {
    const then = run;
    sentence = await sentenceOfFile(detail);
    if (run !== then) return;
  }
  if (!sentence) return;
  const node = nodeOf(detail.node_id);
  if (!OUT_OF_MEMORY.test(detail.exception_type)) closeHint(node?.title ?? detail.node_type);
  if (node) {
    // Train L2P may show it where it shows its progress.
    if (node.l2pTraining?.state?.text !== sentence) showError(node, detail.node_id, sentence);
    if (isInSight(node)) return;
  }
  tell("error", node?.title ?? detail.node_type, sentence);
}

// A message beside the graph, once, until the next run.
function tell(severity, summary, sentence) {
  const detail = say(sentence);
  if ([...messages].some((other) => other.summary === summary && other.detail === detail)) return;
  const message = { severity, summary, detail, life: MESSAGE_MILLISECONDS };
  messages.add(message);
  app.extensionManager?.toast?.add(message);
}

// Of a sampling, whichever node samples; those of ours that say it themselves are left at that.
function warn(node, sentence) {
  if (!node?.l2pSaid?.texts.said?.includes(sentence)) tell("warn", node?.title ?? "L2P", sentence);
}

app.registerExtension({
  name: "L2P.Said",
  setup() {
    api.addEventListener("execution_start", clear);
    api.addEventListener("execution_error", show);
    api.addEventListener("l2p.said", ({ detail }) => {
      const node = nodeOf(detail.node);
      if (detail.kind === "warning") warn(node, detail.text);
      else if (OURS.test(kindOf(node))) write(node, detail.text, detail.kind ?? "said");
    });
  },
});
