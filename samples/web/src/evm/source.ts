/** Where a bundle's files come from: a folder on a server, a dropped folder, a zip. */

import { BundleError, reason } from "./errors";
import { MANIFEST } from "./manifest";
import { unzip } from "./zip";

/** `name`: of the bundle, for messages. */
export interface Source {
  readonly name: string;
  /** A file of the bundle; null where there is none. */
  read(path: string): Promise<Uint8Array<ArrayBuffer> | null>;
}

/** A folder that a server hands out, such as `/bundle/`. */
export function folderAt(url: string): Source {
  const name = url.replace(/\/$/, "");
  return {
    name,
    async read(path) {
      const failed = (why: string, cause?: unknown): BundleError =>
        new BundleError(`bundle ${name}: ${path} cannot be read: ${why}`, "is the server there?", { code: "file.missing", where: path, cause });
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

/** Files by their path inside the bundle, such as those of a dropped folder. */
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

/** A bundle as one file, its root or its only folder. Throws BundleError for a zip that holds no bundle. */
export async function zipped(zip: Blob, name = zip instanceof File ? zip.name : "zip"): Promise<Source> {
  const files = await unzip(zip, name);
  const top = [...files.keys()].map((path) => path.split("/")[0]).sort()[0];
  for (const root of ["", `${top}/`])
    if (files.has(root + MANIFEST)) {
      const below = [...files].filter(([path]) => path.startsWith(root));
      return folderOf(new Map(below.map(([path, file]) => [path.slice(root.length), file])), name);
    }
  throw new BundleError(`${name} holds no bundle: it has no ${MANIFEST}`, "make one with evm-export --zip", { code: "manifest.missing" });
}
