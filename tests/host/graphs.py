"""Workflows in API form, built of the nodes a user would place."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
CAPTION = "a red circle in the centre on a white background"


def demo(**sampler: Any) -> Json:
    """Text to image with the bundled tiny model: node 4 samples, node 5 saves."""
    return {
        "1": {"class_type": "L2PDemo", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": CAPTION}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {
            "class_type": "L2PPixelSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "width": 64,
                "height": 64,
                "batch_size": 1,
                "seed": 1,
                "steps": -1,
                "cfg": -1,
                "sampler_name": "euler",
                "scheduler": "L2P (published)",
                "denoise": 1.0,
                **sampler,
            },
        },
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "pixel_sampler"}},
    }


def ksampler(steps: int = 4) -> Json:
    """The same with KSampler between Empty Pixels and Pixels to Image: node 8 saves."""
    graph = demo()
    del graph["4"], graph["5"]
    return graph | {
        "4": {"class_type": "L2PEmptyPixels", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 2.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "7": {"class_type": "L2PPixelsToImage", "inputs": {"pixels": ["6", 0]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "ksampler"}},
    }


def hybrid(dual: bool = False, **sampler: Any) -> Json:
    """Hybrid Sampler with the bundled models, loaded one by one or as a pair: node 6 saves."""
    pair = {"source": TINY, "trained": "tiny delta (comes with L2P)", "weight_dtype": "default", "head_tile": "auto"}
    loader = {"class_type": "L2PDualLoader", "inputs": pair} if dual else {"class_type": "L2PDemo", "inputs": {}}
    return {
        "1": {"class_type": "L2PDemoSource", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": CAPTION}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": loader,
        "5": {
            "class_type": "L2PHybridSampler",
            "inputs": {
                "task": "fast",
                "positive": ["2", 0],
                "negative": ["3", 0],
                "width": 0,
                "height": 0,
                "seed": 1,
                "steps": 6,
                "cfg": 2.0,
                "switch": -1.0,
                "shift": 1.0,
                "sampler_name": "euler",
                "pixel_model": ["4", 1 if dual else 0],
                "latent_model": ["4", 0] if dual else ["1", 0],
                "vae": ["1", 2],
                "latent_steps": 6,
                "latent_cfg": 2.0,
                **sampler,
            },
        },
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "hybrid"}},
    }


def synthesize(**inputs: Any) -> Json:
    """Synthesize L2P Dataset with the bundled tiny source: node 2."""
    settings = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "dataset": "made",
        "prompts": CAPTION,
        "prompt_file": "none",
        "images_per_prompt": 2,
        "first_image": 0,
        "width": 64,
        "height": 64,
        "steps": 4,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "negative": "",
        "batch_size": 1,
    }
    node = {"class_type": "L2PSynthesizeDataset", "inputs": settings | inputs}
    return {"1": {"class_type": "L2PDemoSource", "inputs": {}}, "2": node}


def loader(file: str, delta: str = "none") -> Json:
    """L2P Loader, with something that makes it run."""
    inputs = {"file": file, "delta": delta, "weight_dtype": "default", "head_tile": "auto"}
    return {
        "1": {"class_type": "L2PLoader", "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def convert(source: str, filename: str = "converted", overwrite: bool = False, variant: str = "1k") -> Json:
    """Convert to L2P, its result wired into L2P Loader."""
    inputs = {"source": source, "variant": variant, "seed": 0, "filename": filename, "overwrite": overwrite}
    graph = loader("")
    graph["1"]["inputs"]["file"] = ["3", 0]
    return {**graph, "3": {"class_type": "L2PConvert", "inputs": inputs}}


TINY = "tiny source (comes with L2P)"


def train(run_name: str, **settings: Any) -> Json:
    """Train L2P on the tiny source in few, small steps: node 2 trains, 3 shows the montage, 4 the losses."""
    inputs = {
        "dataset": "shapes",
        "model": TINY,
        "clip": ["1", 1],
        "recipe": "auto",
        "run_name": run_name,
        "start": "go on where it stopped",
        "steps": 3,
        "learning_rate": 0.0,
        "image_size": 0,
        "batch_size": 2,
        "accumulate": 0,
        "policy": "as the recipe",
        "blocks": 1,
        "precision": "fp32",
        "memory": "as the recipe",
        "seed": 0,
        "prompts": "a red circle\na blue square",
        "filename": "",
        "overwrite": False,
        "save_every": 0,
        "montage_every": 0,
        "changes": "",
        **settings,
    }
    few = '[training]\ndecay = "constant"\nwarmup_steps = 0\n[watch]\nsteps = 1\n'
    return {
        "1": {"class_type": "L2PDemo", "inputs": {}},
        "2": {"class_type": "L2PTrain", "inputs": {**inputs, "changes": inputs["changes"] or few}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 2]}},
        "4": {"class_type": "LossGraphNode", "inputs": {"loss": ["2", 1], "filename_prefix": "loss"}},
    }


def from_workflow(workflow: Json, object_info: Json) -> Json:
    """A saved workflow in API form, as the frontend would send it (subgraphs aside)."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Json = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            continue  # Notes live in the frontend alone.
        defined = object_info[node["type"]]["input"]
        inputs: Json = {}
        saved = node["widgets_values"]
        if node["type"] == "L2PConvert" and isinstance(saved[-1], bool) and len(saved) == 6:
            saved = saved[:3] + saved[4:]  # as web/files.js does with workflows of 0.1
        values = iter(saved)
        for name, spec in (defined.get("required", {}) | defined.get("optional", {})).items():
            if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                options = spec[1] if len(spec) > 1 else {}  # The host's older nodes state a type alone.
                inputs[name] = next(values, options.get("default"))  # Saved before the node had this input.
                if name == "seed" and options.get("control_after_generate", True):
                    next(values)  # What becomes of the seed after a run.
        wired = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | wired}
    return prompt


def from_blueprint(subgraph: Json, object_info: Json, given: dict[str, list[Any]]) -> tuple[Json, list[Any]]:
    """A blueprint's inside in API form, and its output: `given` is what comes in, by type; the rest are its widgets."""
    inside = [link for link in subgraph["links"] if link["origin_id"] > 0 and link["target_id"] > 0]
    kept = {link["id"] for link in inside}
    links = [[link["id"], link["origin_id"], link["origin_slot"], None, None, None] for link in inside]
    nodes = [
        node | {"inputs": [slot | {"link": slot["link"] if slot["link"] in kept else None} for slot in node["inputs"]]}
        for node in subgraph["nodes"]
    ]
    prompt = from_workflow({"nodes": nodes, "links": links}, object_info)
    by_id = {node["id"]: node for node in subgraph["nodes"]}
    output: list[Any] = []
    for link in subgraph["links"]:
        if link["origin_id"] < 0 and link["type"] in given:
            name = by_id[link["target_id"]]["inputs"][link["target_slot"]]["name"]
            prompt[str(link["target_id"])]["inputs"][name] = given[link["type"]]
        if link["target_id"] < 0:
            output = [str(link["origin_id"]), link["origin_slot"]]
    return prompt, output
