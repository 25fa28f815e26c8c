/** Reading and cutting of ONNX files. Only the fields that a cut needs are decoded (onnx.proto); all others are copied. */

import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";

import type { TensorSpec } from "./tensor";

/** Field numbers of onnx.proto. */
const MODEL = { graph: 7, functions: 25 };
const GRAPH = { node: 1, name: 2, initializer: 5, input: 11, output: 12, sparseInitializer: 15 };
const NODE = { input: 1, output: 2, opType: 4, attribute: 5, domain: 7 };
const ATTRIBUTE = { name: 1, int: 3, graph: 6, graphs: 11 };
const TENSOR = { dims: 1, dataType: 2, floatData: 4, int32Data: 5, name: 8, rawData: 9, dataLocation: 14 };
const FUNCTION = { domain: 10 };
const VALUE = { name: 1, type: 2 };
const TYPE = { tensor: 1 };
const TENSOR_TYPE = { elementType: 1, shape: 2 };
const SHAPE = { side: 1 };
const SIDE = { size: 1 };
const SPARSE = { values: 1 };

/** Element types by number. */
const DTYPES = ["undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16", "float64", "uint32", "uint64"];

/** A field of a message. raw: the field with its tag. body: its content. */
interface Field {
  readonly number: number;
  readonly type: WireType;
  readonly body: Uint8Array;
  readonly raw: Uint8Array;
}

/** A node of a graph. reads: names of all values that it reads, those of its subgraphs included. */
export interface Node {
  readonly raw: Uint8Array;
  readonly domain: string;
  readonly opType: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly reads: readonly string[];
  /** Values of attributes that are integers. */
  readonly ints: ReadonlyMap<string, number>;
  /** Domains of the node and of the nodes in its subgraphs. */
  readonly domains: readonly string[];
}

/** A tensor that is stored in the file. type: element type, numbered as in ONNX. */
export interface Constant {
  readonly type: number;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

/** An ONNX file in memory. The arrays are views of the file. */
export class OnnxFile {
  readonly nodes: readonly Node[];
  readonly inputs: readonly TensorSpec[];
  /** Names of the outputs. */
  readonly outputs: readonly string[];
  private readonly constants: ReadonlyMap<string, Field>;
  private readonly results: ReadonlyMap<string, Uint8Array>;
  private readonly functions: readonly Field[];
  private readonly functionDomains: ReadonlySet<string>;
  private readonly rest: readonly Field[];
  private readonly sparse: readonly Field[];

  /** Read a file. Throws Error with the reason if the file is not of the format. */
  constructor(file: Uint8Array) {
    const model = fieldsOf(file);
    const graph = bodies(model, MODEL.graph).flatMap(fieldsOf); // parts of a message that occurs twice are merged
    this.nodes = bodies(graph, GRAPH.node).map(nodeOf);
    const stored = graph.filter(({ number }) => number === GRAPH.initializer);
    this.constants = new Map(stored.map((field) => [text(field.body, TENSOR.name), field]));
    this.sparse = graph.filter(({ number }) => number === GRAPH.sparseInitializer);
    this.results = new Map(bodies(graph, GRAPH.output).map((body) => [text(body, VALUE.name), body]));
    this.inputs = bodies(graph, GRAPH.input).map(specOf).filter(({ name }) => !this.constants.has(name));
    this.outputs = [...this.results.keys()];
    this.functions = model.filter(({ number }) => number === MODEL.functions);
    this.functionDomains = new Set(this.functions.map(({ body }) => text(body, FUNCTION.domain)));
    this.rest = model.filter(({ number }) => number !== MODEL.graph && number !== MODEL.functions);
  }

  /** Test whether a value is stored in the file. */
  isConstant(name: string): boolean {
    return this.constants.has(name) || this.sparse.some(({ body }) => sparseName(body) === name);
  }

  /** Return a tensor that is stored in the file. Throws Error if there is no such tensor, or its values are not there. */
  constant(name: string): Constant {
    const field = this.constants.get(name);
    if (!field) throw new Error(`${name} is not stored in the file as a dense tensor`);
    const tensor = fieldsOf(field.body);
    if (int(tensor, TENSOR.dataLocation)) throw new Error(`${name} is stored in another file`);
    const type = int(tensor, TENSOR.dataType);
    const shape = ints(tensor, TENSOR.dims);
    const raw = bodies(tensor, TENSOR.rawData).at(-1);
    const bytes = raw ?? joined(bodies(tensor, TENSOR.floatData)) ?? Uint8Array.from(ints(tensor, TENSOR.int32Data));
    return { type, shape, bytes };
  }

