/** Self-test of a bundle: pixels of an image, outputs of the model, and each scan alone against a float64 reference. */

import type { Bundle } from "./bundle";
import { decode } from "./decode";
import { align } from "./detections";
import { BundleError, reason } from "./errors";
import { parseSafetensors } from "./safetensors";
import { ssmError } from "./scan";
import { Runtime, runBatched, type RunOptions } from "./runtime";
import type { Tensor, Tensors } from "./tensor";

const [PROBES, SCANS] = ["probes.safetensors", "scans.safetensors"];
const AXES = { u: "bKLD", delta: "bKLD", A: "KDN", B: "bKLN", C: "bKLN", skip: "KD", bias: "KD" };

/** Result of one check of a self-test. The check has passed if error <= limit. */
export interface Check {
  readonly name: string;
  readonly error: number;
  readonly limit: number;
  readonly ok: boolean;
}

/** Run the self-test of a bundle. Throws BundleError if the bundle has no readable self-test. */
export async function selftest(bundle: Bundle, runtime: Runtime, options: RunOptions): Promise<Check[]> {
  const { manifest } = bundle;
  const [probes, scans] = [await tensors(bundle, PROBES), bySite(bundle, await tensors(bundle, SCANS))];
  const checks = manifest.preprocessing.readsImages ? [await imageCheck(bundle, probes)] : [];
  const images = probes[manifest.input];
  if (!images || images.shape.length === 0 || images.data.length === 0) throw damaged(bundle, PROBES, `has no ${manifest.input}`);
  const outputs = await runBatched(runtime, manifest.batch, images);
  checks.push(...outputChecks(bundle, outputs, probes), ...(await scanChecks(bundle, scans, options)));
  return checks;
}

/** Compare outputs with the expected ones: detections in pairs, pixels of label maps by equality, else value by value. */
function outputChecks(bundle: Bundle, outputs: Tensors, probes: Tensors): Check[] {
  const { manifest } = bundle;
  const wanted = Object.fromEntries(Object.entries(outputs).map(([name, have]) => [name, like(bundle, probes, name, have)]));
  if (manifest.head === "detections") {
    const tolerance = Math.min(...Object.keys(outputs).map((name) => manifest.outputLimit(name)));
    const { share, pairs } = align(wanted, outputs, tolerance);
    const part = ({ data, shape }: Tensor, row: number): ArrayLike<number> => {
      const size = data.length / (shape[0]! * shape[1]!);
      return data.subarray(row * size, (row + 1) * size);
    };
    const rest = Object.entries(outputs)
      .filter(([name]) => name !== "count")
      .map(([name, have]) => {
        const errors = pairs.map(([row, other]) => distance(part(have, other), part(wanted[name]!, row)));
        return check(name, Math.max(0, ...errors), manifest.outputLimit(name));
      });
    return [check("not in common", 1 - share, manifest.apartLimit), ...rest];
  }
  return Object.entries(outputs).flatMap(([name, { data }]) => {
    const want = wanted[name]!.data;
    if (manifest.head !== "label_map") return [check(name, distance(data, want), manifest.outputLimit(name))];
    let differ = 0;
    for (let i = 0; i < data.length; i++) differ += Number(data[i] !== want[i]);
    const share = check("not in common", differ / data.length, manifest.apartLimit);
    return [share, check(name, 0, manifest.outputLimit(name))]; // the other pixels are equal
  });
}

async function imageCheck(bundle: Bundle, probes: Tensors): Promise<Check> {
  const { preprocessing, pixelLimit } = bundle.manifest;
  const { height, width, channels } = preprocessing;
  const rgbImage = await decode(new Blob([await bundle.read("selftest/picture.png")]), "selftest/picture.png");
  const { data } = like(bundle, probes, "picture.pixels", { dtype: "uint8", shape: [height, width, channels] });
  return check("preprocessing (of 255)", distance(preprocessing.pixels(rgbImage), data), pixelLimit);
}

async function scanChecks(bundle: Bundle, scans: Map<string, Tensors>, options: RunOptions): Promise<Check[]> {
  if (scans.size === 0) return [];
  const runtime = await Runtime.open(await bundle.read("selftest/scan.onnx"), options);
  const checks: Check[] = [];
  try {
    for (const [name, scan] of scans) {
      const { y } = await runtime.run(scan);
      if (y?.shape.join() !== scan["u"]!.shape.join()) throw damaged(bundle, "scan.onnx", "gives no output y of the shape of u");
      const { error, limit } = ssmError(y, scan);
      checks.push(check(`scan ${name}`, error, bundle.manifest.scanLimit(name) ?? limit));
    }
  } finally {
    await runtime.close();
  }
  return checks;
}

/** Group tensors named `<module path>:<tensor>` by module path. The expected y is left out: the self-test computes it again. */
function bySite(bundle: Bundle, tensors: Tensors): Map<string, Tensors> {
  const scans = new Map<string, Tensors>();
  for (const key of Object.keys(tensors).sort()) {
    const [name = "", tensor = ""] = key.split(":");
    if (tensor !== "y") scans.set(name, { ...scans.get(name), [tensor]: tensors[key]! });
  }
  for (const [name, scan] of scans)
    if (!isScan(scan)) throw damaged(bundle, SCANS, `has no scan in the tensors of ${JSON.stringify(name)}`);
  return scans;
}

/** Test whether the tensors have the names, ranks and sizes of one scan. */
function isScan(scan: Tensors): boolean {
  if (Object.keys(scan).sort().join() !== Object.keys(AXES).sort().join()) return false;
  const sizes = new Map<string, number>();
  return Object.entries(AXES).every(([name, axes]) => {
    const { dtype, shape } = scan[name]!;
    [...axes].forEach((axis, i) => sizes.has(axis) || sizes.set(axis, shape[i] ?? 0));
    return dtype === "float32" && shape.join() === [...axes].map((axis) => sizes.get(axis) || "none").join();
  });
}

async function tensors(bundle: Bundle, name: string): Promise<Tensors> {
  const file = await bundle.read(`selftest/${name}`);
  try {
    return parseSafetensors(file);
  } catch (error) {
    throw damaged(bundle, name, `cannot be read: ${reason(error)}`, error);
  }
}

/** Return the tensor `name`. Throws BundleError unless it has this dtype and shape. */
function like(bundle: Bundle, probes: Tensors, name: string, { dtype, shape }: Pick<Tensor, "dtype" | "shape">): Tensor {
  const found = probes[name];
  if (found?.dtype !== dtype || found.shape.join() !== shape.join())
    throw damaged(bundle, PROBES, `has no ${name} of ${dtype}[${shape.join(", ")}]`);
  return found;
}

function damaged(bundle: Bundle, file: string, why: string, cause?: unknown): BundleError {
  const fault = { code: "selftest.damaged", where: `selftest/${file}`, cause };
  return new BundleError(`bundle ${bundle.name} has no readable self-test: ${fault.where} ${why}`, "export it again", fault);
}

function check(name: string, error: number, limit: number): Check {
  return { name, error, limit, ok: error <= limit };
}

/** Return the largest difference; infinite for NaN and Inf. */
function distance(have: ArrayLike<number>, want: ArrayLike<number>): number {
  let most = 0;
  for (let i = 0; i < have.length; i++) most = Math.max(most, Number.isFinite(have[i]) ? Math.abs(have[i]! - want[i]!) : Infinity);
  return most;
}
