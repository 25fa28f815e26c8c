import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

/** Headers that a server must send. Without the first two WebAssembly has one thread. A worker takes its policy from the header only. */
const headers = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; object-src 'none'; base-uri 'none'; form-action 'none'",
};

/** Files of ONNX Runtime for WebGPU. They are large, so they are cached at their first use only. */
const LATER = /asyncify/;

/** Vite plugin that writes into sw.js the list of files for offline use, and a version that changes with any of the files. */
function offline(): Plugin {
  let publicDir: string;
  return {
    name: "offline",
    apply: "build",
    enforce: "post", // run after the pages have been generated
    configResolved: (config) => void (publicDir = config.publicDir),
    generateBundle(_, bundle) {
      const worker = bundle["sw.js"];
      if (worker?.type !== "chunk") throw new Error("sw.js is missing in the build");
      const files = new Map<string, string | Uint8Array>();
      for (const [name, file] of Object.entries(bundle))
        if (file !== worker && !LATER.test(name)) files.set(name, file.type === "chunk" ? file.code : file.source);
      for (const name of filesIn(publicDir)) files.set(name, readFileSync(join(publicDir, name)));
      const hash = createHash("sha256");
      for (const name of [...files.keys()].sort()) hash.update(name).update(files.get(name)!);
      const precache = { version: hash.digest("hex").slice(0, 12), files: [...files.keys()].sort() };
      worker.code = worker.code.replace("__PRECACHE__", JSON.stringify(precache));
    },
  };
}

function filesIn(folder: string): string[] {
  if (!existsSync(folder)) return [];
  const names = readdirSync(folder, { recursive: true, encoding: "utf-8" });
  return names.filter((name) => statSync(join(folder, name)).isFile());
}

export default defineConfig({
  base: "./",
  appType: "mpa", // answer 404 for missing files
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
  worker: { format: "es" },
  server: { headers },
  preview: { headers },
  plugins: [offline()],
  build: {
    target: "es2023",
    assetsInlineLimit: 0,
    rollupOptions: {
      input: ["src/sw/sw.ts", ...readdirSync(".").filter((name) => name.endsWith(".html"))],
      output: { entryFileNames: ({ name }) => (name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
});
