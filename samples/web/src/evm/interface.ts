/** Checks that the parts of a bundle belong together. Hashes only prove that each file is intact. */

import type { Bundle } from "./bundle";
import { BundleError } from "./errors";
import { specText, type TensorSpec } from "./tensor";

/** Check the model's inputs and outputs against the manifest and the labels. Throws BundleError. */
export function checkInterface(
  bundle: Bundle,
  labels: readonly string[],
  { inputs, outputs }: { inputs: readonly TensorSpec[]; outputs: readonly TensorSpec[] },
): void {
  const { manifest } = bundle;
  const [have, want] = [[...inputs, ...outputs], [...manifest.inputs, ...manifest.outputs]];
  const all = have.map(specText).join(", ");
  if (have.length !== want.length || !have.every((spec, i) => alike(spec, want[i]!)))
    throw unlike(bundle, all, `the manifest says ${want.map(specText).join(", ")}`);
  if (inputs.length !== 1) throw unlike(bundle, all, "the model of a bundle must have one input");
  checkOutputs(bundle, labels, outputs);
}

/** Check the outputs of a classifier, a detector or a segmenter; other outputs need no check. Throws BundleError. */
export function checkOutputs(bundle: Bundle, labels: readonly string[], outputs: readonly TensorSpec[]): void {
  const { head, classifies } = bundle.manifest;
  if (head === "detections") return checkDetections(bundle, outputs);
  if (head === "label_map") return checkLabelMap(bundle, outputs);
  if (!classifies) return;
  const scores = outputs.find(({ name }) => name === head);
  if (!scores) throw unlike(bundle, outputs.map(specText).join(", "), `a classifier must have the output ${head}`);
  checkScores(bundle, labels, scores);
}

const DETECTIONS = { boxes: ["float32", 3], scores: ["float32", 2], labels: ["int32", 2], count: ["int32", 1], masks: ["float32", 4] } as const;
const NAMES = ["boxes,labels,scores", "boxes,count,labels,scores", "boxes,count,labels,masks,scores"];

function checkDetections(bundle: Bundle, outputs: readonly TensorSpec[]): void {
  const names = outputs.map(({ name }) => name).sort().join();
  if (!NAMES.includes(names)) {
    const want = "a detector must have boxes, scores, labels and, after its NMS, count, with or without masks";
    throw unlike(bundle, outputs.map(specText).join(", "), want);
  }
  for (const spec of outputs) {
    const [dtype, rank] = DETECTIONS[spec.name as keyof typeof DETECTIONS];
    const { shape } = spec;
    if (spec.dtype !== dtype || shape.length !== rank || shape.includes(0) || (spec.name === "boxes" && shape[2] !== 4))
      throw unlike(bundle, specText(spec), `a detector must have ${spec.name} of ${dtype} with ${rank} axes`);
  }
  const rows = new Set(outputs.filter(({ name }) => name !== "count").map(({ shape }) => shape[1]).filter((side) => side !== null));
  if (rows.size > 1)
    throw unlike(bundle, outputs.map(specText).join(", "), "a detector must have as many scores and labels as boxes");
}

function checkLabelMap(bundle: Bundle, outputs: readonly TensorSpec[]): void {
  const { height, width } = bundle.manifest.preprocessing;
  const [map] = outputs;
  const typed = map && (map.dtype === "uint8" || map.dtype === "int32");
  if (outputs.length !== 1 || !typed || !alike(map, { ...map, name: "label_map", shape: [null, height, width] }))
    throw unlike(bundle, outputs.map(specText).join(", "), `a segmenter must have label_map of uint8 or int32[batch, ${height}, ${width}]`);
}

/** Check the scores of a classifier: float32 rows, with as many columns as labels. Throws BundleError. */
function checkScores(bundle: Bundle, labels: readonly string[], scores: TensorSpec): void {
  const { dtype, shape } = scores;
  if (dtype !== "float32" || shape.length !== 2 || shape.includes(0))
    throw unlike(bundle, specText(scores), "a classifier must give rows of float32 scores");
  if (labels.length > 0 && shape[1] !== null && shape[1] !== labels.length)
    throw unlike(bundle, `${shape[1]} classes`, `labels.txt has ${labels.length}`);
}

/** Test whether two specs agree. An unknown size agrees with any size. */
function alike(have: TensorSpec, want: TensorSpec): boolean {
  const same = (a: number | null, b: number | null): boolean => a === null || b === null || a === b;
  if (have.name !== want.name || have.dtype !== want.dtype || have.shape.length !== want.shape.length) return false;
  return have.shape.every((side, i) => same(side, want.shape[i]!));
}

function unlike(bundle: Bundle, have: string, want: string): BundleError {
  const fault = { code: "model.interface", where: bundle.manifest.artifact };
  return new BundleError(`bundle ${bundle.name}: ${fault.where} has ${have}; ${want}`, "export it again", fault);
}
