/** The worker. It does all work, so that the page stays responsive; `engine` has one function for each call of the page. */

import {
  Bundle,
  decode,
  folderAt,
  folderOf,
  Model,
  pixelsOf,
  UsageError,
  zipped,
  type Check,
  type Choice,
  type Detection,
  type LabelMap,
  type Latency,
  type Lowering,
  type ModelOptions,
  type Prediction,
  type PreprocessingFacts,
  type RgbImage,
} from "../evm";
import { serve } from "./rpc";

/** Location of a bundle. */
export type Place = { url: string } | { zip: File } | { folder: string; files: ReadonlyMap<string, File> };

/** Facts about an opened bundle that the page shows. */
export interface Opened {
  readonly name: string;
  readonly precision: string;
  readonly head: string;
  readonly input: string;
  readonly gives: string;
  readonly predicts: boolean;
  readonly labels: readonly string[];
  readonly palette: readonly (readonly [number, number, number])[];
  readonly bytes: number;
  readonly preprocessing: PreprocessingFacts;
  readonly provider: Choice;
  readonly scan: Choice<Lowering>;
  readonly threads: number;
  readonly loadMs: number;
}

/** The answer for an image of this size: its classes, its detections or its label map. */
export type Answer = { top: Prediction[] } | { detections: Detection[] } | { labelMap: LabelMap };
export interface Predicted {
  readonly answer: Answer;
  readonly width: number;
  readonly height: number;
  readonly milliseconds: { readonly preprocessing: number; readonly inference: number };
}

export type Engine = typeof engine;

let model: Model | null = null;

const engine = {
  /** Open a bundle and run the model once, because the first run is slow. Closes the previous model after that. */
  async open(place: Place, options: ModelOptions): Promise<Opened> {
    const start = performance.now();
    const next = await Model.open(await Bundle.open(await sourceOf(place)), options);
    await next.bench({ warmUp: 0, runs: 1 });
    await model?.close();
    model = next;
    return facts(next, performance.now() - start);
  },

  async predict(image: Blob | ImageBitmap, top: number): Promise<Predicted> {
    const model = opened();
    const rgbImage = await rgbOf(image);
    const answer = await answerOf(model, rgbImage, top);
    return { answer, width: rgbImage.width, height: rgbImage.height, milliseconds: model.milliseconds };
  },

  selftest(): Promise<Check[]> {
    return opened().selftest();
  },

  bench(): Promise<Latency> {
    return opened().bench();
  },
};

function opened(): Model {
  if (!model) throw new UsageError("no bundle is open");
  return model;
}

async function sourceOf(place: Place): ReturnType<typeof zipped> {
  if ("url" in place) return folderAt(place.url);
  return "zip" in place ? zipped(place.zip) : folderOf(place.files, place.folder);
}

async function rgbOf(image: Blob | ImageBitmap): Promise<RgbImage> {
  if (image instanceof Blob) return decode(image);
  try {
    return await pixelsOf(image);
  } finally {
    image.close();
  }
}

async function answerOf(model: Model, rgbImage: RgbImage, top: number): Promise<Answer> {
  if (model.manifest.head === "detections") return { detections: await model.detectRgb(rgbImage) };
  if (model.manifest.head === "label_map") return { labelMap: await model.segmentRgb(rgbImage) };
  return { top: await model.classifyRgb(rgbImage, top) };
}

function facts({ manifest, labels, provider, scan, threads, outputs }: Model, loadMs: number): Opened {
  const { name, precision, head, input, artifact, files, preprocessing } = manifest;
  const scores = outputs.find((output) => output.name === head);
  const classes = labels.length || (manifest.classifies && scores?.shape.at(-1)) || 0;
  const kind = { detections: "detector", label_map: "segmenter" }[head as string];
  const of = classes ? `${classes} ${classes === 1 ? "class" : "classes"}` : "";
  const gives = manifest.classifies ? of : [kind ?? "feature maps", of].filter((part) => part).join(", ");
  const bytes = files.get(artifact)!.size_bytes;
  const predicts = manifest.classifies || kind !== undefined;
  return { ...{ name, precision, head, input, gives, predicts, labels, bytes }, palette: manifest.palette, preprocessing: preprocessing.facts, provider, scan, threads, loadMs };
}

serve(engine);
