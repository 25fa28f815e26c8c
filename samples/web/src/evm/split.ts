/** A model in pieces: the native library computes nodes of domain evm, ONNX Runtime Web the rest of the graph between them. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-web/wasm";

import { reason } from "./errors";
import type { Floats, Kernels, Library } from "./kernels";
import { OnnxFile, type Node } from "./onnx";
import type { Ort } from "./ort";
import { specOf, type TensorSpec } from "./tensor";

type Values = Map<string, OrtTensor>;

/** An opened part of the graph. gives: values that it adds to those that it reads, when it runs. */
interface Step {
  readonly gives: readonly TensorSpec[];
  run(values: Values): Promise<void>;
  release(): Promise<void>;
}

/** An opened model. */
export class SplitModel {
  private constructor(
    readonly inputs: readonly TensorSpec[],
    readonly outputs: readonly TensorSpec[],
    private readonly steps: readonly Step[],
    /** Number of nodes that the native library computes. */
    readonly kernels: number,
  ) {}

  /**
   * Cut a model at the nodes that the library computes, and open the pieces. Nodes in subgraphs and in functions are not cut out:
   * they run in their portable form. Throws Error with the reason.
   */
  static async open(ort: Ort, model: Uint8Array, options: InferenceSession.SessionOptions, library: Library): Promise<SplitModel> {
    const file = new OnnxFile(model);
    const kernels = await library.kernels();
    const computes = (node: Node): boolean => kernels.computes(node) && !file.isConstant(node.inputs[0]!);
    const parts = cut(file, computes);
    const steps: Step[] = [];
    const specs = new Map(file.inputs.map((spec) => [spec.name, spec]));
    try {
      for (const part of parts) {
        const takes = part.takes.map((name) => specs.get(name)!);
        const step = "nodes" in part ? await pieceStep(ort, file, options, part, takes) : kernelStep(ort, file, kernels, part.node, takes);
        steps.push(step);
        for (const spec of step.gives) specs.set(spec.name, spec);
      }
    } catch (error) {
      await Promise.all(steps.map((step) => step.release()));
      throw error;
    }
    const outputs = file.outputs.map((name) => specs.get(name)!);
    return new SplitModel(file.inputs, outputs, steps, parts.filter((part) => "node" in part).length);
  }

  /** Run one inference. */
  async run(feeds: Readonly<Record<string, OrtTensor>>): Promise<Record<string, OrtTensor>> {
    const values: Values = new Map(Object.entries(feeds));
    for (const step of this.steps) await step.run(values);
    return Object.fromEntries(this.outputs.map(({ name }) => [name, values.get(name)!]));
  }

  /** Release the memory of all pieces. */
  async release(): Promise<void> {
    await Promise.all(this.steps.map((step) => step.release()));
  }
}

interface Piece {
  readonly nodes: readonly Node[];
  readonly takes: readonly string[];
  readonly gives: readonly string[];
}
type Part = Piece | { readonly node: Node; readonly takes: readonly string[] };

/**
 * Cut the nodes of a graph, which are in an order of computation, at those that `alone` accepts. A piece takes the values that it
 * reads and does not make, and gives those that a later part or the output of the graph reads.
 */
function cut(file: OnnxFile, alone: (node: Node) => boolean): Part[] {
  const groups: Node[][] = [];
  let open = false; // whether the last group may take more nodes
  for (const node of file.nodes) {
    const single = alone(node);
    if (open && !single) groups.at(-1)!.push(node);
    else groups.push([node]);
    open = !single;
  }
  const parts: Part[] = [];
  const wanted = new Set(file.outputs); // by the parts that follow
  for (const nodes of groups.reverse()) {
    const made = new Set(nodes.flatMap(({ outputs }) => outputs));
    const takes = [...new Set(nodes.flatMap(({ reads }) => reads))].filter((name) => !made.has(name) && !file.isConstant(name));
    const gives = [...made].filter((name) => wanted.delete(name));
    if (gives.length === 0) continue;
    for (const name of takes) wanted.add(name);
    parts.push(alone(nodes[0]!) ? { node: nodes[0]!, takes } : { nodes, takes, gives });
  }
  for (const { name } of file.inputs) wanted.delete(name);
  const [missing] = wanted;
  if (missing !== undefined) throw new Error(`no node gives ${missing}`);
  return parts.reverse();
}

async function pieceStep(
  ort: Ort,
  file: OnnxFile,
  options: InferenceSession.SessionOptions,
  { nodes, gives }: Piece,
  takes: readonly TensorSpec[],
): Promise<Step> {
  const session = await ort.InferenceSession.create(file.piece(nodes, takes, gives), options);
  return {
    gives: session.outputMetadata.map(specOf),
    async run(values) {
      const feeds = Object.fromEntries(takes.map(({ name }) => [name, values.get(name)!]));
      for (const [name, value] of Object.entries(await session.run(feeds))) values.set(name, value);
    },
    release: () => session.release(),
  };
}

function kernelStep(ort: Ort, file: OnnxFile, kernels: Kernels, node: Node, takes: readonly TensorSpec[]): Step {
  const constants = node.inputs.filter((name) => file.isConstant(name));
  const compute = named(node, () => kernels.open(node, new Map(constants.map((name) => [name, file.constant(name)]))));
  const [input, output] = [takes.find(({ name }) => name === node.inputs[0])!, node.outputs[0]!];
  return {
    gives: [{ ...input, name: output }],
    async run(values) {
      const inputs = new Map(takes.map(({ name }) => [name, floatsOf(name, values.get(name)!)]));
      const { shape, data } = named(node, () => compute(inputs));
      values.set(output, new ort.Tensor("float32", data, shape));
    },
    release: () => Promise.resolve(),
  };
}

/** Call `act`. Its errors get the name of the native library, and the output of the node. */
function named<T>(node: Node, act: () => T): T {
  try {
    return act();
  } catch (error) {
    throw new Error(`the native library, for ${node.outputs[0]}: ${reason(error)}`, { cause: error });
  }
}

function floatsOf(name: string, { type, dims, data }: OrtTensor): Floats {
  if (type !== "float32") throw new Error(`${name} is ${type}, the native library takes float32`);
  return { shape: dims, data: data as Float32Array };
}
