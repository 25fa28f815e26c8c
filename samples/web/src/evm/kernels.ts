/** The native library of a bundle: a WebAssembly module that computes nodes of domain evm (native/web/library.cpp). */

import type { Constant, Node } from "./onnx";

/** Platform of the library, as in `evm-export --platform`. */
export const PLATFORM = "browser-wasm32";
const VERSION = 1;
const DOMAIN = "evm";
const FLOAT = 1;
const MAX_TEXT = 1000;

/** Functions of the library. A pointer is an integer of 32 bits, with a sign; null is 0. */
interface Exports {
  readonly memory: WebAssembly.Memory;
  _initialize(): void;
  evm_scan_isa(): number;
  evm_web_version(): number;
  evm_web_operator(op: number): number;
  evm_web_type(op: number, input: number): number;
  evm_web_open(op: number, noSoftplus: number): number;
  evm_web_input(node: number, input: number, rank: number, d0: number, d1: number, d2: number, d3: number): number;
  evm_web_pack(node: number): number;
  evm_web_run(node: number): number;
  evm_web_output(): number;
}
const FUNCTIONS = [
  ...["_initialize", "evm_scan_isa", "evm_web_version", "evm_web_operator", "evm_web_type", "evm_web_open"],
  ...["evm_web_input", "evm_web_pack", "evm_web_run", "evm_web_output"],
];

/** An operator of the library. types: element types of its inputs, numbered as in ONNX. */
interface Operator {
  readonly index: number;
  readonly types: readonly number[];
}

/** A tensor of float32 that a kernel reads or gives. */
export interface Floats {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

/** A compiled library. */
export class Library {
  private constructor(
    private readonly module: WebAssembly.Module,
    /** Name of the instruction set. */
    readonly isa: string,
  ) {}

  /**
   * Compile a library. Throws Error with the reason if the file is no such library. A library that imports anything is refused:
   * without imports it can compute on its own memory, and do nothing else.
   */
  static async compile(file: Uint8Array<ArrayBuffer>): Promise<Library> {
    const module = await WebAssembly.compile(file);
    const [first] = WebAssembly.Module.imports(module);
    if (first) throw new Error(`it imports ${first.module}.${first.name}`);
    const kinds = new Map(WebAssembly.Module.exports(module).map(({ name, kind }) => [name, kind]));
    const missing = ["memory", ...FUNCTIONS].find((name) => kinds.get(name) !== (name === "memory" ? "memory" : "function"));
    if (missing) throw new Error(`it has no ${missing}`);
    const { isa } = await Kernels.of(module);
    return new Library(module, isa);
  }

  /** Make kernels with a memory of their own. */
  kernels(): Promise<Kernels> {
    return Kernels.of(this.module);
  }
}

/** The kernels of one model. They share a memory, so only one runs at a time. */
export class Kernels {
  readonly isa: string;
  private readonly operators = new Map<string, Operator>();

  private constructor(private readonly library: Exports) {
    library._initialize();
    const version = library.evm_web_version();
    if (version !== VERSION) throw new Error(`it has version ${version} of the interface, this page uses ${VERSION}`);
    this.isa = this.text(library.evm_scan_isa());
    for (let index = 0; index < MAX_TEXT; index++) {
      const name = library.evm_web_operator(index);
      if (!name) break;
      const types: number[] = [];
      for (let type; (type = library.evm_web_type(index, types.length)) && types.length < MAX_TEXT; ) types.push(type);
      this.operators.set(this.text(name), { index, types });
    }
  }

  static async of(module: WebAssembly.Module): Promise<Kernels> {
    const { exports } = await WebAssembly.instantiate(module);
    return new Kernels(exports as unknown as Exports);
  }

  /** Test whether the library computes a node: it knows the operator, and only the first output is used. */
  computes({ domain, opType, inputs, outputs }: Node): boolean {
    const operator = domain === DOMAIN ? this.operators.get(opType) : undefined;
    return operator?.types.length === inputs.length && !inputs.includes("") && outputs.findLastIndex((name) => name) === 0;
  }

  /**
   * Prepare a node that `computes` accepts. constants: those inputs that are constant, by name; weights are packed here, once.
   * The first input is not constant. Returns a function that computes the output from the other inputs. Both throw Error with
   * the reason.
   */
  open(node: Node, constants: ReadonlyMap<string, Constant>): (inputs: ReadonlyMap<string, Floats>) => Floats {
    const { library } = this;
    const { index, types } = this.operators.get(node.opType)!;
    const softplus = node.ints.get("delta_softplus") ?? 1;
    const handle = library.evm_web_open(index, Number(!softplus));
    if (!handle) throw new Error("out of memory");
    const rest: [number, string][] = [];
    for (const [i, name] of node.inputs.entries()) {
      const constant = constants.get(name);
      if (!constant) rest.push([i, name]);
      else if (constant.type !== types[i]) throw new Error(`${name} has element type ${constant.type}, ${node.opType} takes ${types[i]}`);
      else this.give(handle, i, name, constant.type, constant);
    }
    for (const [i, name] of rest) if (types[i] !== FLOAT) throw new Error(`${name} is not constant`);
    this.check(library.evm_web_pack(handle));
    return (inputs) => {
      const { shape, data } = inputs.get(node.inputs[0]!)!;
      for (const [i, name] of rest) {
        const input = inputs.get(name)!;
        const bytes = new Uint8Array(input.data.buffer, input.data.byteOffset, input.data.byteLength);
        this.give(handle, i, name, FLOAT, { shape: input.shape, bytes });
      }
      this.check(library.evm_web_run(handle));
      return { shape, data: new Float32Array(library.memory.buffer, library.evm_web_output() >>> 0, data.length).slice() };
    };
  }

  /** Copy the values of an input into the library's memory. */
  private give(handle: number, input: number, name: string, type: number, { shape, bytes }: Omit<Constant, "type">): void {
    const { library } = this;
    const size = shape.reduce((count, side) => count * side, type === FLOAT ? 4 : 1);
    if (size !== bytes.length) throw new Error(`${name} has ${bytes.length} bytes, its shape [${shape.join(", ")}] asks for ${size}`);
    const [d0 = 0, d1 = 0, d2 = 0, d3 = 0] = shape;
    const at = library.evm_web_input(handle, input, shape.length, d0, d1, d2, d3);
    if (!at) throw new Error(`${name} of shape [${shape.join(", ")}] does not fit into the memory`);
    new Uint8Array(library.memory.buffer, at >>> 0, size).set(bytes);
  }

  /** Throw the error of the library, if it gives one. */
  private check(message: number): void {
    if (message) throw new Error(this.text(message));
  }

  private text(at: number): string {
    const { buffer } = this.library.memory;
    const start = at >>> 0;
    const bytes = new Uint8Array(buffer, start, Math.min(MAX_TEXT, buffer.byteLength - start));
    const end = bytes.indexOf(0);
    if (end < 0) throw new Error("the native library gives a text without an end");
    return new TextDecoder().decode(bytes.subarray(0, end));
  }
}
