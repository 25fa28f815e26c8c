/** Loading of ONNX Runtime Web, whose wasm files the page's server serves. Only this file depends on the bundler (Vite's `?url`). */

import gpuModule from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuModule from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { UsageError } from "./errors";
import type { Provider } from "./provider";

export type Ort = typeof import("onnxruntime-web/wasm");

const MAX_THREADS = 4;
const loaded = new Map<Provider, Promise<Ort>>();

/** Default number of threads of WebAssembly. More than one thread needs a page that is cross-origin isolated. */
export function defaultThreads(): number {
  if (!globalThis.crossOriginIsolated) return 1;
  return Math.max(1, Math.min(MAX_THREADS, Math.ceil(navigator.hardwareConcurrency / 2)));
}

/**
 * Return the runtime for a provider, which is loaded once. Throws UsageError if `threads` is invalid, or if the runtime
 * already runs with another number of threads.
 */
export async function loadOrt(provider: Provider, threads: number): Promise<Ort> {
  if (!Number.isInteger(threads) || threads < 1)
    throw new UsageError(`threads is ${threads}, it must be a whole number from 1`);
  if (threads > 1 && !globalThis.crossOriginIsolated)
    throw new UsageError(`${threads} threads: the page is not cross-origin isolated`, "send the headers COOP and COEP (docs/embed/web.md)");
  if (!loaded.has(provider)) loaded.set(provider, start(provider, threads));
  const ort = await loaded.get(provider)!;
  if (ort.env.wasm.numThreads !== threads)
    throw new UsageError(`ONNX Runtime Web runs with ${ort.env.wasm.numThreads} threads already`, "open the model in another worker");
  return ort;
}

async function start(provider: Provider, threads: number): Promise<Ort> {
  const gpu = provider === "webgpu";
  const ort: Ort = gpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const [mjs, wasm] = gpu ? [gpuModule, gpuWasm] : [cpuModule, cpuWasm];
  ort.env.wasm.wasmPaths = { mjs: absolute(mjs), wasm: absolute(wasm) };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

function absolute(url: string): string {
  return new URL(url, import.meta.url).href;
}
