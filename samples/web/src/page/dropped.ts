/** Reading of dropped, pasted or chosen files: an image, or a bundle as a zip or folder. */

import type { Place } from "./worker";

export type Given = { image: File } | { bundle: Place };

/** Return the dropped or pasted image or bundle; null for anything else, or several items. Call it while the event is handled. */
export async function given(data: DataTransfer): Promise<Given | null> {
  const items = [...data.items].filter((item) => item.kind === "file");
  const folder = items.map((item) => item.webkitGetAsEntry()).find((entry) => entry?.isDirectory);
  const file = data.files[0];
  if (items.length !== 1) return null;
  if (folder) return { bundle: { folder: folder.name, files: await filesBelow(folder as FileSystemDirectoryEntry) } };
  return file ? ofFile(file) : null;
}

/** Take a file as a bundle if its name ends in .zip, else as an image. */
export function ofFile(file: File): Given {
  return file.name.endsWith(".zip") ? { bundle: { zip: file } } : { image: file };
}

/** Take the files of an <input webkitdirectory> as a bundle. Their paths begin with the folder's name. */
export function ofFolder(files: FileList): Given {
  const folder = files[0]!.webkitRelativePath.split("/")[0]!;
  const inside = [...files].map((file) => [file.webkitRelativePath.slice(folder.length + 1), file] as const);
  return { bundle: { folder, files: new Map(inside) } };
}

async function filesBelow(folder: FileSystemDirectoryEntry, prefix = ""): Promise<Map<string, File>> {
  const files = new Map<string, File>();
  for (const entry of await entriesOf(folder)) {
    const path = prefix + entry.name;
    if (entry.isDirectory)
      for (const each of await filesBelow(entry as FileSystemDirectoryEntry, `${path}/`)) files.set(...each);
    else files.set(path, await new Promise((done, failed) => (entry as FileSystemFileEntry).file(done, failed)));
  }
  return files;
}

/** List a folder. A reader returns the entries in portions, and an empty portion at the end. */
async function entriesOf(folder: FileSystemDirectoryEntry): Promise<FileSystemEntry[]> {
  const reader = folder.createReader();
  const all: FileSystemEntry[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((done, failed) => reader.readEntries(done, failed));
    if (some.length === 0) return all;
    all.push(...some);
  }
}
