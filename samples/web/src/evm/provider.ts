/** Choice of the execution provider. */

import { UsageError } from "./errors";

export const PROVIDERS = ["wasm", "webgpu"] as const;
export type Provider = (typeof PROVIDERS)[number];

/** A choice and the reason for it. */
export interface Choice<Value = Provider> {
  readonly value: Value;
  readonly reason: string;
}

/** Return the requested provider; for `auto`, WebGPU if there is an adapter, else WebAssembly. Throws UsageError if unknown. */
export async function chooseProvider(asked: string): Promise<Choice> {
  if ((PROVIDERS as readonly string[]).includes(asked)) return { value: asked as Provider, reason: "as requested" };
  if (asked !== "auto")
    throw new UsageError(`provider '${asked}' is unknown; choose from: auto, ${PROVIDERS.join(", ")}`);
  if (!("gpu" in navigator)) return { value: "wasm", reason: "this browser has no WebGPU" };
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) return { value: "wasm", reason: "WebGPU has no adapter on this device" };
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const name = description || [vendor, architecture].filter(Boolean).join(" ") || "an adapter without a name";
  if (isFallbackAdapter) return { value: "wasm", reason: `WebGPU would run in software (${name})` };
  return { value: "webgpu", reason: `WebGPU has ${name}` };
}
