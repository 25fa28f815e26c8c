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
  if (!manifest.classifies) return;
  const scores = outputs.find(({ name }) => name === manifest.head);
  if (!scores) throw unlike(bundle, all, `a classifier must have the output ${manifest.head}`);
  checkScores(bundle, labels, scores);
}

/** Check the scores of a classifier: float32 rows, with as many columns as labels. Throws BundleError. */
export function checkScores(bundle: Bundle, labels: readonly string[], scores: TensorSpec): void {
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
