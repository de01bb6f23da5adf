// Shows the pairs of Compare L2P in the node: side by side, under a slider, or as the difference image at true size.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addElement, element, holdRoom } from "./graph.js";
import { say } from "./words.js";

const NODE = "L2PCompare";
const HEIGHT = 340;
const BAR = 30;
const MODES = ["Slider", "Side by side", "Difference"];
const LIVE = "$$canvas-image-preview"; // the host's widget with the picture of the last step, on the classic canvas
const KEPT = { mode: "l2pCompareMode" }; // in the workflow, so that it opens as it was left

const STYLE = {
  root: "display:flex;flex-direction:column;gap:4px;font:12px sans-serif;color:var(--fg-color,#ddd);height:100%;" +
    "overflow:hidden;box-sizing:border-box;",
  bar: `display:flex;gap:6px;align-items:center;flex:0 0 auto;min-height:${BAR - 6}px;flex-wrap:wrap;`,
  button: "font:12px sans-serif;padding:2px 8px;cursor:pointer;color:inherit;background:transparent;" +
    "border:1px solid currentColor;border-radius:4px;opacity:.65;",
  caption: "flex:0 0 auto;max-height:32px;overflow:auto;opacity:.85;user-select:text;",
  stage: "flex:1 1 0;min-height:0;position:relative;display:flex;gap:4px;overflow:hidden;touch-action:none;",
  half: "flex:1 1 0;min-width:0;height:100%;object-fit:contain;image-rendering:auto;",
  layer: "position:absolute;inset:0;width:100%;height:100%;object-fit:contain;pointer-events:none;",
  line: "position:absolute;top:0;bottom:0;width:2px;background:#fff;box-shadow:0 0 2px #000;pointer-events:none;",
  tag: "position:absolute;top:4px;padding:1px 6px;border-radius:4px;background:#000a;color:#fff;pointer-events:none;",
  scroll: "flex:1 1 0;min-height:0;overflow:auto;cursor:grab;touch-action:none;",
  true_size: "display:block;max-width:none;image-rendering:pixelated;",
};

const address = (file) => api.apiURL(`/view?${new URLSearchParams({ ...file, t: file.filename })}`);

function view(node) {
  if (node.l2pCompare) return node.l2pCompare;
  const root = element("div", STYLE.root);
  const parts = { root, pairs: [], at: 0, mode: node.properties?.[KEPT.mode] ?? MODES[0], cut: 0.5 };
  parts.bar = element("div", STYLE.bar);
  parts.stage = element("div", STYLE.stage);
  parts.caption = element("div", STYLE.caption, { textContent: say("Run it to see both models") });
  root.append(parts.bar, parts.stage, parts.caption);
  parts.widget = addElement(node, "pairs", root, { getMinHeight: () => (parts.pairs.length ? HEIGHT : BAR) });
  parts.node = node;
  node.l2pCompare = parts;
  return parts;
}

function button(text, chosen, onclick, name) {
  const made = element("button", STYLE.button, { textContent: text, type: "button", onclick });
  if (chosen) Object.assign(made.style, { opacity: 1, fontWeight: "bold" });
  made.setAttribute("aria-pressed", String(Boolean(chosen)));
  if (name) made.setAttribute("aria-label", name);
  return made;
}

function draw(parts) {
  const { pairs, at, mode, node } = parts;
  if (!pairs.length) return;
  const pair = pairs[at];
  const turn = (step) => {
    parts.at = (at + step + pairs.length) % pairs.length;
    draw(parts);
  };
  const modes = MODES.map((name) =>
    button(say(name), name === mode, () => {
      parts.mode = name;
      node.properties = { ...node.properties, [KEPT.mode]: name };
      draw(parts);
    }),
  );
  const turns =
    pairs.length > 1
      ? [
          button("◀", false, () => turn(-1), say("Previous pair")),
          element("span", "", { textContent: `${at + 1} / ${pairs.length}` }),
          button("▶", false, () => turn(1), say("Next pair")),
        ]
      : [];
  parts.bar.replaceChildren(...modes, ...turns);
  parts.caption.textContent = `${pair.prompt} (${say("seed")} ${pair.seed})`;
  parts.stage.replaceChildren(...SHOW[mode](parts, pair));
}

function picture(file, style, alt) {
  const made = element("img", style, { src: address(file), alt, draggable: false });
  made.title = alt;
  return made;
}

