/** Sources of a bundle's files: a folder on a server, a dropped folder, or a zip. */

import { BundleError, reason } from "./errors";
import { MANIFEST } from "./manifest";
import { unzip } from "./zip";

/** Access to the files of a bundle. `name`: name of the bundle in messages. */
export interface Source {
  readonly name: string;
  /** Read a file of the bundle; null if there is no such file. Throws BundleError if the file cannot be read. */
  read(path: string): Promise<Uint8Array<ArrayBuffer> | null>;
}

/** Return a source for a folder on a server, such as `/bundle/`. */
export function folderAt(url: string): Source {
  const name = url.replace(/\/$/, "");
  return {
    name,
    async read(path) {
      const failed = (why: string, cause?: unknown): BundleError =>
        new BundleError(`bundle ${name}: ${path} cannot be read: ${why}`, "check that the server is running", { code: "file.missing", where: path, cause });
      let response: Response;
      try {
        response = await fetch([name, ...path.split("/").map(encodeURIComponent)].join("/"));
        if (response.ok) return new Uint8Array(await response.arrayBuffer());
      } catch (error) {
        throw failed(reason(error), error);
      }
      if (response.status === 404 || response.status === 410) return null;
      throw failed(`HTTP ${response.status}`);
    },
  };
}

/** Return a source for files by their path inside the bundle, such as the files of a dropped folder. */
export function folderOf(files: ReadonlyMap<string, Blob>, name: string): Source {
  return {
    name,
    async read(path) {
      const file = files.get(path);
      try {
        return file ? new Uint8Array(await file.arrayBuffer()) : null;
      } catch (error) {
        throw new BundleError(`bundle ${name}: ${path} cannot be read: ${reason(error)}`, "", { code: "file.missing", where: path, cause: error });
      }
    },
  };
}

/**
 * Return a source for a bundle in a zip, at the root of the zip or in one of its folders. Other folders do not count, such as
 * `__MACOSX`, which the Finder adds. Throws BundleError if the zip is damaged, is refused (see unzip), or holds no bundle or
 * several.
 */
export async function zipped(zip: Blob, name = zip instanceof File ? zip.name : "zip"): Promise<Source> {
  const files = await unzip(zip, name);
  const folders = [...files.keys()].filter((path) => path.split("/").length === 2 && path.endsWith(`/${MANIFEST}`));
  const [root, another] = files.has(MANIFEST) ? [""] : folders.map((path) => path.slice(0, -MANIFEST.length));
  if (root !== undefined && another !== undefined)
    throw new BundleError(`${name} holds several bundles: ${root}, ${another}`, "unpack it, and give one folder", { code: "zip.refused" });
  if (root !== undefined) {
    const below = [...files].filter(([path]) => path.startsWith(root));
    return folderOf(new Map(below.map(([path, file]) => [path.slice(root.length), file])), name);
  }
  throw new BundleError(`${name} is not a bundle: no ${MANIFEST} inside`, "make one with evm-export --zip", { code: "manifest.missing" });
}
