// Our templates in the order of their numbers: the host lists them as their folder does, on some disks in no order.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { PACK } from "./graph.js";

const inOrder = (one, other) => one.localeCompare(other, "en", { numeric: true });

app.registerExtension({
  name: "L2P.Templates",
  init() {
    const { getWorkflowTemplates } = api;
    if (!getWorkflowTemplates) return;
    api.getWorkflowTemplates = async function (...given) {
      const templates = await getWorkflowTemplates.apply(this, given);
      templates?.[PACK]?.sort?.(inOrder);
      return templates;
    };
  },
});
