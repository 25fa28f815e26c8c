/** Choice of a lowering: whether nodes of domain evm run on the native library of the bundle, or in their portable form. */

import type { Bundle } from "./bundle";
import { BundleError, reason, UsageError } from "./errors";
import { Library, PLATFORM } from "./kernels";
import type { Choice, Provider } from "./provider";

export const SCANS = ["auto", "bundled", "portable"] as const;

/** `plugin`: the native library computes. `portable`: ONNX Runtime Web computes with standard operators. */
export type Lowering = "plugin" | "portable";

/**
 * Choose the lowering. `auto` takes the native library of the bundle, if there is one for browsers and the provider is WebAssembly:
 * in a browser a library can only compute (`Library.compile`), so it needs no more trust than the model. Throws UsageError for a
 * lowering that is unknown or not there, BundleError for a library that is damaged.
 */
export async function chooseLowering(bundle: Bundle, asked: string, provider: Provider): Promise<Choice<Lowering> & { library?: Library }> {
  const { scans, plugins } = bundle.manifest;
  if (!(SCANS as readonly string[]).includes(asked))
    throw new UsageError(`scan '${asked}' is unknown; choose from: ${SCANS.join(", ")}`);
  if (!scans.includes("portable"))
    throw new UsageError("portable scans are not available: the bundle has native nodes only", "export it with --scan portable");
  if (asked === "portable") return { value: "portable", reason: "as requested" };
  const path = plugins.get(PLATFORM);
  const found = obstacle(scans, path, plugins, provider);
  if (found) {
    const [why, hint] = found;
    if (asked === "bundled") throw unavailable(why, hint);
    return { value: "portable", reason: why };
  }
  const library = await compiled(bundle, path!);
  return { value: "plugin", reason: `native kernel, ${library.isa}, from the bundle (${PLATFORM})`, library };
}

/** Return the lowering of a model without a node that the library computes. Throws UsageError if `asked` is not `auto`. */
export function nothingNative(asked: string): Choice<Lowering> {
  const why = "the library computes no node at the top of the graph";
  if (asked !== "auto") throw unavailable(why, "use scan 'portable'");
  return { value: "portable", reason: why };
}

function unavailable(why: string, hint: string): UsageError {
  return new UsageError(`native kernels are not available: ${why}`, hint);
}

/** Return why the native library cannot be used, and a hint; null if it can. */
function obstacle(scans: readonly string[], path: string | undefined, plugins: ReadonlyMap<string, string>, provider: Provider): [string, string] | null {
  if (!scans.includes("plugin")) return ["the bundle has portable scans only", "export it with --scan auto"];
  if (!path) return [`no native library for ${PLATFORM} in the bundle; available: ${[...plugins.keys()].join(", ") || "none"}`, `export it with --platform ${PLATFORM}`];
  if (provider !== "wasm") return ["WebGPU runs no native kernels", "use provider 'wasm'"];
  return null;
}

async function compiled(bundle: Bundle, path: string): Promise<Library> {
  const file = await bundle.read(path);
  try {
    return await Library.compile(file);
  } catch (error) {
    const fault = { code: "file.damaged", where: path, cause: error };
    throw new BundleError(`bundle ${bundle.name}: ${path} is no native library for this page: ${reason(error)}`, "export it again", fault);
  }
}
