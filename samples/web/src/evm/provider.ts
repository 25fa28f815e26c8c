/** On what a model runs here, and why. */

import { UsageError } from "./errors";

export const PROVIDERS = ["wasm", "webgpu"] as const;
export type Provider = (typeof PROVIDERS)[number];

/** What was decided, and why. */
export interface Choice {
  readonly value: Provider;
  readonly reason: string;
}

/** WebGPU where there is an adapter, else WebAssembly, unless one is asked for. Throws UsageError for an unknown one. */
export async function chooseProvider(asked: string): Promise<Choice> {
  if ((PROVIDERS as readonly string[]).includes(asked)) return { value: asked as Provider, reason: "as asked" };
  if (asked !== "auto")
    throw new UsageError(`provider '${asked}' is unknown; choose from: auto, ${PROVIDERS.join(", ")}`);
  if (!("gpu" in navigator)) return { value: "wasm", reason: "this browser has no WebGPU" };
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) return { value: "wasm", reason: "WebGPU has no adapter here" };
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const name = description || [vendor, architecture].filter(Boolean).join(" ") || "an adapter without a name";
  if (isFallbackAdapter) return { value: "wasm", reason: `WebGPU would run in software (${name})` };
  return { value: "webgpu", reason: `WebGPU has ${name}` };
}
