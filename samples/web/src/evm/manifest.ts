/** Reading of manifest.json, schema 1 (docs/bundle.md): the parts that an app uses, with the same checks as in Python. */

import { BundleError, reason } from "./errors";
import type { Selection } from "./detections";
import { MAX_CHANNELS, MAX_SIDE, Preprocessing, RESIZES, type PreprocessingFacts } from "./preprocess";
import { INTERPOLATIONS } from "./resize";
import type { TensorSpec } from "./tensor";

export const MANIFEST = "manifest.json";
export const SCHEMA_VERSION = 1;
const MAX_BYTES = 4 << 20;
export const HEADS = ["logits", "probs", "features", "raw", "detections", "label_map"] as const;
export type Colour = readonly [red: number, green: number, blue: number];
export type Head = (typeof HEADS)[number];
const MAX_DETECTIONS = 1000;

/** Number of images in one inference. A static batch has min equal to max; max is null for any number. */
export interface Batch {
  readonly min: number;
  readonly max: number | null;
}

export interface FileFacts {
  readonly sha256: string;
  readonly size_bytes: number;
}

/** Limits of the self-test by name; empty in older bundles. */
interface Limits {
  readonly preprocessing?: number;
  readonly apart?: number;
  readonly outputs?: ReadonlyMap<string, number>;
  readonly scans?: ReadonlyMap<string, number>;
}

/** The parts of a manifest that an app uses. */
export class Manifest {
  readonly name: string;
  readonly target: string;
  readonly artifact: string;
  readonly head: Head;
  readonly input: "image" | "tensor";
  readonly precision: string;
  readonly batch: Batch;
  readonly preprocessing: Preprocessing;
  /** Red, green and blue of each class of a segmenter; empty if it has none. */
  readonly palette: readonly Colour[];
  /** Selection of a detector. */
  readonly selection: Selection;
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  /** Ways in which the model's scans can run: plugin, portable, aot. */
  readonly scans: readonly string[];
  /** Native libraries: platform -> path in the bundle. */
  readonly plugins: ReadonlyMap<string, string>;
  readonly files: ReadonlyMap<string, FileFacts>;
  readonly built: boolean;
  readonly rejected: boolean;
  readonly failures: readonly string[];
  private readonly limits: Limits;
  private readonly parityLimit: number;

  /** Whether the model is a classifier: one output holds a score for each class. */
  get classifies(): boolean {
    return this.head === "logits" || this.head === "probs";
  }

  private constructor(content: Value) {
    const [plan, scan, parity] = [content.at("plan"), content.at("scan"), content.at("parity")];
    this.name = content.at("name").text();
    this.target = content.at("target").text();
    this.artifact = content.at("artifact").text();
    this.head = plan.at("head").oneOf(HEADS);
    this.selection = selectionOf(plan);
    this.input = plan.at("input").oneOf(["image", "tensor"]);
    this.precision = plan.at("precision").text();
    this.batch = batchOf(plan.at("batch"));
    this.preprocessing = new Preprocessing(preprocessingOf(content.at("preprocessing")));
    this.inputs = content.at("inputs").items(1).map(specOf);
    this.outputs = content.at("outputs").items(1).map(specOf);
    this.scans = scan.at("value").text().split("+");
    this.palette = paletteOf(content.at("model"));
    this.files = new Map(content.at("files").members().map(fileOf));
    this.built = content.at("built").flag(true);
    this.rejected = content.at("rejected").flag(false);
    this.failures = parity.at("failures").absent ? [] : parity.at("failures").items(0).map((each) => each.text());
    this.limits = limitsOf(content.at("selftest"));
    this.parityLimit = parity.at("limit").number(0);
    const within = (name: string): boolean => name === this.artifact || name.startsWith(`${this.artifact}/`);
    content.at("artifact").require([...this.files.keys()].some(within), "among the files");
    this.plugins = new Map(scan.at("plugins").value == null ? [] : scan.at("plugins").members().map(([name, path]) => [name, path.text()]));
    for (const [name, path] of this.plugins) scan.at("plugins").at(name).require(this.files.has(path), "among the files");
  }

