/**
 * The web SDK in Node: node web_node.mjs SITE BUNDLE THREADS. For each line {scan, runs} on stdin it writes the median latency in
 * milliseconds. SITE: a copy of samples/web with its packages.
 */

import { readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";

const [site, folder, threads] = process.argv.slice(2);
const { createServer } = await import(join(site, "node_modules/vite/dist/node/index.js"));
// in place of src/evm/ort.ts, which loads the runtime for browsers from the addresses of its files
const ORT = "export const defaultThreads = () => 1, loadOrt = async () => globalThis.ort;";
const runtime = { name: "ort", enforce: "pre", load: (id) => (id.endsWith("src/evm/ort.ts") ? ORT : null) };
globalThis.ort = createRequire(join(site, "package.json"))("onnxruntime-web");
globalThis.ort.env.wasm.numThreads = Number(threads);
const settings = { appType: "custom", logLevel: "error", server: { middlewareMode: true, ws: false } };
const server = await createServer({ root: site, configFile: false, plugins: [runtime], ...settings });
const { Bundle, folderOf, Model } = await server.ssrLoadModule("/src/evm/index.ts");

const names = readdirSync(folder, { recursive: true }).filter((name) => statSync(join(folder, name)).isFile());
const files = new Map(names.map((name) => [name, new Blob([readFileSync(join(folder, name))])]));
const models = {};
for (const scan of ["portable", "bundled"])
  models[scan] = await Model.open(await Bundle.open(folderOf(files, folder)), { provider: "wasm", threads: Number(threads), scan });
for await (const line of createInterface({ input: process.stdin })) {
  const { scan, runs } = JSON.parse(line);
  console.log((await models[scan].bench({ warmUp: 2, runs })).p50);
}
await server.close();
process.exit();
