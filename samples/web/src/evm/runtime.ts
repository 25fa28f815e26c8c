/** Running of an ONNX file in ONNX Runtime Web. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-web/wasm";

import { BundleError, reason, ToolchainError } from "./errors";
import type { Library } from "./kernels";
import { defaultThreads, loadOrt, type Ort } from "./ort";
import type { Provider } from "./provider";
import { SplitModel } from "./split";
import { checkFeeds, concatenate, isDtype, rows, specOf, specText, type Tensor, type Tensors, type TensorSpec } from "./tensor";

/** Options of running an ONNX file. */
export interface RunOptions {
  readonly provider: Provider;
  /** Threads of WebAssembly. Default: half the cores, at most 4, if the page is cross-origin isolated, else 1. */
  readonly threads?: number;
  /** Native library, which computes nodes of domain evm in one thread. Without one they run in their portable form. */
  readonly library?: Library | undefined;
}

/** An opened model. kernels: number of nodes that the native library computes. */
interface Session {
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  readonly kernels: number;
  run(feeds: Record<string, OrtTensor>): Promise<Readonly<Record<string, OrtTensor>>>;
  release(): Promise<void>;
}

/** A loaded ONNX file. */
export class Runtime {
  readonly inputs: readonly TensorSpec[];
  readonly outputs: readonly TensorSpec[];
  /** Number of nodes that the native library computes. */
  readonly kernels: number;
  private last: Promise<unknown> = Promise.resolve();

  private constructor(
    private readonly ort: Ort,
    private readonly session: Session,
    readonly threads: number,
  ) {
    ({ inputs: this.inputs, outputs: this.outputs, kernels: this.kernels } = session);
  }

  /** Load a model. Throws BundleError if the provider cannot run the model, UsageError if `threads` is invalid. */
  static async open(model: Uint8Array, { provider, threads = defaultThreads(), library }: RunOptions): Promise<Runtime> {
    const ort = await loadOrt(provider, threads);
    try {
      const options = { executionProviders: [provider], logSeverityLevel: 3 } as const;
      const session = library ? await SplitModel.open(ort, model, options, library) : await whole(ort, model, options);
      return new Runtime(ort, session, threads);
    } catch (error) {
      const what = `ONNX Runtime Web ${ort.env.versions.web} cannot open the model`;
      const hint = provider === "webgpu" ? "try WebAssembly: provider 'wasm'" : "";
      throw new BundleError(`${what} with ${provider}: ${reason(error)}`, hint, { cause: error });
    }
  }

  /** Run one inference. Calls run one after another. Throws UsageError if a tensor does not fit the inputs. */
  run(feeds: Tensors): Promise<Record<string, Tensor>> {
    const next = this.last.then(() => this.runNow(feeds));
    this.last = next.catch(() => undefined);
    return next;
  }

  /** Release the memory of the session, after the calls of run(). */
  async close(): Promise<void> {
    await this.last;
    await this.session.release();
  }

  private async runNow(feeds: Tensors): Promise<Record<string, Tensor>> {
    checkFeeds(this.inputs, feeds);
    const given: Record<string, OrtTensor> = {};
    for (const [name, { dtype, data, shape }] of Object.entries(feeds))
      given[name] = new this.ort.Tensor(dtype, data as Float32Array, shape);
    try {
      const found = Object.entries(await this.session.run(given));
      return Object.fromEntries(found.map(([name, value]) => [name, owned(value)]));
    } catch (error) {
      throw new ToolchainError(`ONNX Runtime Web ${this.ort.env.versions.web} failed: ${reason(error)}`, "", { cause: error });
    }
  }
}

/**
 * Run any number of images, batch by batch. For a static batch the last batch is filled up and its outputs are cut. Throws
 * BundleError if the outputs have another number of images than the inputs, or sizes that change between batches.
 */
export async function runBatched(
  runtime: Runtime,
  batch: { min: number; max: number | null },
  input: Tensor,
): Promise<Record<string, Tensor>> {
  const count = input.shape[0]!;
  const size = batch.max ?? count;
  const parts: Record<string, Tensor>[] = [];
  for (let begin = 0; begin < count; begin += size) {
    const chunk = rows(input, begin, Math.min(begin + size, count));
    const have = chunk.shape[0]!;
    const fill = Array.from({ length: Math.max(0, batch.min - have) }, () => rows(chunk, have - 1, have));
    const [into, fed] = [runtime.inputs[0]!.name, concatenate([chunk, ...fill])];
    const outputs = await runtime.run({ [into]: fed });
    for (const [name, value] of Object.entries(outputs)) {
      const like = parts[0]?.[name] ?? value;
      if (value.shape.join() !== [fed.shape[0], ...like.shape.slice(1)].join()) {
        const [gives, given] = [specText({ name, ...value }), specText({ name: into, ...fed })];
        throw new BundleError(`the model gives ${gives} for ${given}`, "export it again");
      }
    }
    parts.push(Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, rows(value, 0, have)])));
  }
  return Object.fromEntries(Object.keys(parts[0]!).map((name) => [name, concatenate(parts.map((part) => part[name]!))]));
}

/** Open a model that ONNX Runtime Web runs as a whole. */
async function whole(ort: Ort, model: Uint8Array, options: InferenceSession.SessionOptions): Promise<Session> {
  const session = await ort.InferenceSession.create(model, options);
  const [inputs, outputs] = [session.inputMetadata.map(specOf), session.outputMetadata.map(specOf)];
  return { inputs, outputs, kernels: 0, run: (feeds) => session.run(feeds), release: () => session.release() };
}

function owned(value: OrtTensor): Tensor {
  if (!isDtype(value.type)) throw new Error(`the model gives a tensor of unsupported type ${value.type}`);
  return { dtype: value.type, shape: value.dims, data: (value.data as Float32Array).slice() };
}
