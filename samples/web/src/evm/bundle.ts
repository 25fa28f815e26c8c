/** Access to a bundle: the manifest, and the files, each of which is checked against its SHA-256 when it is read. */

import { BundleError, ToolchainError } from "./errors";
import { MANIFEST, Manifest } from "./manifest";
import type { Source } from "./source";

/** An opened bundle. */
export class Bundle {
  private constructor(
    readonly name: string,
    readonly manifest: Manifest,
    private readonly source: Source,
  ) {}

  /** Read and check the manifest. Throws BundleError. */
  static async open(source: Source): Promise<Bundle> {
    const bytes = await source.read(MANIFEST);
    if (!bytes)
      throw new BundleError(`${source.name} is not a bundle: no ${MANIFEST} inside`, "make one with evm-export", { code: "manifest.missing" });
    const manifest = Manifest.parse(bytes, source.name);
    if (manifest.rejected)
      throw new BundleError(`bundle ${source.name} was rejected at export: ${manifest.failures.join("; ")}`, "", { code: "bundle.rejected" });
    if (!manifest.built)
      throw new BundleError(
        `bundle ${source.name} has no engine yet`,
        `on the device:  evm-export --finish ${source.name}`,
        { code: "bundle.unfinished" },
      );
    return new Bundle(source.name, manifest, source);
  }

  /** Test whether the manifest lists a file. */
  has(path: string): boolean {
    return this.manifest.files.has(path);
  }

  /** Read a file and check its hash. Throws BundleError if the file is not in the manifest, missing or damaged. */
  async read(path: string): Promise<Uint8Array<ArrayBuffer>> {
    const facts = this.manifest.files.get(path);
    const bytes = facts && (await this.source.read(path));
    const fault = (code: string) => ({ code, where: path });
    if (!bytes) throw new BundleError(`bundle ${this.name}: ${path} is missing`, "copy the whole bundle again", fault("file.missing"));
    if ((await sha256(bytes)) !== facts.sha256)
      throw new BundleError(`bundle ${this.name}: ${path} is damaged (its sha256 differs)`, "copy the bundle again", fault("file.damaged"));
    return bytes;
  }

  /** Read the class names; empty if the bundle has no labels.txt. Throws BundleError if the file is not UTF-8 text. */
  async labels(): Promise<string[]> {
    if (!this.has("labels.txt")) return [];
    const bytes = await this.read("labels.txt");
    try {
      const lines = new TextDecoder("utf-8", { fatal: true }).decode(bytes).split(/\r?\n/);
      return lines.at(-1) === "" ? lines.slice(0, -1) : lines;
    } catch (error) {
      const fault = { code: "file.damaged", where: "labels.txt", cause: error };
      throw new BundleError(`bundle ${this.name}: labels.txt is not UTF-8 text`, "export it again", fault);
    }
  }
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  if (!globalThis.crypto?.subtle)
    throw new ToolchainError("hashes cannot be checked: the page is not a secure context", "serve the page over https or from localhost");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