  /** Largest accepted difference of a pixel in the self-test, of 255. */
  get pixelLimit(): number {
    return this.limits.preprocessing ?? 1;
  }

  /** Largest accepted share, 0..1, of detections or of pixels of a label map that differ in the self-test. */
  get apartLimit(): number {
    return this.limits.apart ?? 0;
  }

  /** Largest accepted error of an output in the self-test. */
  outputLimit(name: string): number {
    return this.limits.outputs?.get(name) ?? this.parityLimit;
  }

  /** Largest accepted error of a scan in the self-test; undefined in older bundles. */
  scanLimit(name: string): number | undefined {
    return this.limits.scans?.get(name);
  }

  /** Parse the manifest of the bundle called `bundle`. Throws BundleError. */
  static parse(bytes: Uint8Array, bundle: string): Manifest {
    const path = `${bundle.replace(/\/$/, "")}/${MANIFEST}`;
    if (bytes.length > MAX_BYTES)
      throw new BundleError(`${path} is larger than ${MAX_BYTES} bytes: not a manifest`, "", { code: "manifest.damaged" });
    const content = parseJson(bytes, path);
    if (!isObject(content)) throw new BundleError(`${path} is not a JSON object`, "", { code: "manifest.damaged" });
    try {
      const root = new Value(content, "");
      const version = root.at("schema_version").count();
      if (version > SCHEMA_VERSION)
        throw new BundleError(
          `${bundle} has manifest schema ${version}; this page reads versions up to ${SCHEMA_VERSION}`,
          "use src/evm of a newer evm-deploy",
          { code: "manifest.version", where: "schema_version" },
        );
      return new Manifest(root);
    } catch (error) {
      if (!(error instanceof Invalid)) throw error;
      const fault = { code: "manifest.invalid", where: error.where, cause: error };
      throw new BundleError(`${path} is not a valid manifest: ${error.message}`, "export the bundle again", fault);
    }
  }
}

/** An error in a manifest, with its key path. */
class Invalid extends Error {
  constructor(
    readonly where: string,
    what: string,
  ) {
    super(`${where} ${what}`);
  }
}

const HUGE = 1e15; // bound of all numbers

/** A JSON value and its key path. The methods convert the value, and throw Invalid if it has another type or is out of range. */
class Value {
  constructor(
    readonly value: unknown,
    readonly where: string,
  ) {}

  get absent(): boolean {
    return this.value === undefined;
  }

  require(good: boolean, wanted: string): void {
    if (!good) throw new Invalid(this.where, `must be ${wanted}, is ${JSON.stringify(this.value)?.slice(0, 60)}`);
  }

  private object(): Record<string, unknown> {
    this.require(isObject(this.value), "an object");
    return this.value as Record<string, unknown>;
  }

  at(key: string): Value {
    const object = this.object();
    return new Value(Object.hasOwn(object, key) ? object[key] : undefined, this.where ? `${this.where}.${key}` : key);
  }

  members(): [string, Value][] {
    return Object.keys(this.object()).map((key) => [key, this.at(key)]);
  }

  items(least: number, most = Infinity): Value[] {
    const list = Array.isArray(this.value) ? this.value : [];
    const wanted = `a list of ${least}${most > least ? " or more" : ""}`;
    this.require(Array.isArray(this.value) && least <= list.length && list.length <= most, wanted);
    return list.map((item, i) => new Value(item, `${this.where}[${i}]`));
  }

  text(): string {
    this.require(typeof this.value === "string", "text");
    return this.value as string;
  }

  oneOf<T extends string>(choices: readonly T[]): T {
    this.require(choices.includes(this.value as T), `one of ${choices.join(", ")}`);
    return this.value as T;
  }

  number(least = -HUGE, most = HUGE): number {
    const value = this.value as number;
    this.require(typeof value === "number" && least <= value && value <= most, "a finite number");
    return value;
  }

  positive(most = HUGE): number {
    this.require(this.number(0, most) > 0, "above 0");
    return this.value as number;
  }

  count(most = HUGE): number {
    const value = this.value as number;
    this.require(Number.isInteger(value) && 1 <= value && value <= most, "a whole number from 1");
    return value;
  }

