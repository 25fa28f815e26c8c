/** From an image to the pixels a model reads, to the last bit as evm-deploy's Python makes them with Pillow. */

import { ImageError } from "./errors";
import { resizedCrop, type Interpolation } from "./resize";

export const MAX_SIDE = 8192;

/** 8-bit RGB, row by row, upright. name: of its file, for messages. */
export interface RgbImage {
  readonly name?: string;
  readonly rgb: Uint8Array;
  readonly width: number;
  readonly height: number;
}

/** As in the manifest. size: [H, W]. mean, std: of channels scaled to 0..1. */
export interface PreprocessingFacts {
  readonly size: readonly [number, number];
  readonly crop_pct: number;
  readonly interpolation: Interpolation;
  readonly mean: readonly [number, number, number];
  readonly std: readonly [number, number, number];
}

/** Resize so that the image covers size / crop_pct, antialiased; crop the centre; (x / 255 - mean) / std. */
export class Preprocessing {
  readonly height: number;
  readonly width: number;

  constructor(readonly facts: PreprocessingFacts) {
    [this.height, this.width] = facts.size;
  }

  /** -> the model's (H, W, 3) uint8. Throws ImageError for an image too narrow to be cropped. */
  pixels(rgbImage: RgbImage): Uint8Array {
    const { width, height, name } = rgbImage;
    const [newHeight, newWidth] = this.covering(width, height);
    if (Math.max(newHeight, newWidth) > 100 * Math.max(this.height, this.width))
      throw new ImageError(
        `${name ? `image ${name}` : "image"} is ${width}x${height}: too narrow to be cropped to ${this.width}x${this.height}`,
        "",
        { code: "image.narrow" },
      );
    return resizedCrop(rgbImage, this.facts.interpolation, {
      ...{ newWidth, newHeight, width: this.width, height: this.height },
      left: roundHalfEven((newWidth - this.width) / 2),
      top: roundHalfEven((newHeight - this.height) / 2),
    });
  }

  /** (H, W, 3) uint8 -> (3, H, W) float32: what a model does itself when its input is `image`. */
  normalise(pixels: Uint8Array): Float32Array {
    const plane = this.height * this.width;
    const tensor = new Float32Array(3 * plane);
    for (let c = 0; c < 3; c++) {
      const shift = Math.fround(255 * Math.fround(this.facts.mean[c]!));
      const scale = Math.fround(255 * Math.fround(this.facts.std[c]!));
      for (let i = 0; i < plane; i++) tensor[c * plane + i] = Math.fround(pixels[3 * i + c]! - shift) / scale;
    }
    return tensor;
  }

  /** The part of an image that the model sees, in the image's pixels. */
  seen(width: number, height: number): { x: number; y: number; width: number; height: number } {
    const [newHeight, newWidth] = this.covering(width, height);
    const [w, h] = [(this.width * width) / newWidth, (this.height * height) / newHeight];
    return { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h };
  }

  /** [H, W] that an image is resized to before the crop. */
  private covering(width: number, height: number): [number, number] {
    const wantHeight = roundHalfEven(this.height / this.facts.crop_pct);
    const wantWidth = roundHalfEven(this.width / this.facts.crop_pct);
    const [newHeight, newWidth] =
      wantHeight * width >= wantWidth * height
        ? [wantHeight, Math.max(1, Math.trunc((wantHeight * width) / height))]
        : [Math.max(1, Math.trunc((wantWidth * height) / width)), wantWidth];
    return [Math.max(newHeight, this.height), Math.max(newWidth, this.width)];
  }
}

/** Halves go to the even neighbour, as Python rounds. */
function roundHalfEven(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}
