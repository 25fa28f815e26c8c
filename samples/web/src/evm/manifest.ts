/** manifest.json, schema 1 (docs/bundle.md): what an app reads of it, validated as Python validates it. */

import { BundleError, EvmError, reason } from "./errors";
import { Preprocessing, type PreprocessingFacts } from "./preprocess";
import { repr } from "./python";
import type { TensorSpec } from "./tensor";

export const MANIFEST = "manifest.json";
export const SCHEMA_VERSION = 1;
const MAX_BYTES = 4 << 20;
const REQUIRED = [
  ...["name", "target", "artifact", "plan", "model", "preprocessing", "inputs", "outputs", "scan", "details"],
  ...["versions", "parity"],
] as const;

export type Head = "logits" | "probs" | "features";

/** Images per inference: static where min equals max; max null is unbounded. */
export interface Batch {
  readonly min: number;
  readonly max: number | null;
}

export interface FileFacts {
  readonly sha256: string;
  readonly size_bytes: number;
}

/** Limits of the self-test by name; none of them in bundles from before limits were data. */
interface Limits {
  readonly preprocessing?: number;
  readonly outputs?: Record<string, number>;
  readonly scans?: Record<string, number>;
}

interface Content {
  name: string;
  target: string;
  artifact: string;
  plan: { batch: string | number; head: Head; input: "image" | "tensor"; precision: string };
  preprocessing: PreprocessingFacts;
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  scan: { value: string; plugins?: Record<string, string> };
  parity: { failures?: string[]; limit: number };
  selftest?: Limits;
  files?: Record<string, FileFacts>;
  built?: boolean;
  rejected?: boolean;
}

export class Manifest {
  readonly name: string;
  readonly target: string;
  readonly artifact: string;
  readonly head: Head;
  readonly input: "image" | "tensor";
  readonly precision: string;
  readonly batch: Batch;
  readonly preprocessing: Preprocessing;
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  /** Ways in which the model's scans can run: plugin, portable, aot. */
  readonly scans: readonly string[];
  readonly files: ReadonlyMap<string, FileFacts>;
  readonly built: boolean;
  readonly rejected: boolean;
  readonly failures: readonly string[];
  private readonly limits: Limits;
  private readonly parityLimit: number;

  private constructor(content: Content) {
    const { plan } = content;
    this.name = content.name;
    this.target = content.target;
    this.artifact = content.artifact;
    this.head = oneOf("--head", plan.head, ["logits", "probs", "features"]);
    this.input = oneOf("--input", plan.input, ["image", "tensor"]);
    this.precision = plan.precision;
    this.batch = parseBatch(plan.batch);
    this.preprocessing = new Preprocessing(content.preprocessing);
    this.inputs = specs("inputs", content.inputs);
    this.outputs = specs("outputs", content.outputs);
    this.scans = content.scan.value.split("+");
    this.files = new Map(Object.entries(content.files ?? {}));
    this.built = content.built ?? true;
    this.rejected = content.rejected ?? false;
    this.failures = content.parity.failures ?? [];
    this.limits = limits(content.selftest ?? {});
    this.parityLimit = limit(content.parity.limit, "parity.limit");
    checkFiles(this.files, this.artifact, Object.values(content.scan.plugins ?? {}));
  }

  /** Largest accepted difference of the self-test's pixels, of 255. */
  get pixelLimit(): number {
    return this.limits.preprocessing ?? 1;
  }

  /** Largest accepted error of an output in the self-test. */
  outputLimit(name: string): number {
    return own(this.limits.outputs, name) ?? this.parityLimit;
  }

  /** Largest accepted error of a scan in the self-test; undefined in bundles from before limits were data. */
  scanLimit(name: string): number | undefined {
    return own(this.limits.scans, name);
  }

