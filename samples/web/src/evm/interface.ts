/** Whether the parts of a bundle belong together, which their hashes do not say. Throws BundleError. */

import type { Bundle } from "./bundle";
import { BundleError } from "./errors";
import { specText, type TensorSpec } from "./tensor";

/** The artifact against its manifest and its labels. */
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
  if (inputs.length !== 1) throw unlike(bundle, all, "a bundle's model has one input");
  if (!manifest.classifies) return;
  const scores = outputs.find(({ name }) => name === manifest.head);
  if (!scores) throw unlike(bundle, all, `a classifier has ${manifest.head}`);
  checkScores(bundle, labels, scores);
}

/** What a classifier gives against its labels. */
export function checkScores(bundle: Bundle, labels: readonly string[], scores: TensorSpec): void {
  const { dtype, shape } = scores;
  if (dtype !== "float32" || shape.length !== 2 || shape.includes(0))
    throw unlike(bundle, specText(scores), "a classifier has rows of float32 scores");
  if (labels.length > 0 && shape[1] !== null && shape[1] !== labels.length)
    throw unlike(bundle, `${shape[1]} classes`, `labels.txt has ${labels.length}`);
}

/** Whether they are the same, but for sizes that one of them does not tell. */
function alike(have: TensorSpec, want: TensorSpec): boolean {
  const same = (a: number | null, b: number | null): boolean => a === null || b === null || a === b;
  if (have.name !== want.name || have.dtype !== want.dtype || have.shape.length !== want.shape.length) return false;
  return have.shape.every((side, i) => same(side, want.shape[i]!));
}

function unlike(bundle: Bundle, have: string, want: string): BundleError {
  const fault = { code: "model.interface", where: bundle.manifest.artifact };
  return new BundleError(`bundle ${bundle.name}: ${fault.where} has ${have}; ${want}`, "export it again", fault);
}
