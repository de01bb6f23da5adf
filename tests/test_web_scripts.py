"""The frontend extensions in `web/`, run by Node.js on stand-ins for the frontend's modules."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).resolve().parents[1] / "web"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js")

STAND_INS = {
    "api.js": """
        export const api = {
          handlers: {},
          addEventListener(name, handler) { (this.handlers[name] ??= []).push(handler); },
          send(name, detail) { this.handlers[name]?.forEach((handler) => handler({ detail })); },
          async getWorkflowTemplates() {
            return { pack: ["10 ten", "6 six", "1 one", "2 two"], other: ["b", "a"] };
          },
        };
    """,
    "app.js": """
        export const app = {
          calls: [], toasts: [],
          registerExtension(extension) {
            this.extension = extension; extension.init?.(); extension.setup?.();
          },
          canvas: { ds: { scale: 1, offset: [0, 0] }, canvas: { clientWidth: 1000, clientHeight: 800 } },
          graph: { nodes: new Map(), getNodeById(id) { return this.nodes.get(id); }, setDirtyCanvas() {} },
          reloadNodeDefs() { this.calls.push("reloadNodeDefs"); },
          refreshComboInNodes() { this.calls.push("refreshComboInNodes"); },
        };
        app.extensionManager = { toast: {
          add(message) { app.toasts.push(message); },
          remove(message) { app.toasts = app.toasts.filter((other) => other !== message); },
        } };
        globalThis.document = { querySelector: () => null, createElement: () => ({
          style: {}, append() {}, setAttribute() {},
          replaceChildren(...parts) { this.textContent = parts.map((part) => part.textContent).join("\\n"); },
        }) };
        export function node(id, type, pos = [0, 0]) {
          const made = {
            type, title: type, pos, size: [300, 100], widgets: [], graph: app.graph,
            addDOMWidget(name) { this.widgets.push({ name }); return this.widgets.at(-1); },
            removeWidget(widget) { this.widgets = this.widgets.filter((other) => other !== widget); },
            setSize(size) { this.size = [...size]; },
            computeSize() { return [200, 80 + (this.l2pSaid?.height ?? 0)]; },
          };
          app.graph.nodes.set(id, made);
          return made;
        }
    """,
}
FRONTEND = 'import { app, node } from "./scripts/app.js"; import { api } from "./scripts/api.js";'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The addresses of a frontend with the pack's extensions."""
    root = tmp_path_factory.mktemp("site")
    (root / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    shutil.copytree(WEB, root / "extensions" / "pack")
    (root / "scripts").mkdir()
    for name, text in STAND_INS.items():
        (root / "scripts" / name).write_text(text, encoding="utf-8")
    return root


def run(site: Path, script: str) -> Any:
    """What a script assigns to `result`."""
    (site / "test.js").write_text(f"let result; {script}; console.log(JSON.stringify(result));", encoding="utf-8")
    assert NODE is not None
    done = subprocess.run([NODE, site / "test.js"], capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_axes_say_nothing_twice(site: Path) -> None:
    axis = 'import { labels, stepTicks } from "./extensions/pack/axis.js";'
    ticks = run(site, f"{axis} result = [[1, 2], [1, 3], [1, 400], [7, 8]].map((ends) => stepTicks(...ends))")
    assert ticks == [[1, 2], [1, 2, 3], [1, 134, 267, 400], [7, 8]]
    assert run(site, f"{axis} result = labels([0.5, 1, 20])") == ["0.50", "1.0", "20"]
    assert run(site, f"{axis} result = labels([1.001, 1.002, 1.003])") == ["1.001", "1.002", "1.003"]
    assert len(run(site, f"{axis} result = labels([1, 1])")) == 2


def test_templates_are_listed_by_their_numbers(site: Path) -> None:
    script = 'import "./extensions/pack/templates.js"; result = await api.getWorkflowTemplates()'
    listed = run(site, FRONTEND + script)
    assert listed == {"pack": ["1 one", "2 two", "6 six", "10 ten"], "other": ["b", "a"]}


def test_lists_are_read_again_without_messages(site: Path) -> None:
    script = """
        import "./extensions/pack/files.js";
        node(1, "L2PConvert"); node(2, "KSampler");
        const later = () => new Promise((done) => setTimeout(done, 400));
        app.graph.nodes.get(1).outputs = [{ type: "COMBO" }, { type: "STRING" }];
        node(3, "L2PSaveTIFF").outputs = [{ type: "IMAGE" }]; node(4, "Other").outputs = [{ type: "COMBO" }];
        for (const id of "234") api.send("executed", { node: id });
        await later(); result = [[...app.calls]];
        api.send("executed", { node: "1" }); await later(); result.push([...app.calls]);
        app.reloadNodeDefs = undefined;
        api.send("executed", { node: "1" }); await later(); result.push(app.calls)
    """
    before, after, old = run(site, FRONTEND + script)
    assert before == [] and after == ["reloadNodeDefs"] and old == ["reloadNodeDefs", "refreshComboInNodes"]


def test_convert_opens_as_it_was_saved_then_and_now(site: Path) -> None:
    script = """
        import "./extensions/pack/files.js";
        class Type { configure(saved) { this.values = saved.widgets_values; } }
        app.extension.beforeRegisterNodeDef(Type, { name: "L2PConvert" });
        const opened = (values) => {
          const made = new Type();
          made.configure({ widgets_values: values });
          return made.values;
        };
        result = [
          opened(["source", "1k", 0, "randomize", "made", false]),
          opened(["source", "1k", 0, "made", false]), opened(["source", "1k", 0, "fixed", false, "none"]),
        ];
    """
    then, between, now = run(site, FRONTEND + script)
    assert then == between == ["source", "1k", 0, "made", False]
    assert now == ["source", "1k", 0, "fixed", False, "none"], "a file may be named as a control was"


def test_a_new_node_is_as_wide_as_its_values(site: Path) -> None:
    script = """
        import "./extensions/pack/widths.js";
        const width = (type, value) => {
          const made = node(1, type);
          made.widgets = [{ name: "file", value }, { name: "weight_dtype", value: "default" }];
          app.extension.nodeCreated(made);
          return made.size[0];
        };
        result = [width("L2PLoader", "a"), width("L2PLoader", "a".repeat(32)), width("L2PLoader", "a".repeat(900)),
                  width("KSampler", "a".repeat(900))];
        globalThis.LiteGraph = { vueNodesMode: true }; // whose labels have a column of their own
        result.push(width("L2PLoader", "a".repeat(28)))
    """
    assert run(site, FRONTEND + script) == [300, 332, 420, 300, 360]


def test_a_report_is_read_in_any_node_of_ours(site: Path) -> None:
    script = """
        import "./extensions/pack/report.js";
        result = ["L2PSaveQuantised", "ShowText"].map((type) => {
          function Kind() {}
          app.extension.beforeRegisterNodeDef(Kind, { name: type });
          const made = node(1, type);
          Kind.prototype.onExecuted?.call(made, { text: ["copied 3"] });
          const shown = made.l2pReport;
          return [made.widgets.map(({ name, serialize }) => [name, serialize]), shown?.textContent, shown?.style.flex];
        })
    """
    ours, other = run(site, FRONTEND + script)
    assert ours == [[["report", False]], "copied 3", "1 0 120px"], "its room, in Nodes 2.0 too"
    assert other[0] == []


def test_the_last_preview_makes_room_for_the_pairs(site: Path) -> None:
    """As the classic canvas shows previews: in a widget of the host's, added when the node is drawn."""
    script = """
        import "./extensions/pack/compare.js";
        const LIVE = "$$canvas-image-preview";
        function Kind() {}
        Kind.prototype.onDrawBackground = function () {
          if (this.imgs && !this.widgets.some(({ name }) => name === LIVE)) this.widgets.push({ name: LIVE });
          this.size = [300, Math.max(this.size[1], 80 + 220 * this.widgets.length)];
        };
        app.extension.beforeRegisterNodeDef(Kind, { name: "L2PCompare" });
        const made = node(1, "L2PCompare");
        const { onNodeCreated, onExecutionStart, onDrawBackground, onExecuted } = Kind.prototype;
        const draw = () => {
          onDrawBackground.call(made);
          return [made.widgets.map(({ name }) => name), made.size[1], Boolean(made.imgs)];
        };
        onNodeCreated.call(made);
        made.size = [300, 500];
        const file = (name) => ({ filename: name, type: "temp", subfolder: "" });
        const pair = { source: file("a"), pixel: file("b"), difference: file("c"), prompt: "p", seed: 1 };
        globalThis.URLSearchParams = class {};
        api.apiURL = () => "";
        result = [];
        for (const _ of [1, 2]) {
          onExecutionStart.call(made);
          made.imgs = [1]; result.push(draw());
          onExecuted.call(made, { l2p_pairs: [pair] });
          made.imgs = [2]; result.push(draw()); // decoded late
        }
    """
    running, done, *again = run(site, FRONTEND + script)
    assert running == [["pairs", "$$canvas-image-preview"], 520, True]
    assert done == [["pairs"], 500, False] and again == [running, done]


def test_what_a_node_showed_is_there_when_its_tab_is_opened_again(site: Path) -> None:
    script = """
        import "./extensions/pack/again.js";
        const seen = [];
        const make = (id, type) => Object.assign(node(id, type), { id, onExecuted: (shown) => seen.push([id, shown]) });
        app.rootGraph = { nodes: [make(1, "L2PCompare"), make(2, "KSampler"), make(3, "L2PTrain")] };
        app.rootGraph.subgraphs = new Map([["f0", { nodes: [make(5, "L2PEvaluate")] }]]);
        app.extension.afterConfigureGraph();
        app.nodeOutputs = { 1: "pairs", 2: "images", "f0:5": "report" };
        await new Promise((done) => setTimeout(done, 400));
        result = seen;
    """
    assert run(site, FRONTEND + script) == [[1, "pairs"], [5, "report"]]


STATE = """
    const state = () => [
      app.toasts.map((message) => message.detail),
      [...app.graph.nodes.values()].map(({ l2pSaid, widgets, size }) =>
        [l2pSaid?.text.textContent ?? null, widgets.length, size]),
    ];
    const fail = (id, type, message) => api.send("execution_error",
      { node_id: id, node_type: type, exception_message: message, traceback: ["custom_nodes/pack/nodes/x.py"] });
"""


def test_an_error_is_read_in_its_node_until_the_next_run(site: Path) -> None:
    """In whichever node; a node that is not ours keeps nothing of it."""
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        node(1, "L2PConvert"); node(2, "CLIPTextEncode");
        fail("1", "L2PConvert", "The file is taken."); fail("2", "CLIPTextEncode", "Unknown word.");
        result = [state()]; api.send("execution_start", {{}}); result.push(state())
    """
    (toasts, nodes), (_, after) = run(site, FRONTEND + script)
    assert toasts == [], "the node is in sight"
    assert [text for text, *_ in nodes] == ["The file is taken.", "Unknown word."]
    assert after == [["", 1, [300, 100]], [None, 0, [300, 100]]]


def test_the_error_of_a_workflow_that_was_closed_touches_no_node_of_the_next(site: Path) -> None:
    """Nodes 2.0 keeps sizes by ids, so that the node of before would give its own to the one with its id now."""
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        const sizes = {{}};
        const make = (type) => Object.assign(node(1, type), {{ setSize(size) {{ sizes[1] = [type, ...size]; }} }});
        make("L2PConvert"); fail("1", "L2PConvert", "The file is taken.");
        app.graph.nodes.clear(); make("L2PDemo").setSize([220, 70]); api.send("execution_start", {{}});
        result = sizes[1];
    """
    assert run(site, FRONTEND + script) == ["L2PDemo", 220, 70]


def test_what_is_wrong_with_an_l2p_file_is_read_at_the_hosts_own_loader(site: Path) -> None:
    """The server is asked about the file of a loader that failed in the host's own words, and about nothing else."""
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        const asked = [];
        let answer = "It is incomplete.";
        api.fetchApi = async (address) => (asked.push(address), {{ ok: true, text: async () => answer }});
        const failed = async (type, inputs, kind = "KeyError") => {{
          app.graph.nodes.clear(); node(1, type);
          api.send("execution_error", {{ node_id: "1", node_type: type, exception_message: "'to_k'",
                                        exception_type: kind, current_inputs: inputs, traceback: [] }});
          if (kind === "gone") api.send("execution_start", {{}});
          await new Promise((done) => setTimeout(done));
          const text = state()[1][0][0]; api.send("execution_start", {{}}); return text;
        }};
        result = [
          await failed("UNETLoader", {{ unet_name: ["a b.safetensors"] }}),
          await failed("CheckpointLoaderSimple", {{ ckpt_name: ["c.safetensors"] }}),
          await failed("CheckpointLoaderSimple", {{ ckpt_name: ["c.safetensors"] }}, "gone"),
          await failed("UNETLoader", {{ unet_name: ["a.safetensors"] }}, "torch.OutOfMemoryError"),
          await failed("VAELoader", {{ vae_name: ["v.safetensors"] }}),
        ];
        answer = "";
        result.push(await failed("UNETLoader", {{ unet_name: ["other.safetensors"] }}), asked);
    """
    *texts, asked = run(site, FRONTEND + script)
    assert texts == ["It is incomplete.", "It is incomplete.", None, None, None, None]
    assert asked == [
        "/l2p/refused?folder=diffusion_models&name=a+b.safetensors",
        *["/l2p/refused?folder=checkpoints&name=c.safetensors"] * 2,
        "/l2p/refused?folder=diffusion_models&name=other.safetensors",
    ]


def test_progress_leaves_a_warning_where_it_is(site: Path) -> None:
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        node(1, "L2PCompare");
        const tell = (kind, text) => api.send("l2p.said", {{ node: "1", kind, text }});
        tell("said", "Much larger."); tell("progress", "1 of 2"); tell("progress", "2 pairs");
        result = [state()[1][0][0]]; tell("said", ""); result.push(state()[1][0][0])
    """
    assert run(site, FRONTEND + script) == ["Much larger.\n2 pairs", "2 pairs"]


def test_a_warning_of_a_sampling_is_told_beside_nodes_that_do_not_say_it(site: Path) -> None:
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        node(1, "KSampler"); node(2, "L2PPixelSampler");
        const send = (id, kind, text) => api.send("l2p.said", {{ node: id, kind, text }});
        send("1", "warning", "It makes noise."); send("1", "warning", "It makes noise.");
        send("2", "said", "It makes noise. Too large."); send("2", "warning", "It makes noise.");
        result = [state()[0]]; api.send("execution_start", {{}}); result.push(state()[0])
    """
    assert run(site, FRONTEND + script) == [["It makes noise."], []]


@pytest.mark.parametrize(("left", "scale"), [(5000, 1), (0, 0.2)])
def test_a_node_that_cannot_be_read_is_spoken_for_until_the_next_run(site: Path, left: int, scale: float) -> None:
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        app.canvas.ds.scale = {scale};
        node(1, "L2PConvert", [{left}, 0]);
        fail("1", "L2PConvert", "The file is taken.");
        result = [state()[0]]; api.send("execution_start", {{}}); result.push(state()[0])
    """
    assert run(site, FRONTEND + script) == [["The file is taken."], []]


def test_a_failure_that_the_run_shows_is_not_repeated(site: Path) -> None:
    script = f"""
        import "./extensions/pack/said.js"; {STATE}
        node(1, "L2PTrain").l2pTraining = {{ state: {{ status: "failed", text: "It diverged." }} }};
        fail("1", "L2PTrain", "It diverged."); result = [state()];
        fail("1", "L2PTrain", "No such data set."); result.push(state())
    """
    (_, ((text, *_),)), (_, ((other, *_),)) = run(site, FRONTEND + script)
    assert text is None and other == "No such data set."


@pytest.mark.parametrize(
    ("heading", "kind", "closed"),
    [
        ("L2PConvert failed", "ValueError", True),
        ("2 errors found", "ValueError", False),
        ("L2PConvert failed", "torch.OutOfMemoryError", False),
    ],
)
def test_the_hosts_general_hint_makes_room_for_the_sentence(site: Path, heading: str, kind: str, closed: bool) -> None:
    """By its own button, and only where it is about the node that has the sentence."""
    script = f"""
        import "./extensions/pack/said.js";
        let hint = null, closed = false;
        const button = {{ click: () => (closed = true) }};
        document.querySelector = () => hint;
        node(1, "L2PConvert");
        api.send("execution_error", {{ node_id: "1", node_type: "L2PConvert", exception_message: "The file is taken.",
                                       exception_type: "{kind}" }});
        hint = {{ textContent: "{heading}", querySelector: () => button }}; // a moment later
        await new Promise((done) => setTimeout(done, 120));
        result = closed
    """
    assert run(site, FRONTEND + script) is closed
