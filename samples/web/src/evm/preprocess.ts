/** Preprocessing of images to the pixels that a model reads, bit for bit equal to Python with Pillow. */

import { ImageError } from "./errors";
import { Geometry } from "./geometry";
import { resizedCrop, type Crop, type Interpolation } from "./resize";

export const MAX_SIDE = 8192;
export const MAX_CHANNELS = 1024;
export const RESIZES = ["crop", "stretch", "pad"] as const;
export type Resize = (typeof RESIZES)[number];

/** An upright 8-bit RGB image, row by row. name: name of the image in errors. */
export interface RgbImage {
  readonly name?: string;
  readonly rgb: Uint8Array;
  readonly width: number;
  readonly height: number;
}

/**
 * Preprocessing in a manifest. size: [H, W]. resize: crop if absent. crop_pct: for crop alone. mean, std: one value for each
 * channel of the network's input, for channels scaled to 0..1.
 */
export interface PreprocessingFacts {
  readonly size: readonly [number, number];
  readonly resize?: Resize;
  readonly crop_pct?: number;
  readonly interpolation: Interpolation;
  readonly mean: readonly number[];
  readonly std: readonly number[];
}

/**
 * Preprocessing of a bundle: make an image H x W, then normalise to (x / 255 - mean) / std. `crop` resizes the image until
 * it covers size / crop_pct and crops the centre; `stretch` resizes it to H x W; `pad` resizes it to fit, with the aspect
 * ratio kept, and fills the right and the bottom with the mean.
 */
export class Preprocessing {
  readonly height: number;
  readonly width: number;
  /** Number of channels of the network's input: 3 for RGB, 1 for grey. No images can be given for others. */
  readonly channels: number;
  readonly resize: Resize;

  constructor(readonly facts: PreprocessingFacts) {
    [this.height, this.width] = facts.size;
    this.channels = facts.mean.length;
    this.resize = facts.resize ?? "crop";
  }

  /** Tell whether images can be given. */
  get readsImages(): boolean {
    return this.channels === 1 || this.channels === 3;
  }

  /**
   * Make an image (H, W, channels) uint8: RGB, or the luminance for 1 channel. Throws ImageError if the image is too narrow
   * to be cropped, and for other numbers of channels.
   */
  pixels(rgbImage: RgbImage): Uint8Array {
    const { width, height, name } = rgbImage;
    if (!this.readsImages)
      throw new ImageError(`the network takes ${this.channels} channels: images here are grey or RGB`, "give tensors: run(feeds)");
    const place = shown(this.geometry(width, height, name));
    const grey = this.channels === 1;
    const found = resizedCrop(grey ? luminance(rgbImage) : rgbImage, this.facts.interpolation, place);
    return this.padded(grey ? found.filter((_, i) => i % 3 === 0) : found, place);
  }

  /** Normalise (H, W, channels) uint8 -> (channels, H, W) float32. A model whose input is `image` does this itself. */
  normalise(pixels: Uint8Array): Float32Array {
    const { channels } = this;
    const plane = this.height * this.width;
    const tensor = new Float32Array(channels * plane);
    for (let c = 0; c < channels; c++) {
      const shift = Math.fround(255 * Math.fround(this.facts.mean[c]!));
      const scale = Math.fround(255 * Math.fround(this.facts.std[c]!));
      for (let i = 0; i < plane; i++) tensor[c * plane + i] = Math.fround(pixels[channels * i + c]! - shift) / scale;
    }
    return tensor;
  }

  /** Return the place of an upright image of this size in the network's input. Throws ImageError if it is too narrow to be cropped. */
  geometry(width: number, height: number, name?: string): Geometry {
    const place = this.place(width, height);
    if (this.resize === "crop" && Math.max(...place.resized) > 100 * Math.max(this.height, this.width))
      throw new ImageError(
        `${name ? `image ${name}` : "image"} is ${width}x${height}: too narrow to be cropped to ${this.width}x${this.height}`,
        "",
        { code: "image.narrow" },
      );
    return place;
  }

  /** Return the part of an image that the network sees, in pixels of the image. */
  seen(width: number, height: number): { x: number; y: number; width: number; height: number } {
    const place = this.place(width, height);
    const { top, left, bottom, right } = place.content;
    const [x1, y1, x2, y2] = place.toImage([left, top, right, bottom]);
    return { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
  }

  /** Return the place of an image, which may be too narrow. */
  private place(width: number, height: number): Geometry {
    const size = [this.height, this.width] as const;
    if (this.resize === "crop") {
      const resized = this.covering(width, height);
      const cut = (axis: 0 | 1): number => 0 - roundHalfEven((resized[axis] - size[axis]) / 2);
      return new Geometry([height, width], resized, size, [cut(0), cut(1)]);
    }
    const scale = Math.min(this.height / height, this.width / width);
    const fitted = (side: number): number => Math.max(1, Math.trunc(side * scale + 0.5));
    return new Geometry([height, width], this.resize === "pad" ? [fitted(height), fitted(width)] : size, size, [0, 0]);
  }

  /** Fill the right and the bottom of an image with the mean's pixel. */
  private padded(pixels: Uint8Array, { width, height }: Crop): Uint8Array {
    const { channels } = this;
    if (width === this.width && height === this.height) return pixels;
    const fill = this.facts.mean.map((mean) => Math.min(255, Math.max(0, roundHalfEven(255 * mean))));
    const canvas = Uint8Array.from({ length: this.height * this.width * channels }, (_, i) => fill[i % channels]!);
    for (let y = 0; y < height; y++)
      canvas.set(pixels.subarray(y * width * channels, (y + 1) * width * channels), y * this.width * channels);
    return canvas;
  }

  /** Return the size [H, W] to which an image is resized before the crop. */
  private covering(width: number, height: number): [number, number] {
    const share = this.facts.crop_pct ?? 1;
    const wantHeight = roundHalfEven(this.height / share);
    const wantWidth = roundHalfEven(this.width / share);
    const [newHeight, newWidth] =
      wantHeight * width >= wantWidth * height
        ? [wantHeight, Math.max(1, Math.trunc((wantHeight * width) / height))]
        : [Math.max(1, Math.trunc((wantWidth * height) / width)), wantWidth];
    return [Math.max(newHeight, this.height), Math.max(newWidth, this.width)];
  }
}

/** Return the size to which an image is resized, and the part of the resized image that the network sees. */
function shown({ resized: [newHeight, newWidth], offset, content }: Geometry): Crop {
  const { top, left, bottom, right } = content;
  return { newWidth, newHeight, width: right - left, height: bottom - top, left: left - offset[1], top: top - offset[0] };
}

/** Return the luminance of an image as Pillow computes it, three times for each pixel, so that it resizes as RGB does. */
function luminance(image: RgbImage): RgbImage {
  const { rgb, width, height } = image;
  const grey = new Uint8Array(rgb.length);
  for (let i = 0; i < rgb.length; i += 3)
    grey.fill((rgb[i]! * 19595 + rgb[i + 1]! * 38470 + rgb[i + 2]! * 7471 + 0x8000) >> 16, i, i + 3);
  return { rgb: grey, width, height };
}

/** Round halves to the even neighbour, as Python does. */
function roundHalfEven(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}
