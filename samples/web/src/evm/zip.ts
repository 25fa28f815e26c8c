/** Reading of a bundle from an untrusted zip. The limits are the same as in evm_deploy/bundle/archive.py. */

import { BundleError, reason } from "./errors";
import { insideBundle } from "./manifest";

const MAX_FILES = 10_000;
const MAX_BYTES = 4 * 2 ** 30;
/** Largest ratio of unpacked to packed size; more is a zip bomb. Files up to SMALL bytes may have any ratio. */
const MAX_RATIO = 200;
const SMALL = 1 << 20;

/** An entry of a zip's directory. mode: Unix file mode, 0 if unknown. offset: position of the local header. */
interface Entry {
  readonly name: string;
  readonly method: number;
  readonly encrypted: boolean;
  readonly crc: number;
  readonly packed: number;
  readonly unpacked: number;
  readonly mode: number;
  readonly offset: number;
}

/**
 * Unpack a zip: name -> content of every file. `name` names the zip in errors. Names that leave the bundle, links, encrypted
 * and duplicate entries, and zip bombs are refused, by the real sizes and not by those that the zip states. Throws BundleError.
 */
export async function unzip(zip: Blob, name: string): Promise<Map<string, Blob>> {
  try {
    const entries = (await directory(zip)).filter((entry) => !entry.name.endsWith("/"));
    check(entries, name);
    const files = new Map<string, Blob>();
    let left = MAX_BYTES;
    for (const entry of entries) {
      const content = await unpack(zip, entry, name, left);
      left -= content.size;
      files.set(entry.name, content);
    }
    return files;
  } catch (error) {
    if (error instanceof BundleError) throw error;
    throw new BundleError(`${name} is damaged or not a zip file: ${reason(error)}`, "copy the file again", { code: "zip.damaged", cause: error });
  }
}

function check(entries: readonly Entry[], zip: string): void {
  if (entries.length > MAX_FILES) throw refused(zip, "", `has ${entries.length} files; a bundle has at most ${MAX_FILES}`);
  const seen = new Set<string>();
  for (const { name, mode, encrypted } of entries) {
    if (!insideBundle(name)) throw refused(zip, name, "leaves the bundle");
    if (![0, REGULAR].includes(mode & FILE_TYPE)) throw refused(zip, name, "is a link or a device; only regular files are allowed");
    if (encrypted) throw refused(zip, name, "is encrypted");
    const folded = name.toUpperCase().toLowerCase(); // upper case first, because some file systems take the sharp s as ss
    if (seen.has(folded)) throw refused(zip, name, "occurs twice");
    seen.add(folded);
  }
  if (entries.reduce((sum, entry) => sum + entry.unpacked, 0) > MAX_BYTES)
    throw refused(zip, "", `unpacks to more than ${MAX_BYTES / 2 ** 30} GB`);
}

/** Make the error for a refused zip. `where`: the name in the zip, or empty. */
function refused(zip: string, where: string, why: string): BundleError {
  return new BundleError(`${zip}${where && `: ${JSON.stringify(where)}`} ${why}`, "", { code: "zip.refused", where });
}

async function unpack(zip: Blob, entry: Entry, name: string, left: number): Promise<Blob> {
  const local = await view(zip, entry.offset, LOCAL.size);
  if (local.getUint32(0, true) !== LOCAL.magic) throw new Error(`Bad magic number for file header of ${entry.name}`);
  const start = entry.offset + LOCAL.size + local.getUint16(26, true) + local.getUint16(28, true);
  if (start + entry.packed > zip.size) throw new Error(`${entry.name} is cut off`);
  const packed = zip.slice(start, start + entry.packed);
  const most = Math.max(SMALL, Math.min(left, MAX_RATIO * entry.packed));
  const parts: Uint8Array<ArrayBuffer>[] = [];
  let size = 0;
  let crc = ~0;
  for await (const part of read(inflated(packed, entry))) {
    size += part.length;
    if (size > most) throw refused(name, entry.name, `unpacks to over ${MAX_RATIO} times its size: possible zip bomb`);
    crc = crc32(crc, part);
    parts.push(part);
  }
  if (~crc >>> 0 !== entry.crc) throw new Error(`Bad CRC-32 for file ${entry.name}`);
  return new Blob(parts);
}

