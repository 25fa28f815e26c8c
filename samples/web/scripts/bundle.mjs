/**
 * Copy a bundle into public/bundle, where the page looks for it, after checking every hash.
 *
 *     npm run bundle -- PATH
 */

import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const PUBLIC = join(dirname(fileURLToPath(import.meta.url)), "..", "public");

/** Check a bundle and return the paths of its files, manifest.json among them. Throws a message, as a string, if it is invalid. */
function checked(bundle) {
  const file = join(bundle, "manifest.json");
  if (!existsSync(file)) throw `${bundle} is not a bundle: no manifest.json inside\n  make one with evm-export --target onnx`;
  const manifest = JSON.parse(readFileSync(file, "utf-8"));
  if (manifest.target !== "onnx") throw `${bundle} is for target '${manifest.target}', a browser runs 'onnx'\n  export with evm-export --target onnx`;
  if (!manifest.scan.value.split("+").includes("portable")) throw `${bundle} has no portable scans\n  export it with --scan portable`;
  if (manifest.rejected) throw `bundle ${bundle} was rejected at export`;
  for (const [name, { sha256 }] of Object.entries(manifest.files)) {
    const path = resolve(bundle, name);
    if (!path.startsWith(resolve(bundle) + "/")) throw `${file} is not a valid manifest: file name '${name}' leaves the bundle`;
    if (!existsSync(path)) throw `bundle ${bundle}: ${name} is missing\n  copy the whole bundle again`;
    const found = createHash("sha256").update(readFileSync(path)).digest("hex");
    if (found !== sha256) throw `bundle ${bundle}: ${name} is damaged (its sha256 differs)\n  copy the bundle again`;
  }
  return ["manifest.json", ...Object.keys(manifest.files)];
}

/** Copy the files to a temporary folder and rename it, so that the page never finds an incomplete bundle. */
function place(bundle, files) {
  mkdirSync(PUBLIC, { recursive: true });
  const aside = mkdtempSync(join(PUBLIC, "..", ".bundle-"));
  for (const name of files) cpSync(join(bundle, name), join(aside, name));
  rmSync(join(PUBLIC, "bundle"), { recursive: true, force: true });
  renameSync(aside, join(PUBLIC, "bundle"));
}

const [bundle] = process.argv.slice(2);
try {
  if (!bundle) throw "usage: npm run bundle -- PATH\n  PATH: a bundle's folder, as evm-export writes it";
  const files = checked(bundle);
  // a browser runs its own native library only
  place(bundle, files.filter((name) => !name.startsWith("plugins/") || name.startsWith("plugins/browser-wasm32/")));
  console.log(`public/bundle holds ${bundle}`);
} catch (error) {
  if (typeof error !== "string") throw error;
  console.error(`bundle: ${error}`);
  process.exitCode = 2;
}