  flag(otherwise: boolean): boolean {
    this.require(this.absent || typeof this.value === "boolean", "true or false");
    return (this.value as boolean | undefined) ?? otherwise;
  }
}

function isObject(value: unknown): boolean {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Names that leave the bundle, or are a device, another file or no name on Windows. The JSON schema has the same pattern. */
const LEAVES = /^$|^\/|[\x00-\x1f<>:"|?*\\]|(^|\/)(?!\.(\/|$))[^/]*[. ](\/|$)|(^|\/)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.[^/]*)?(\/|$)/i;

/** Test whether a file name, from a manifest or a zip, is a file inside the bundle on every system. */
export function insideBundle(name: string): boolean {
  return !LEAVES.test(name);
}

function parseJson(bytes: Uint8Array, path: string): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new BundleError(`${path} is damaged: ${reason(error)}`, "export the bundle again", { code: "manifest.damaged", cause: error });
  }
}

/** Read the colours of a segmenter's classes; empty if the manifest has none. */
function paletteOf(model: Value): Colour[] {
  const inside = (value: Value, key: string): Value => (value.value == null ? value : value.at(key));
  const palette = inside(inside(model, "details"), "palette");
  if (palette.value == null) return [];
  return palette.items(0).map((colour) => colour.items(3, 3).map((part) => part.number(0, 255)) as unknown as Colour);
}

/** Read the settings of a detector's selection. Other bundles have null, older ones nothing. */
function selectionOf(plan: Value): Selection {
  const [iou, most] = [plan.at("iou"), plan.at("max_det")];
  return { iou: iou.value == null ? 0.5 : iou.positive(1), most: most.value == null ? 100 : most.count(MAX_DETECTIONS) };
}

function batchOf(value: Value): Batch {
  const text = value.text();
  if (text === "dynamic") return { min: 1, max: null };
  const parts = text.split(":");
  const sizes = parts.filter((part) => /^[0-9]{1,5}$/.test(part)).map(Number);
  const rising = sizes.every((size, i) => i === 0 || sizes[i - 1]! <= size);
  const good = [1, 3].includes(parts.length) && sizes.length === parts.length && sizes[0]! >= 1 && rising;
  value.require(good, "a number from 1, dynamic, or min:opt:max such as 1:4:8");
  return { min: sizes[0]!, max: sizes.at(-1)! };
}

function preprocessingOf(value: Value): PreprocessingFacts {
  const [height, width] = value.at("size").items(2, 2).map((side) => side.count(MAX_SIDE)) as [number, number];
  const given = value.at("resize");
  const resize = given.absent ? "crop" : given.oneOf(RESIZES); // absent in older bundles
  const mean = value.at("mean").items(1, MAX_CHANNELS).map((item) => item.number());
  const std = value.at("std").items(1, MAX_CHANNELS).map((item) => item.positive());
  value.at("std").require(std.length === mean.length, "as many values as mean");
  return {
    size: [height, width],
    resize,
    ...(resize === "crop" ? { crop_pct: value.at("crop_pct").positive(1) } : {}),
    interpolation: value.at("interpolation").oneOf(INTERPOLATIONS),
    mean,
    std,
  };
}

function specOf(value: Value): TensorSpec {
  const shape = value.at("shape").items(1).map((side) => (side.value === null ? null : side.count()));
  return { name: value.at("name").text(), dtype: value.at("dtype").text(), shape };
}

function fileOf([name, facts]: [string, Value]): [string, FileFacts] {
  if (!insideBundle(name)) throw new Invalid(facts.where, "leaves the bundle");
  const sha256 = facts.at("sha256");
  sha256.require(/^[0-9a-f]{64}$/.test(sha256.text()), "a sha256");
  return [name, { sha256: sha256.text(), size_bytes: facts.at("size_bytes").number(0) }];
}

function limitsOf(value: Value): Limits {
  if (value.absent || value.members().length === 0) return {};
  const named = (key: string): Map<string, number> => new Map(value.at(key).members().map(([name, limit]) => [name, limit.number(0)]));
  const apart = value.at("apart");
  const share = apart.absent ? {} : { apart: apart.number(0) };
  return { ...share, preprocessing: value.at("preprocessing").number(0), outputs: named("outputs"), scans: named("scans") };
}