  /** Parse the manifest of the bundle called `bundle`. Throws BundleError. */
  static parse(bytes: Uint8Array, bundle: string): Manifest {
    const path = `${bundle.replace(/\/$/, "")}/${MANIFEST}`;
    if (bytes.length > MAX_BYTES) throw new BundleError(`${path} is larger than ${MAX_BYTES} bytes: not a manifest`);
    const content = parseJson(bytes, path);
    if (typeof content !== "object" || content === null || Array.isArray(content))
      throw new BundleError(`${path} is not a JSON object`);
    const version = (content as Record<string, unknown>)["schema_version"];
    if (typeof version !== "number" || !Number.isInteger(version) || version < 1)
      throw new BundleError(`${path} has no schema_version`);
    if (version > SCHEMA_VERSION)
      throw new BundleError(
        `${bundle} has manifest schema ${version}, this evm-deploy reads up to ${SCHEMA_VERSION}`,
        "upgrade the page: take src/evm of a newer evm-deploy",
      );
    try {
      const missing = REQUIRED.find((key) => !(key in content));
      if (missing) throw new EvmError(`it has no ${repr(missing)}`);
      return new Manifest(content as unknown as Content);
    } catch (error) {
      // an untrusted file: whatever is wrong in it, it is the manifest's fault
      throw new BundleError(`${path} is not a valid manifest: ${reason(error)}`, "export the bundle again", { cause: error });
    }
  }
}

/** Whether a file's name, in a manifest or a zip, stays inside the bundle on every system. */
export function insideBundle(name: string): boolean {
  return name !== "" && !name.startsWith("/") && !name.split("/").includes("..") && !/[\\:\0]/.test(name);
}

function parseJson(bytes: Uint8Array, path: string): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new BundleError(`${path} is damaged: ${reason(error)}`, "export the bundle again", { cause: error });
  }
}

function parseBatch(text: string | number): Batch {
  if (text === "dynamic") return { min: 1, max: null };
  const parts = String(text).split(":");
  if ([1, 3].includes(parts.length) && parts.every((part) => /^[0-9]{1,5}$/.test(part))) {
    const [min, max] = [Number(parts[0]), Number(parts.at(-1))];
    if (min >= 1 && min <= max) return { min, max };
  }
  throw new EvmError(`--batch ${repr(String(text))}: use a number from 1, 'dynamic', or min:opt:max such as 1:4:8`);
}

function specs(key: string, values: TensorSpec[]): TensorSpec[] {
  if (!Array.isArray(values) || values.length === 0) throw new EvmError(`${key} must be a list of at least 1`);
  return values.map(({ name, dtype, shape }) => {
    if (!Array.isArray(shape) || !shape.every((side) => side === null || (Number.isInteger(side) && side >= 1)))
      throw new EvmError(`${key} has a shape ${JSON.stringify(shape)}`);
    return { name, dtype, shape };
  });
}

function checkFiles(files: ReadonlyMap<string, FileFacts>, artifact: string, plugins: string[]): void {
  for (const [name, facts] of files) {
    if (!insideBundle(name)) throw new EvmError(`file name ${repr(name)} leaves the bundle`);
    if (!/^[0-9a-f]{64}$/.test(facts.sha256)) throw new EvmError(`${name} has no sha256`);
  }
  if (![...files.keys()].some((name) => name === artifact || name.startsWith(`${artifact}/`)))
    throw new EvmError(`the artifact ${repr(artifact)} is not among the files`);
  const lost = plugins.find((library) => !files.has(library));
  if (lost) throw new EvmError(`the native library ${repr(lost)} is not among the files`);
}

function limits(found: Limits): Limits {
  if (Object.keys(found).length === 0) return {};
  limit(found.preprocessing, "selftest.preprocessing");
  for (const part of ["outputs", "scans"] as const)
    for (const [name, value] of Object.entries(found[part] as object)) limit(value, `selftest.${part}.${name}`);
  return found;
}

function limit(value: unknown, where: string): number {
  if (typeof value === "number" && value >= 0 && Number.isFinite(value)) return value;
  throw new EvmError(`${where} must be a finite number from 0, is ${JSON.stringify(value)}`);
}

/** Names are anybody's: constructor, __proto__. */
function own(values: Record<string, number> | undefined, name: string): number | undefined {
  return values && Object.hasOwn(values, name) ? values[name] : undefined;
}

function oneOf<T extends string>(what: string, value: T, choices: readonly T[]): T {
  if (choices.includes(value)) return value;
  throw new EvmError(`${what} ${repr(String(value))} is unknown; choose from: ${choices.join(", ")}`);
}
