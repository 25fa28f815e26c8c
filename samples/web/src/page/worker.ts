/** The worker. It does all work, so that the page stays responsive; `engine` has one function for each call of the page. */

import {
  Bundle,
  folderAt,
  folderOf,
  Model,
  pixelsOf,
  UsageError,
  zipped,
  type Check,
  type Choice,
  type Latency,
  type ModelOptions,
  type Prediction,
  type PreprocessingFacts,
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
  readonly classes: number | null;
  readonly bytes: number;
  readonly preprocessing: PreprocessingFacts;
  readonly provider: Choice;
  readonly threads: number;
  readonly loadMs: number;
}

/** Classes of an image, and the times. */
export interface Classified {
  readonly top: Prediction[];
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

  async classify(image: Blob | ImageBitmap, top: number): Promise<Classified> {
    const model = opened();
    const found = await topOf(model, image, top);
    return { top: found, milliseconds: model.milliseconds };
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

async function topOf(model: Model, image: Blob | ImageBitmap, top: number): Promise<Prediction[]> {
  if (image instanceof Blob) return model.classifyBlob(image, top);
  try {
    const { rgb, width, height } = await pixelsOf(image);
    return await model.classify(rgb, width, height, top);
  } finally {
    image.close();
  }
}

function facts({ manifest, labels, provider, threads, outputs }: Model, loadMs: number): Opened {
  const { name, precision, head, input, artifact, files, preprocessing } = manifest;
  const scores = outputs.find((output) => output.name === head);
  const classes = manifest.classifies ? (labels?.length || (scores?.shape.at(-1) ?? null)) : null;
  const bytes = files.get(artifact)!.size_bytes;
  return { name, precision, head, input, classes, bytes, preprocessing: preprocessing.facts, provider, threads, loadMs };
}

serve(engine);