function tag(text, side) {
  const made = element("div", STYLE.tag, { textContent: say(text) });
  made.style[side] = "4px";
  return made;
}

// One image over the other, cut where the pointer is.
function slider(parts, pair) {
  const source = picture(pair.source, STYLE.layer, say("source"));
  const pixel = picture(pair.pixel, STYLE.layer, say("pixel model"));
  const line = element("div", STYLE.line);
  const over = element("div", "position:absolute;inset:0;cursor:ew-resize;", { tabIndex: 0 });
  over.setAttribute("role", "slider");
  over.setAttribute("aria-label", say("Slider"));
  over.setAttribute("aria-valuemin", "0");
  over.setAttribute("aria-valuemax", "100");
  const cut = (share) => {
    parts.cut = Math.min(1, Math.max(0, share));
    pixel.style.clipPath = `inset(0 0 0 ${parts.cut * 100}%)`;
    line.style.left = `calc(${parts.cut * 100}% - 1px)`;
    over.setAttribute("aria-valuenow", String(Math.round(parts.cut * 100)));
  };
  const follow = (event) => {
    // The canvas is zoomed by a transform, so the place is taken from what is on the screen.
    const box = over.getBoundingClientRect();
    cut((event.clientX - box.left) / box.width);
  };
  over.onpointermove = follow;
  over.onpointerdown = (event) => {
    event.stopPropagation();
    follow(event);
  };
  over.onkeydown = ({ key }) => {
    if (key === "ArrowLeft") cut(parts.cut - 0.02);
    if (key === "ArrowRight") cut(parts.cut + 0.02);
  };
  cut(parts.cut);
  return [source, pixel, line, tag("source", "left"), tag("pixel model", "right"), over];
}

const beside = (_, pair) => [
  picture(pair.source, STYLE.half, say("source")),
  picture(pair.pixel, STYLE.half, say("pixel model")),
];

// A pixel of the image is a pixel of the node at zoom 1; drag or scroll to see the rest.
function difference(_, pair) {
  const scroll = element("div", STYLE.scroll);
  const image = picture(pair.difference, STYLE.true_size, say("difference"));
  scroll.append(image);
  let from = null;
  scroll.onpointerdown = (event) => {
    event.stopPropagation();
    from = { x: event.clientX + scroll.scrollLeft, y: event.clientY + scroll.scrollTop };
    scroll.setPointerCapture(event.pointerId);
  };
  scroll.onpointermove = (event) => {
    if (!from) return;
    scroll.scrollLeft = from.x - event.clientX;
    scroll.scrollTop = from.y - event.clientY;
  };
  scroll.onpointerup = scroll.onpointercancel = () => (from = null);
  // The wheel would zoom the canvas.
  scroll.onwheel = (event) => event.stopPropagation();
  return [scroll];
}

const SHOW = { Slider: slider, "Side by side": beside, Difference: difference };

// The classic canvas keeps the picture of the last step below the pairs, and the height that it took.
function dropPreview(node) {
  node.imgs = undefined;
  const at = node.widgets.findIndex(({ name }) => name === LIVE);
  if (at < 0) return;
  node.widgets[at].onRemove?.();
  node.widgets.splice(at, 1);
}

function grow(node, parts) {
  dropPreview(node);
  holdRoom(parts.root, HEIGHT);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 420), Math.max(parts.height ?? node.size[1], height)]);
  node.graph?.setDirtyCanvas(true, true);
  draw(parts);
}

app.registerExtension({
  name: "L2P.Compare",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated, onExecuted, onConfigure, onExecutionStart, onDrawBackground } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      view(this);
    };
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      const mode = this.properties?.[KEPT.mode];
      if (SHOW[mode]) view(this).mode = mode;
    };
    nodeType.prototype.onExecutionStart = function () {
      onExecutionStart?.apply(this, arguments);
      Object.assign(view(this), { isRunning: true, height: this.size[1] });
    };
    // Where the host adds its previews: one that is still being decoded comes after the result.
    nodeType.prototype.onDrawBackground = function () {
      const { isRunning, pairs } = view(this);
      if (isRunning || !pairs.length) return onDrawBackground?.apply(this, arguments);
      this.imgs = undefined;
    };
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (!message?.l2p_pairs) return;
      const parts = view(this);
      parts.isRunning = false;
      parts.pairs = message.l2p_pairs;
      parts.at = Math.min(parts.at, parts.pairs.length - 1);
      grow(this, parts);
    };
  },
});
