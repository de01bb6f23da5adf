// Shows a run of Train L2P in the node while it goes: where it stands, its loss by range of sigma, the last montage.
// Every message of the server holds all of that, so that a page that was reloaded is right again with the next one.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { labels, stepTicks } from "./axis.js";
import { addElement, element, holdRoom, kindOf, nodeOf } from "./graph.js";
import { say } from "./words.js";

const NODE = "L2PTrain";
const EVENT = "l2p.training";
const HIGH = ["#e4572e", "#f3a712"]; // sigma above 0.6, where failure shows
const LOW = ["#7fa3c7", "#86b8a8", "#a898c8"];
const CHART_HEIGHT = 150;
const HEIGHT = 64; // of the words and the buttons, at least
const GAP = 4;
const LEAST = 1e-6; // a logarithmic axis has no zero
const PAD = { left: 46, right: 8, top: 22, bottom: 18 };

const STYLE = {
  root: `display:flex;flex-direction:column;gap:${GAP}px;font:12px sans-serif;color:var(--fg-color,#ddd);overflow:hidden;`,
  text: "flex:none;min-height:15px;white-space:normal;",
  chart: `width:100%;height:${CHART_HEIGHT}px;flex:0 0 ${CHART_HEIGHT}px;display:none;`,
  montage: "width:100%;flex:1 1 0;min-height:0;object-fit:contain;image-rendering:auto;display:none;",
  bar: "flex:none;display:flex;gap:10px;align-items:center;min-height:22px;",
  button: "font:12px sans-serif;padding:2px 10px;cursor:pointer;color:inherit;background:transparent;" +
    "border:1px solid currentColor;border-radius:4px;",
  link: "font:12px sans-serif;color:inherit;text-decoration:underline;",
  notes: "flex:none;font-size:11px;opacity:.75;display:none;",
};

function view(node) {
  if (node.l2pTraining) return node.l2pTraining;
  const root = element("div", STYLE.root);
  const parts = {
    root,
    text: element("div", STYLE.text),
    chart: element("canvas", STYLE.chart),
    montage: element("img", STYLE.montage),
    notes: element("div", STYLE.notes),
    bar: element("div", STYLE.bar),
    stop: element("button", STYLE.button, { textContent: say("Stop and save"), type: "button" }),
    report: element("a", STYLE.link, { textContent: say("Open the report"), target: "_blank", rel: "noopener" }),
    state: null,
    height: HEIGHT,
  };
  parts.stop.onclick = () => {
    parts.stop.disabled = true;
    api.interrupt(null);
  };
  parts.bar.append(parts.stop, parts.report);
  parts.stop.style.display = parts.report.style.display = "none";
  parts.text.textContent = say("Not trained yet");
  root.append(parts.text, parts.bar, parts.chart, parts.montage, parts.notes);
  parts.widget = addElement(node, "training", root, { getMinHeight: () => parts.height });
  new ResizeObserver(() => draw(parts)).observe(parts.chart);
  // A narrower node breaks them into more lines.
  const words = new ResizeObserver(() => grow(node, parts));
  words.observe(parts.text);
  words.observe(parts.notes);
  node.l2pTraining = parts;
  return parts;
}

function show(node, state) {
  const parts = view(node);
  parts.state = state;
  parts.text.textContent = say(state.text);
  parts.text.style.color = state.status === "failed" ? "var(--error-text, #ff6b6b)" : "";
  const runs = state.status === "preparing" || state.status === "training";
  parts.stop.style.display = runs ? "" : "none";
  parts.stop.disabled &&= runs;
  parts.report.style.display = state.report ? "" : "none";
  parts.report.href = api.apiURL(`/l2p/report?${new URLSearchParams({ run: state.run })}`);
  const curves = state.curves.steps.length > 1;
  parts.chart.style.display = curves ? "block" : "none";
  parts.notes.style.display = state.notes.length ? "block" : "none";
  parts.notes.replaceChildren(
    ...state.notes.map((note) => Object.assign(document.createElement("div"), { textContent: say(note) })),
  );
  if (state.montage) {
    const { step, ...file } = state.montage;
    const url = api.apiURL(`/view?${new URLSearchParams({ ...file, step, run: state.run })}`);
    if (parts.montage.getAttribute("src") !== url) {
      parts.montage.onload = () => grow(node, parts);
      parts.montage.src = url;
      parts.montage.alt = parts.montage.title = say(`Montage of step ${step}`);
    }
  }
  parts.montage.style.display = state.montage ? "block" : "none";
  draw(parts);
  grow(node, parts);
}

// Make room for what has come in, once; a node that the user has made larger stays so.
function grow(node, parts) {
  const { montage, state } = parts;
  if (!state) return;
  const width = node.size[0] - 30;
  const share = montage.naturalWidth ? montage.naturalHeight / montage.naturalWidth : 0;
  // A part that is not displayed has no height.
  const { text, bar, notes } = parts;
  let height = Math.max(HEIGHT, text.scrollHeight + bar.scrollHeight + 2 * GAP);
  if (state.curves.steps.length > 1) height += CHART_HEIGHT + GAP;
  if (state.montage && share) height += Math.min(width * share, 360) + 8;
  if (state.notes.length) height += notes.scrollHeight + GAP;
  height = Math.ceil(height);
  if (height <= parts.height) return;
  parts.height = height;
  holdRoom(parts.root, height);
  const [least, lowest] = node.computeSize();
  node.setSize([Math.max(node.size[0], least), Math.max(node.size[1], lowest)]);
  node.graph?.setDirtyCanvas(true, true);
}

