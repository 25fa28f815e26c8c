/** A bundle as an app uses it. */

import { latency, type Latency } from "./bench";
import type { Bundle } from "./bundle";
import { decode } from "./decode";
import { BundleError, UsageError } from "./errors";
import { checkInterface, checkScores } from "./interface";
import type { Manifest } from "./manifest";
import type { RgbImage } from "./preprocess";
import { chooseProvider, type Choice, type Provider } from "./provider";
import { Runtime, runBatched } from "./runtime";
import { selftest, type Check } from "./selftest";
import { float32, uint8, type Tensor, type Tensors, type TensorSpec } from "./tensor";

/** One class of an image. score: probability, 0..1. */
export interface Prediction {
  readonly label: string;
  readonly index: number;
  readonly score: number;
}

export interface ModelOptions {
  /** `auto`, the default: WebGPU where there is an adapter, else WebAssembly. `.provider` says which and why. */
  readonly provider?: Provider | "auto";
  readonly threads?: number;
}

export class Model {
  readonly manifest: Manifest;
  /** What the last image took, in milliseconds. */
  milliseconds = { preprocessing: 0, inference: 0 };

  private constructor(
    readonly bundle: Bundle,
    readonly provider: Choice,
    /** Class names, none where the export had none. */
    readonly labels: readonly string[],
    private readonly runtime: Runtime,
  ) {
    this.manifest = bundle.manifest;
  }

  /** Load a bundle's model. Throws BundleError; it never runs on another provider than `.provider` says. */
  static async open(bundle: Bundle, { provider = "auto", threads }: ModelOptions = {}): Promise<Model> {
    const { target, scans, artifact } = bundle.manifest;
    if (target !== "onnx")
      throw new UsageError(`bundle ${bundle.name} is for target '${target}', a browser runs 'onnx'`, "evm-export --target onnx");
    if (!scans.includes("portable"))
      throw new UsageError("this bundle's model has its scans as native nodes only", "export it with --scan portable");
    const choice = await chooseProvider(provider);
    const [labels, file] = [await bundle.labels(), await bundle.read(artifact)];
    const runtime = await Runtime.open(file, { provider: choice.value, ...(threads !== undefined && { threads }) });
    try {
      checkInterface(bundle, labels, runtime);
    } catch (error) {
      await runtime.close();
      throw error;
    }
    return new Model(bundle, choice, labels, runtime);
  }

  get inputs(): readonly TensorSpec[] {
    return this.runtime.inputs;
  }

  get outputs(): readonly TensorSpec[] {
    return this.runtime.outputs;
  }

  get threads(): number {
    return this.runtime.threads;
  }

  /** The `top` most probable classes of an image file, best first. Throws ImageError, UsageError, BundleError. */
  async classifyBlob(blob: Blob, top = 5): Promise<Prediction[]> {
    return this.classifyRgb(await decode(blob), top);
  }

  /** The same of 8-bit RGB, row by row. */
  classify(rgb: Uint8Array, width: number, height: number, top = 5): Promise<Prediction[]> {
    if (width < 1 || height < 1 || rgb.length !== 3 * width * height)
      throw new UsageError(`array image must be uint8 HxWx3, got ${rgb.length} bytes for [${height}, ${width}, 3]`);
    return this.classifyRgb({ rgb, width, height }, top);
  }

  /** One inference on tensors named and shaped as `inputs`. Throws UsageError naming what does not fit. */
  run(feeds: Tensors): Promise<Record<string, Tensor>> {
    return this.runtime.run(feeds);
  }

  /** Preprocessing, outputs and scans against the expected values in the bundle. */
  selftest(): Promise<Check[]> {
    return selftest(this.bundle, this.runtime, { provider: this.provider.value, threads: this.threads });
  }

  /** Latency of inferences of one batch, without preprocessing. */
  bench({ warmUp = 5, runs = 50 } = {}): Promise<Latency> {
    const { height, width } = this.manifest.preprocessing;
    const input = this.input(new Uint8Array(3 * height * width).fill(127));
    return latency(() => runBatched(this.runtime, this.manifest.batch, input), { warmUp, runs });
  }

  /** The memory that the runtime holds. */
  close(): Promise<void> {
    return this.runtime.close();
  }

  private async classifyRgb(rgbImage: RgbImage, top: number): Promise<Prediction[]> {
    const { head, batch, preprocessing } = this.manifest;
    if (!this.manifest.classifies) throw new UsageError(`this bundle gives ${head}, not classes`, "use run(feeds)");
    if (!(top >= 1)) throw new UsageError(`top is ${top}, it must be at least 1`);
    const start = performance.now();
    const input = this.input(preprocessing.pixels(rgbImage));
    const ready = performance.now();
    const outputs = await runBatched(this.runtime, batch, input);
    this.milliseconds = { preprocessing: ready - start, inference: performance.now() - ready };
    const scores = outputs[head]!;
    checkScores(this.bundle, this.labels, { name: head, ...scores });
    const values = Array.from(scores.data);
    if (!values.every(Number.isFinite))
      throw new BundleError(
        `bundle ${this.bundle.name}: the network gives NaN or Inf here`,
        `does it compute right on this device?  evm-run ${this.bundle.name} --selftest`,
      );
    return this.best(head === "probs" ? values : softmax(values), top);
  }

  /** Pixels (H, W, 3) as a batch of one. */
  private input(pixels: Uint8Array): Tensor {
    const { preprocessing, input } = this.manifest;
    const { height, width } = preprocessing;
    if (input === "image") return uint8(pixels, [1, height, width, 3]);
    return float32(preprocessing.normalise(pixels), [1, 3, height, width]);
  }

  private best(scores: readonly number[], top: number): Prediction[] {
    const order = scores.map((_, index) => index).sort((a, b) => scores[b]! - scores[a]! || a - b);
    return order.slice(0, top).map((index) => ({
      label: this.labels[index] ?? `class ${index}`,
      index,
      score: scores[index]!,
    }));
  }
}

function softmax(x: readonly number[]): number[] {
  const most = Math.max(...x);
  const powers = x.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}
