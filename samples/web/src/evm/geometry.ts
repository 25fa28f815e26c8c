/** Place of an image in a network's input, and the way back from network pixels to the image. */

import type { Tensor } from "./tensor";

/** Corners of a box: x1, y1, x2, y2 in pixels, from the left and the top edge of the image. */
export type Box = readonly [x1: number, y1: number, x2: number, y2: number];

type Pair = readonly [vertical: number, horizontal: number];

/** Class of each pixel of an image. map: row by row, from 0; Int32Array for more than 256 classes. */
export interface LabelMap {
  readonly map: Uint8Array | Int32Array;
  readonly width: number;
  readonly height: number;
}

/**
 * Place of an image in the network's input, after the resize and the crop or the padding. original, resized, size: [H, W] of
 * the image, of the resized image and of the input. offset: [top, left] of the resized image in the input, negative where
 * the crop cuts it. All in pixels; pixel i covers i to i + 1.
 */
export class Geometry {
  constructor(
    readonly original: Pair,
    readonly resized: Pair,
    readonly size: Pair,
    readonly offset: Pair,
  ) {}

  /** The part of the input that shows the image, without padding. */
  get content(): { top: number; left: number; bottom: number; right: number } {
    const first = (axis: 0 | 1): number => Math.max(0, this.offset[axis]);
    const last = (axis: 0 | 1): number => Math.min(this.size[axis], this.offset[axis] + this.resized[axis]);
    return { top: first(0), left: first(1), bottom: last(0), right: last(1) };
  }

  /** Map a box in pixels of the input to pixels of the image. Nothing is clipped. */
  toImage(box: Box): Box {
    const [top, left] = this.offset;
    const [down, across] = [this.resized[0] / this.original[0], this.resized[1] / this.original[1]];
    return [(box[0] - left) / across, (box[1] - top) / down, (box[2] - left) / across, (box[3] - top) / down];
  }

  /**
   * Map labels [H, W] of the input to those of the nearest pixels of the image, with the same result as in Python. A pixel
   * that a crop leaves out gets the label of the nearest pixel inside.
   */
  mapToImage(labels: Uint8Array | Int32Array): LabelMap {
    const { top, left, bottom, right } = this.content;
    const [rows, columns] = [this.nearest(0, top, bottom), this.nearest(1, left, right)];
    const [height, width] = this.original;
    const map = new (labels.constructor as typeof Int32Array)(width * height) as Uint8Array | Int32Array;
    let to = 0;
    for (const y of rows) for (const x of columns) map[to++] = labels[y * this.size[1] + x]!;
    return { map, width, height };
  }

  /** Return the network pixel of each pixel of an axis of the image. All numbers are whole, so the division is exact. */
  private nearest(axis: 0 | 1, first: number, last: number): number[] {
    const [original, resized, offset] = [this.original[axis], this.resized[axis], this.offset[axis]];
    const at = (i: number): number => Math.floor(((2 * i + 1) * resized) / (2 * original)) + offset;
    return Array.from({ length: original }, (_, i) => Math.min(Math.max(at(i), first), last - 1));
  }
}

/** Return the label map of image 0 of an output [n, H, W]. */
export function labelMapOf({ data, shape }: Tensor, place: Geometry): LabelMap {
  return place.mapToImage(data.subarray(0, shape[1]! * shape[2]!) as Uint8Array | Int32Array);
}
