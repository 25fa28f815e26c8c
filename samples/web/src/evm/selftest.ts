/** The self-test in every bundle: a picture's pixels, the model's outputs, each scan alone against a float64 loop. */

import type { Bundle } from "./bundle";
import { decode } from "./decode";
import { BundleError, reason } from "./errors";
import { parseSafetensors } from "./safetensors";
import { ssmError } from "./scan";
import { Runtime, runBatched, type RunOptions } from "./runtime";
import type { Tensor, Tensors } from "./tensor";

/** One line of a self-test: error against limit. */
export interface Check {
  readonly name: string;
  readonly error: number;
  readonly limit: number;
  readonly ok: boolean;
}

/** Throws BundleError where the bundle has no self-test that can be read. */
export async function selftest(bundle: Bundle, runtime: Runtime, options: RunOptions): Promise<Check[]> {
  const { manifest } = bundle;
  const [probes, scans] = [await tensors(bundle, "probes"), await tensors(bundle, "scans")];
  const picture = await decode(new Blob([await bundle.read("selftest/picture.png")]), "selftest/picture.png");
  const pixels = manifest.preprocessing.pixels(picture);
  const checks = [check("preprocessing (of 255)", distance(pixels, expected(probes, "picture.pixels").data), 1)];
  const outputs = await runBatched(runtime, manifest.batch, expected(probes, manifest.input));
  for (const [name, have] of Object.entries(outputs)) {
    const want = expected(probes, name);
    const scale = Math.max(1, distance(want.data, new Float32Array(want.data.length)));
    checks.push(check(name, distance(have.data, want.data), manifest.selftestTolerance * scale));
  }
  return [...checks, ...(await scanChecks(bundle, scans, options))];
}

async function scanChecks(bundle: Bundle, tensors: Tensors, options: RunOptions): Promise<Check[]> {
  const scans = bySite(tensors);
  if (scans.size === 0) return [];
  const runtime = await Runtime.open(await bundle.read("selftest/scan.onnx"), options);
  const checks: Check[] = [];
  try {
    for (const [name, scan] of scans) {
      const { y } = await runtime.run(scan);
      const { error, limit } = ssmError(y!, scan);
      checks.push(check(`scan ${name}`, error, limit));
    }
  } finally {
    await runtime.close();
  }
  return checks;
}

/** `<module path>:<tensor>` -> module path -> what its scan reads. y, what it wrote at export, is left out. */
function bySite(tensors: Tensors): Map<string, Record<string, Tensor>> {
  const scans = new Map<string, Record<string, Tensor>>();
  for (const key of Object.keys(tensors).sort()) {
    const [name, tensor] = key.split(":") as [string, string];
    if (tensor !== "y") scans.set(name, { ...scans.get(name), [tensor]: tensors[key]! });
  }
  return scans;
}

async function tensors(bundle: Bundle, name: string): Promise<Tensors> {
  const file = await bundle.read(`selftest/${name}.safetensors`);
  try {
    return parseSafetensors(file);
  } catch (error) {
    throw new BundleError(`bundle ${bundle.name} has no readable self-test: ${reason(error)}`, "", { cause: error });
  }
}

function expected(probes: Tensors, name: string): Tensor {
  const tensor = probes[name];
  if (!tensor) throw new BundleError("the self-test does not fit the model: it has no " + name, "export the bundle again");
  return tensor;
}

function check(name: string, error: number, limit: number): Check {
  return { name, error, limit, ok: error <= limit };
}

/** Largest difference; infinite for NaN, Inf and another size. */
function distance(have: ArrayLike<number>, want: ArrayLike<number>): number {
  if (have.length !== want.length) return Infinity;
  let most = 0;
  for (let i = 0; i < have.length; i++) most = Math.max(most, Number.isFinite(have[i]) ? Math.abs(have[i]! - want[i]!) : Infinity);
  return most;
}