  /** Return a model of some of the nodes. outputs: names of values, whose types the runtime infers. */
  piece(nodes: readonly Node[], inputs: readonly TensorSpec[], outputs: readonly string[]): Uint8Array<ArrayBuffer> {
    const reads = new Set(nodes.flatMap((node) => node.reads));
    const model = new BinaryWriter();
    for (const { raw } of this.rest) model.raw(raw);
    if (nodes.some((node) => node.domains.some((domain) => this.functionDomains.has(domain))))
      for (const { raw } of this.functions) model.raw(raw);
    const graph = begin(model, MODEL.graph);
    begin(graph, GRAPH.name).raw(encoder.encode("piece")).join();
    for (const { raw } of nodes) begin(graph, GRAPH.node).raw(raw).join();
    for (const [name, { raw }] of this.constants) if (reads.has(name)) graph.raw(raw);
    for (const { body, raw } of this.sparse) if (reads.has(sparseName(body))) graph.raw(raw);
    for (const spec of inputs) writeSpec(begin(graph, GRAPH.input), spec).join();
    for (const name of outputs) {
      const output = begin(graph, GRAPH.output);
      const known = this.results.get(name);
      (known ? output.raw(known) : begin(output, VALUE.name).raw(encoder.encode(name)).join()).join();
    }
    return graph.join().finish();
  }
}

/** Begin a field of a message, which `join` ends. */
function begin(message: BinaryWriter, number: number): BinaryWriter {
  return message.tag(number, WireType.LengthDelimited).fork();
}

/** Write the content of a ValueInfoProto. */
function writeSpec(value: BinaryWriter, { name, dtype, shape }: TensorSpec): BinaryWriter {
  begin(value, VALUE.name).raw(encoder.encode(name)).join();
  const type = DTYPES.indexOf(dtype);
  if (type < 0) throw new Error(`${name} has the unsupported type ${dtype}`);
  const tensor = begin(begin(value, VALUE.type), TYPE.tensor);
  tensor.tag(TENSOR_TYPE.elementType, WireType.Varint).int32(type);
  begin(tensor, TENSOR_TYPE.shape);
  for (const size of shape) {
    begin(tensor, SHAPE.side);
    if (size !== null) tensor.tag(SIDE.size, WireType.Varint).int32(size);
    tensor.join();
  }
  return tensor.join().join().join();
}

function fieldsOf(message: Uint8Array): Field[] {
  const reader = new BinaryReader(message);
  const found: Field[] = [];
  while (reader.pos < reader.len) {
    const start = reader.pos;
    const [number, type] = reader.tag();
    const body = type === WireType.LengthDelimited ? reader.bytes() : reader.skip(type, number);
    found.push({ number, type, body, raw: message.subarray(start, reader.pos) });
  }
  return found;
}

function bodies(fields: readonly Field[], number: number): Uint8Array[] {
  return fields.filter((field) => field.number === number).map(({ body }) => body);
}

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { fatal: true });

function texts(fields: readonly Field[], number: number): string[] {
  return bodies(fields, number).map((body) => decoder.decode(body));
}

/** Return the text of a field of a message; empty if the message has no such field. */
function text(message: Uint8Array, number: number): string {
  return texts(fieldsOf(message), number).at(-1) ?? "";
}

/** Return the integers of a repeated field, packed or not. */
function ints(fields: readonly Field[], number: number): number[] {
  const found: number[] = [];
  for (const body of bodies(fields, number)) {
    const reader = new BinaryReader(body);
    while (reader.pos < reader.len) found.push(Number(reader.int64()));
  }
  return found;
}

/** Return the integer of a field; 0 if there is no such field. */
function int(fields: readonly Field[], number: number): number {
  return ints(fields, number).at(-1) ?? 0;
}

/** Join arrays; undefined if there are none. */
function joined(parts: readonly Uint8Array[]): Uint8Array | undefined {
  if (parts.length <= 1) return parts[0];
  const all = new BinaryWriter();
  for (const part of parts) all.raw(part);
  return all.finish();
}

function nodeOf(raw: Uint8Array): Node {
  const fields = fieldsOf(raw);
  const attributes = bodies(fields, NODE.attribute).map(fieldsOf);
  const graphs = attributes.flatMap((each) => [...bodies(each, ATTRIBUTE.graph), ...bodies(each, ATTRIBUTE.graphs)]).map(subgraphOf);
  const inputs = texts(fields, NODE.input);
  const domain = texts(fields, NODE.domain).at(-1) ?? "";
  return {
    raw,
    domain,
    opType: texts(fields, NODE.opType).at(-1) ?? "",
    inputs,
    outputs: texts(fields, NODE.output),
    reads: [...inputs, ...graphs.flatMap(({ reads }) => reads)].filter((name) => name),
    ints: new Map(attributes.map((each) => [texts(each, ATTRIBUTE.name).at(-1) ?? "", int(each, ATTRIBUTE.int)])),
    domains: [domain, ...graphs.flatMap(({ domains }) => domains)],
  };
}

/** Return the values that a subgraph reads from outside, and the domains of its nodes. */
function subgraphOf(body: Uint8Array): Pick<Node, "reads" | "domains"> {
  const graph = fieldsOf(body);
  const nodes = bodies(graph, GRAPH.node).map(nodeOf);
  const named = (number: number, name: number): string[] => bodies(graph, number).map((each) => text(each, name));
  const own = new Set([...named(GRAPH.input, VALUE.name), ...named(GRAPH.initializer, TENSOR.name), ...nodes.flatMap(({ outputs }) => outputs)]);
  const reads = [...nodes.flatMap((node) => node.reads), ...named(GRAPH.output, VALUE.name)];
  return { reads: reads.filter((name) => !own.has(name)), domains: nodes.flatMap(({ domains }) => domains) };
}

function sparseName(sparse: Uint8Array): string {
  return bodies(fieldsOf(sparse), SPARSE.values).map((values) => text(values, TENSOR.name)).at(-1) ?? "";
}

/** Read a ValueInfoProto. */
function specOf(value: Uint8Array): TensorSpec {
  const inside = (fields: readonly Field[], number: number): Field[] => bodies(fields, number).flatMap(fieldsOf);
  const fields = fieldsOf(value);
  const name = texts(fields, VALUE.name).at(-1) ?? "";
  const type = inside(fields, VALUE.type);
  if (!type.some(({ number }) => number === TYPE.tensor)) return { name, dtype: "no tensor", shape: [] };
  const tensor = inside(type, TYPE.tensor);
  const sides = bodies(inside(tensor, TENSOR_TYPE.shape), SHAPE.side);
  const shape = sides.map((side) => ints(fieldsOf(side), SIDE.size).at(-1) ?? null);
  return { name, dtype: DTYPES[int(tensor, TENSOR_TYPE.elementType)] ?? "unknown", shape };
}
