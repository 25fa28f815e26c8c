// node web_block.mjs FOLDER ORT ROUNDS: times of the kernel and of ONNX Runtime Web for the block in FOLDER, in turn, as JSON.
import { readFileSync } from "node:fs";

const [folder, ort, rounds] = process.argv.slice(2);
const { sizes, inputs } = JSON.parse(readFileSync(`${folder}/block.json`));
const bytes = readFileSync(`${folder}/arrays`);
const arrays = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);

const { InferenceSession, Tensor, env } = (await import(ort)).default ?? (await import(ort));
env.wasm.numThreads = 1;
const session = await InferenceSession.create(readFileSync(`${folder}/block.onnx`), { executionProviders: ["wasm"] });
const [b, H, W, C] = sizes;
const x = new Tensor("float32", arrays.slice(0, b * H * W * C), [b, H, W, C]);
const runtime = async () => (await session.run({ x })).out.data;

async function kernel(file) {
  const nothing = new Proxy({}, { get: () => () => 0 });
  const { instance } = await WebAssembly.instantiate(readFileSync(file), { wasi_snapshot_preview1: nothing, env: nothing });
  const wasm = instance.exports;
  wasm._initialize?.();
  new BigInt64Array(wasm.memory.buffer, wasm.sizes(), 8).set(sizes.map(BigInt));
  let from = 0;
  inputs.forEach((count, i) => {
    const at = wasm.input(i, count);
    new Float32Array(wasm.memory.buffer, at, count).set(arrays.subarray(from, (from += count)));
  });
  const out = wasm.prepare();
  return () => {
    wasm.run();
    return new Float32Array(wasm.memory.buffer, out, b * H * W * C);
  };
}

const subjects = { runtime, simd: await kernel(`${folder}/simd.wasm`) };
if (process.execArgv.includes("--experimental-wasm-relaxed-simd")) subjects.relaxed = await kernel(`${folder}/relaxed.wasm`);
const times = Object.fromEntries(Object.keys(subjects).map((name) => [name, []]));
const want = Float32Array.from(await runtime());
const error = {};
for (let round = -3; round < rounds; round++)
  for (const [name, run] of Object.entries(subjects)) {
    const start = performance.now();
    const have = await run();
    if (round >= 0) times[name].push(performance.now() - start);
    error[name] = want.reduce((most, value, i) => Math.max(most, Math.abs(value - have[i])), 0);
  }
console.log(JSON.stringify({ times, error }));
