/** Tensors, and the specs of a model's inputs and outputs. */

import type { InferenceSession } from "onnxruntime-web/wasm";

import { UsageError } from "./errors";

const ARRAYS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array } as const;
export type Dtype = keyof typeof ARRAYS;

/** Test whether a dtype is supported. */
export function isDtype(name: string): name is Dtype {
  return Object.hasOwn(ARRAYS, name);
}

/** A row-major array with a shape. */
export interface Tensor {
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly data: Float32Array | Int32Array | Uint8Array;
}

export type Tensors = Readonly<Record<string, Tensor>>;

/** Name, dtype and shape of an input or output; a dynamic batch is null in the shape. */
export interface TensorSpec {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly (number | null)[];
}

/** Return the spec of an input or output. */
export function specOf(metadata: InferenceSession.ValueMetadata): TensorSpec {
  if (!metadata.isTensor) return { name: metadata.name, dtype: "no tensor", shape: [] };
  // onnxruntime-web 1.30.0 gives an unnamed dynamic size as -1 in 32 unsigned bits
  const shape = metadata.shape.map((side) => (typeof side === "number" && side !== 0xffffffff ? side : null));
  return { name: metadata.name, dtype: metadata.type, shape };
}

/** Make a float32 tensor. */
export function float32(data: Float32Array, shape: readonly number[]): Tensor {
  return { dtype: "float32", shape, data };
}

/** Make a uint8 tensor. */
export function uint8(data: Uint8Array, shape: readonly number[]): Tensor {
  return { dtype: "uint8", shape, data };
}

/** Concatenate tensors along the first axis. The parts have the same dtype and the same other axes. */
export function concatenate(parts: readonly Tensor[]): Tensor {
  const [{ dtype, shape }, length] = [parts[0]!, parts.reduce((sum, part) => sum + part.data.length, 0)];
  const data = new ARRAYS[dtype](length);
  let at = 0;
  for (const part of parts) {
    data.set(part.data, at);
    at += part.data.length;
  }
  return { dtype, shape: [parts.reduce((sum, part) => sum + part.shape[0]!, 0), ...shape.slice(1)], data };
}

/** Return rows begin..end of the first axis, as a view. */
export function rows(tensor: Tensor, begin: number, end: number): Tensor {
  const row = tensor.data.length / tensor.shape[0]!;
  const data = tensor.data.subarray(begin * row, end * row);
  return { ...tensor, shape: [data.length / row, ...tensor.shape.slice(1)], data };
}

/** Check names, dtypes and shapes of feeds. Throws UsageError that names the input, the expected and the given tensor. */
export function checkFeeds(inputs: readonly TensorSpec[], feeds: Tensors): void {
  const names = Object.keys(feeds).sort();
  if (names.join() !== inputs.map((spec) => spec.name).sort().join())
    throw new UsageError(`inputs are ${inputs.map(specText).join(", ")}; got ${names.join(", ") || "none"}`);
  for (const spec of inputs) {
    const { dtype, shape, data } = feeds[spec.name]!;
    const fits =
      shape.length === spec.shape.length &&
      spec.shape.every((want, i) => (want === null ? shape[i]! >= 1 : shape[i] === want)) &&
      data.length === shape.reduce((a, b) => a * b, 1);
    if (dtype !== spec.dtype || !fits)
      throw new UsageError(`input ${specText(spec)}: got ${dtype}[${shape.join(", ")}]`);
  }
}

/** Format a spec, such as "image uint8[1, 224, 224, 3]". */
export function specText({ name, dtype, shape }: TensorSpec): string {
  return `${name} ${dtype}[${shape.map((side) => side ?? "batch").join(", ")}]`;
}
