/** Reading of safetensors files: 8 bytes with the length of the header, a JSON header, then the arrays. */

import type { Tensor, Tensors } from "./tensor";

const READERS: Record<string, (bytes: ArrayBuffer) => Pick<Tensor, "dtype" | "data">> = {
  F32: (bytes) => ({ dtype: "float32", data: new Float32Array(bytes) }),
  I32: (bytes) => ({ dtype: "int32", data: new Int32Array(bytes) }),
  U8: (bytes) => ({ dtype: "uint8", data: new Uint8Array(bytes) }),
};

/** Parse a file into tensors. Throws Error with the reason if the file is damaged. */
export function parseSafetensors(file: Uint8Array<ArrayBuffer>): Tensors {
  const length = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + length))) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  delete header["__metadata__"];
  const tensors = Object.create(null) as Record<string, Tensor>; // names are untrusted and may be __proto__ or constructor
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const read = READERS[dtype];
    if (!read) throw new Error(`${name} has the unsupported dtype ${dtype}`);
    const value = { ...read(file.slice(8 + length + begin, 8 + length + end).buffer), shape };
    if (value.data.length !== shape.reduce((a, b) => a * b, 1)) throw new Error(`${name} is cut off`);
    tensors[name] = value;
  }
  return tensors;
}
