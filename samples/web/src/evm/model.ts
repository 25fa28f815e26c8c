/** The model of a bundle: classification, detection, segmentation, inference, self-test and benchmark. */

import { latency, type Latency } from "./bench";
import type { Bundle } from "./bundle";
import { decode } from "./decode";
import { BundleError, UsageError } from "./errors";
import { detectionsOf, type Detection } from "./detections";
import { labelMapOf, type LabelMap } from "./geometry";
import { checkInterface, checkOutputs } from "./interface";
import type { Library } from "./kernels";
import { chooseLowering, nothingNative, type Lowering, type SCANS } from "./lowering";
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

/** Options of opening a model. */
export interface ModelOptions {
  /** Execution provider. `auto`, the default: WebGPU if there is an adapter, else WebAssembly. See `Model.provider`. */
  readonly provider?: Provider | "auto";
  /**
   * Lowering of scans. `auto`, the default: the native library of the bundle if there is one for browsers and the provider is
   * WebAssembly, else portable. `bundled`: the native library, or an error. `portable`: no native library. See `Model.scan`.
   */
  readonly scan?: (typeof SCANS)[number];
  /** Threads of WebAssembly; see RunOptions. */
  readonly threads?: number;
}

/** A loaded model. */
export class Model {
  readonly manifest: Manifest;
  /** Times of the last image in milliseconds. */
  milliseconds = { preprocessing: 0, inference: 0 };

  private constructor(
    readonly bundle: Bundle,
    /** The execution provider and the reason for it. */
    readonly provider: Choice,
    /** The lowering of scans and the reason for it. */
    readonly scan: Choice<Lowering>,
    /** Class names; empty if the bundle has none. */
    readonly labels: readonly string[],
    private readonly runtime: Runtime,
    private readonly library?: Library,
  ) {
    this.manifest = bundle.manifest;
  }

  /**
   * Load the model of a bundle. The model never runs on another provider or lowering than asked for. Throws BundleError if the
   * bundle is damaged or the provider cannot run the model, UsageError if the bundle is for another target or an option is wrong.
   */
  static async open(bundle: Bundle, { provider = "auto", threads, scan = "auto" }: ModelOptions = {}): Promise<Model> {
    const { target, artifact } = bundle.manifest;
    if (target !== "onnx")
      throw new UsageError(`bundle ${bundle.name} is for target '${target}', a browser runs 'onnx'`, "export with evm-export --target onnx");
    const choice = await chooseProvider(provider);
    let { library, ...lowering } = await chooseLowering(bundle, scan, choice.value);
    const [labels, file] = [await bundle.labels(), await bundle.read(artifact)];
    const runtime = await Runtime.open(file, { provider: choice.value, library, ...(threads !== undefined && { threads }) });
    try {
      if (library && !runtime.kernels) [library, lowering] = [undefined, nothingNative(scan)];
      checkInterface(bundle, labels, runtime);
    } catch (error) {
      await runtime.close();
      throw error;
    }
    return new Model(bundle, choice, lowering, labels, runtime, library);
  }

  /** Inputs of the model. */
  get inputs(): readonly TensorSpec[] {
    return this.runtime.inputs;
  }

  /** Outputs of the model. */
  get outputs(): readonly TensorSpec[] {
    return this.runtime.outputs;
  }

  /** Number of threads of WebAssembly. */
  get threads(): number {
    return this.runtime.threads;
  }

  /**
   * Return the `top` most probable classes of an image file, most probable first. Throws ImageError if the image cannot be
   * read or cropped, UsageError if the model is not a classifier, and BundleError if the network gives NaN or Inf.
   */
  async classifyBlob(blob: Blob, top = 5): Promise<Prediction[]> {
    return this.classifyRgb(await decode(blob), top);
  }

  /** Return the `top` most probable classes of an 8-bit RGB image, given row by row. Throws as classifyBlob does. */
  classify(rgb: Uint8Array, width: number, height: number, top = 5): Promise<Prediction[]> {
    return this.classifyRgb({ rgb, width, height }, top);
  }

  /** Return the detections of an image file, by falling score. Throws as classifyBlob does, UsageError if the model is not a detector. */
  async detectBlob(blob: Blob): Promise<Detection[]> {
    return this.detectRgb(await decode(blob));
  }

  /** Return the detections of an 8-bit RGB image, given row by row. Throws as detectBlob does. */
  detect(rgb: Uint8Array, width: number, height: number): Promise<Detection[]> {
    return this.detectRgb({ rgb, width, height });
  }

  /** Return the class of each pixel of an image file. Throws as classifyBlob does, UsageError if the model is not a segmenter. */
  async segmentBlob(blob: Blob): Promise<LabelMap> {
    return this.segmentRgb(await decode(blob));
  }

