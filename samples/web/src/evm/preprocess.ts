/** Preprocessing of images to the pixels that a model reads, bit for bit equal to Python with Pillow. */

import { ImageError } from "./errors";
import { resizedCrop, type Interpolation } from "./resize";

export const MAX_SIDE = 8192;

/** An upright 8-bit RGB image, row by row. name: name of the image in errors. */
export interface RgbImage {
  readonly name?: string;
  readonly rgb: Uint8Array;
  readonly width: number;
  readonly height: number;
}

/** Preprocessing in a manifest. size: [H, W]. mean, std: for channels scaled to 0..1. */
export interface PreprocessingFacts {
  readonly size: readonly [number, number];
  readonly crop_pct: number;
  readonly interpolation: Interpolation;
  readonly mean: readonly [number, number, number];
  readonly std: readonly [number, number, number];
}

/**
 * Preprocessing of a bundle: resize the image, with antialiasing, until it covers size / crop_pct; crop the centre;
 * normalise to (x / 255 - mean) / std.
 */
export class Preprocessing {
  readonly height: number;
  readonly width: number;

  constructor(readonly facts: PreprocessingFacts) {
    [this.height, this.width] = facts.size;
  }

  /** Resize and crop an image to (H, W, 3) uint8. Throws ImageError if the image is too narrow to be cropped. */
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

  /** Normalise (H, W, 3) uint8 -> (3, H, W) float32. A model whose input is `image` does this itself. */
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

  /** Return the part of an image that the crop keeps, in pixels of the image. */
  seen(width: number, height: number): { x: number; y: number; width: number; height: number } {
    const [newHeight, newWidth] = this.covering(width, height);
    const [w, h] = [(this.width * width) / newWidth, (this.height * height) / newHeight];
    return { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h };
  }

  /** Return the size [H, W] to which an image is resized before the crop. */
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

/** Round halves to the even neighbour, as Python does. */
function roundHalfEven(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}