function draw({ chart, state }) {
  if (!state || !chart.clientWidth) return;
  const scale = window.devicePixelRatio || 1;
  const width = chart.clientWidth;
  chart.width = width * scale;
  chart.height = CHART_HEIGHT * scale;
  const pen = chart.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "10px sans-serif";
  const ink = getComputedStyle(chart).color;
  const { steps, ranges } = state.curves;
  const levels = ranges.flatMap((range) => range.values.filter((value) => value !== null)).map(level);
  if (!levels.length) return;
  let [low, high] = [Math.min(...levels), Math.max(...levels)];
  const margin = (high - low) * 0.06 || 0.1;
  [low, high] = [low - margin, high + margin];
  const first = steps[0];
  const last = Math.max(steps[steps.length - 1], first + 1);
  const x = (step) => PAD.left + ((step - first) / (last - first)) * (width - PAD.left - PAD.right);
  const y = (value) => CHART_HEIGHT - PAD.bottom - ((value - low) / (high - low)) * (CHART_HEIGHT - PAD.top - PAD.bottom);
  axes(pen, ink, width, { first, last, low, high }, x, y);
  const colours = { true: [...HIGH], false: [...LOW] };
  pen.textAlign = "left";
  const fonts = { true: "bold 10px sans-serif", false: "10px sans-serif" };
  const wide = (text, high = false) => {
    pen.font = fonts[high];
    return pen.measureText(text).width;
  };
  const named = ranges.map((range) => ({ ...range, name: range.name.replace(" to ", "–") }));
  const title = say("loss at sigma");
  const length = named.reduce((sum, { name, high }) => sum + wide(name, high) + 20, wide(title) + 8) - 9;
  // In a narrow node, or in a longer language, the legend begins further to the left.
  let place = Math.max(2, Math.min(PAD.left, width - length));
  pen.globalAlpha = 1;
  pen.fillStyle = ink;
  const ahead = wide(title) + 8; // sets the title's font, too
  pen.fillText(title, place, 12);
  place += ahead;
  for (const range of named) {
    const colour = colours[range.high].shift();
    line(pen, steps, range, colour, x, y);
    pen.globalAlpha = 1;
    // The colour beside the name: not every one can be read on a light and on a dark node.
    pen.fillStyle = colour;
    pen.fillRect(place, 5, 8, 7);
    pen.fillStyle = ink;
    const space = wide(range.name, range.high);
    pen.fillText(range.name, place + 11, 12);
    place += space + 20;
  }
}

const level = (value) => Math.log10(Math.max(value, LEAST));

function line(pen, steps, range, colour, x, y) {
  pen.strokeStyle = colour;
  pen.lineWidth = range.high ? 2 : 1;
  pen.globalAlpha = range.high ? 1 : 0.7;
  pen.beginPath();
  let open = false;
  range.values.forEach((value, i) => {
    // Early windows are short and miss ranges by chance, so that a gap is crossed.
    if (value === null) return;
    const at = [x(steps[i]), y(level(value))];
    open ? pen.lineTo(...at) : pen.moveTo(...at);
    open = true;
  });
  pen.stroke();
}

function axes(pen, ink, width, { first, last, low, high }, x, y) {
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = 1;
  pen.textAlign = "right";
  const values = [0, 1, 2, 3].map((i) => low + (i / 3) * (high - low));
  labels(values.map((value) => 10 ** value)).forEach((label, i) => {
    pen.globalAlpha = 0.2;
    pen.beginPath();
    pen.moveTo(PAD.left, y(values[i]));
    pen.lineTo(width - PAD.right, y(values[i]));
    pen.stroke();
    pen.globalAlpha = 0.8;
    pen.fillText(label, PAD.left - 4, y(values[i]) + 3);
  });
  for (const step of stepTicks(first, last)) {
    pen.textAlign = step === first ? "left" : step === last ? "right" : "center";
    pen.fillText(step, x(step), CHART_HEIGHT - 5);
  }
}

const runOf = (node) => node?.widgets?.find((widget) => widget.name === "run_name")?.value?.trim();

// The name is compared too, for another workflow's node may have the same id.
function showState(state) {
  const node = nodeOf(state.node);
  if (kindOf(node) === NODE && runOf(node) === state.run) show(node, state);
}

// What the server knows of a node's run, or its folder where the server was started since.
async function showSaved(node) {
  const run = runOf(node);
  if (!run) return;
  const answer = await api.fetchApi(`/l2p/training?${new URLSearchParams({ run })}`);
  const state = answer.ok ? await answer.json() : null;
  if (state?.run === runOf(node)) show(node, state);
}

function trainNodes(graph) {
  return (graph?.nodes ?? []).flatMap((node) =>
    kindOf(node) === NODE ? [node] : node.subgraph ? trainNodes(node.subgraph) : [],
  );
}

app.registerExtension({
  name: "L2P.Training",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => showState(detail));
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      view(this);
      const name = this.widgets?.find((widget) => widget.name === "run_name");
      const { callback } = name ?? {};
      if (name) {
        name.callback = (...given) => {
          callback?.apply(name, given);
          showSaved(this);
        };
      }
    };
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const state = message?.l2p_training?.[0];
      if (state) show(this, state);
    };
  },
  afterConfigureGraph() {
    trainNodes(app.rootGraph ?? app.graph).forEach(showSaved);
  },
});