  /** Return the class of each pixel of an 8-bit RGB image, given row by row. Throws as segmentBlob does. */
  segment(rgb: Uint8Array, width: number, height: number): Promise<LabelMap> {
    return this.segmentRgb({ rgb, width, height });
  }

  /** Run one inference on tensors with the names and shapes of `inputs`. Throws UsageError if a tensor does not fit. */
  run(feeds: Tensors): Promise<Record<string, Tensor>> {
    return this.runtime.run(feeds);
  }

  /** Compare preprocessing, outputs and scans with the expected values in the bundle. Throws BundleError if there are none. */
  selftest(): Promise<Check[]> {
    return selftest(this.bundle, this.runtime, { provider: this.provider.value, threads: this.threads, library: this.library });
  }

  /** Measure the latency of inferences of one batch, without preprocessing. */
  bench({ warmUp = 5, runs = 50 } = {}): Promise<Latency> {
    const { height, width, channels } = this.manifest.preprocessing;
    const input = this.input(new Uint8Array(channels * height * width).fill(127));
    return latency(() => runBatched(this.runtime, this.manifest.batch, input), { warmUp, runs });
  }

  /** Release the memory of the runtime. */
  close(): Promise<void> {
    return this.runtime.close();
  }

  /** Return the classes of an image from `decode` or `pixelsOf`. Throws as classifyBlob does. */
  async classifyRgb(rgbImage: RgbImage, top = 5): Promise<Prediction[]> {
    const { head, classifies } = this.manifest;
    this.require(classifies, "classes");
    if (!(top >= 1)) throw new UsageError(`top is ${top}, it must be at least 1`);
    const values = Array.from((await this.outputsOf(rgbImage))[head]!.data);
    return this.best(head === "probs" ? values : softmax(values), top);
  }

  /** Return the detections of an image from `decode` or `pixelsOf`. Throws as detectBlob does. */
  async detectRgb(rgbImage: RgbImage): Promise<Detection[]> {
    const { head, preprocessing, selection } = this.manifest;
    this.require(head === "detections", "boxes");
    const outputs = await this.outputsOf(rgbImage);
    return detectionsOf(outputs, 0, selection, preprocessing.geometry(rgbImage.width, rgbImage.height), this.labels);
  }

  /** Return the class of each pixel of an image from `decode` or `pixelsOf`. Throws as segmentBlob does. */
  async segmentRgb(rgbImage: RgbImage): Promise<LabelMap> {
    const { head, preprocessing } = this.manifest;
    this.require(head === "label_map", "label maps");
    const outputs = await this.outputsOf(rgbImage);
    return labelMapOf(outputs[head]!, preprocessing.geometry(rgbImage.width, rgbImage.height));
  }

  private require(can: boolean, what: string): void {
    if (!can) throw new UsageError(`no ${what} to predict: the bundle gives ${this.manifest.head}`, "use run(feeds)");
  }

  /** Preprocess an image, run the model and return its outputs, checked. */
  private async outputsOf(rgbImage: RgbImage): Promise<Tensors> {
    const { batch, preprocessing } = this.manifest;
    const { rgb, width, height } = rgbImage;
    if (width < 1 || height < 1 || rgb.length !== 3 * width * height)
      throw new UsageError(`array image must be uint8 HxWx3, got ${rgb.length} bytes for [${height}, ${width}, 3]`);
    const start = performance.now();
    const input = this.input(preprocessing.pixels(rgbImage));
    const ready = performance.now();
    const outputs = await runBatched(this.runtime, batch, input);
    this.milliseconds = { preprocessing: ready - start, inference: performance.now() - ready };
    checkOutputs(this.bundle, this.labels, Object.entries(outputs).map(([name, value]) => ({ name, ...value })));
    if (!Object.values(outputs).every(({ data }) => data.every(Number.isFinite)))
      throw new BundleError(
        `bundle ${this.bundle.name}: the network gives NaN or Inf on this device`,
        "run the self-test in this browser",
      );
    return outputs;
  }

  /** Make the model's input, a batch of one, from pixels (H, W, channels). */
  private input(pixels: Uint8Array): Tensor {
    const { preprocessing, input } = this.manifest;
    const { height, width, channels } = preprocessing;
    if (input === "image") return uint8(pixels, [1, height, width, channels]);
    return float32(preprocessing.normalise(pixels), [1, channels, height, width]);
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

/** Probabilities of the logits of one image. The logit of a single class is against 0, that of its absence. */
function softmax(x: readonly number[]): number[] {
  if (x.length === 1) return [1 / (1 + Math.exp(-x[0]!))];
  const most = Math.max(...x);
  const powers = x.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}