function inflated(packed: Blob, { method, name }: Entry): ReadableStream<Uint8Array<ArrayBuffer>> {
  if (method === STORED) return packed.stream();
  if (method === DEFLATED) return packed.stream().pipeThrough(new DecompressionStream("deflate-raw"));
  throw new Error(`${name} is compressed by method ${method}`);
}

/** Iterate over a stream, which not every browser supports by `for await`. */
async function* read<T>(stream: ReadableStream<T>): AsyncGenerator<T> {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel();
  }
}

const REGULAR = 0o100000;
const FILE_TYPE = 0o170000;
const STORED = 0;
const DEFLATED = 8;
/** Records of the zip format. magic: first four bytes; size: bytes before the fields of variable length. */
const LOCAL = { magic: 0x04034b50, size: 30 };
const CENTRAL = { magic: 0x02014b50, size: 46 };
const END = { magic: 0x06054b50, size: 22 };
const MAX_COMMENT = 0xffff;
const ZIP64 = 0xffffffff;

/** Read the directory at the end of a zip. A zip with 64-bit fields is over 4 GB and is refused. */
async function directory(zip: Blob): Promise<Entry[]> {
  const tailStart = Math.max(0, zip.size - END.size - MAX_COMMENT);
  const tail = await view(zip, tailStart, zip.size - tailStart);
  let end = tail.byteLength - END.size;
  while (end >= 0 && tail.getUint32(end, true) !== END.magic) end--;
  if (end < 0) throw new Error("File is not a zip file");
  const count = tail.getUint16(end + 10, true);
  const [size, offset] = [tail.getUint32(end + 12, true), tail.getUint32(end + 16, true)];
  if (offset + size > tailStart + end) throw new Error("Bad central directory");
  const records = await view(zip, offset, size);
  const entries: Entry[] = [];
  for (let at = 0; at < size; ) {
    if (records.getUint32(at, true) !== CENTRAL.magic) throw new Error("Bad magic number for central directory");
    const [named, extra, comment] = [28, 30, 32].map((field) => records.getUint16(at + field, true)) as [number, number, number];
    entries.push(entryAt(records, at, named));
    at += CENTRAL.size + named + extra + comment;
  }
  if (entries.length !== count) throw new Error(`the directory lists ${entries.length} files but states ${count}`);
  return entries;
}

function entryAt(records: DataView<ArrayBuffer>, at: number, named: number): Entry {
  const field = (offset: number): number => records.getUint32(at + offset, true);
  const name = new TextDecoder().decode(new Uint8Array(records.buffer, records.byteOffset + at + CENTRAL.size, named));
  const [packed, unpacked, offset] = [field(20), field(24), field(42)];
  if ([packed, unpacked, offset].includes(ZIP64)) throw new Error(`${name} is over 4 GB`);
  const flags = records.getUint16(at + 8, true);
  return {
    ...{ name, crc: field(16), packed, unpacked, offset, method: records.getUint16(at + 10, true) },
    ...{ encrypted: (flags & 1) !== 0, mode: field(38) >>> 16 },
  };
}

async function view(zip: Blob, offset: number, size: number): Promise<DataView<ArrayBuffer>> {
  if (offset + size > zip.size) throw new Error("File is cut off");
  return new DataView(await zip.slice(offset, offset + size).arrayBuffer());
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let bit = 0; bit < 8; bit++) i = i & 1 ? 0xedb88320 ^ (i >>> 1) : i >>> 1;
  return i;
});

/** Continue a CRC-32 over `bytes`. Both `crc` and the result are inverted, so that calls can be chained. */
function crc32(crc: number, bytes: Uint8Array): number {
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]!) & 255]! ^ (crc >>> 8);
  return crc;
}
