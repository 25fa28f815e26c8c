/**
 * Resizing in fixed point, antialiased but for `bilinear-opencv`: the horizontal pass, rounded and clipped to bytes, then the vertical pass. Only the
 * pixels of the crop are computed.
 */

export const INTERPOLATIONS = ["bicubic", "bilinear", "bilinear-opencv"] as const;
export type Interpolation = (typeof INTERPOLATIONS)[number];

/** Bits of a coefficient's fraction. Of the 32 bits of an int32, 8 are for the pixel and 2 for sign and overshoot. */
const PRECISION_BITS = 22;
const HALF = 1 << (PRECISION_BITS - 1);

/** The rectangle, in pixels, that is kept of an image resized to newWidth x newHeight. */
export interface Crop {
  readonly newWidth: number;
  readonly newHeight: number;
  readonly left: number;
  readonly top: number;
  readonly width: number;
  readonly height: number;
}

/** For each output pixel along one axis: the first source pixel, and the weights of the source pixels from there on. */
interface Taps {
  readonly first: Int32Array;
  readonly weights: readonly Int32Array[];
}

/** Resize an 8-bit RGB image and return the crop, 8-bit RGB. */
export function resizedCrop(
  image: { rgb: Uint8Array; width: number; height: number },
  interpolation: Interpolation,
  crop: Crop,
): Uint8Array {
  const filter = FILTERS[interpolation];
  const across = taps(image.width, crop.newWidth, crop.left, crop.width, filter);
  const down = taps(image.height, crop.newHeight, crop.top, crop.height, filter);
  const top = down.first[0]!;
  const bottom = down.first.at(-1)! + down.weights.at(-1)!.length;
  const rows = image.rgb.subarray(3 * image.width * top, 3 * image.width * bottom);
  const narrow = horizontal(rows, image.width, across);
  return vertical(narrow, 3 * crop.width, { ...down, first: down.first.map((row) => row - top) });
}

/** Resample rows of `width` RGB pixels to rows with one pixel for each tap. */
function horizontal(rows: Uint8Array, width: number, { first, weights }: Taps): Uint8Array {
  const height = rows.length / (3 * width);
  const out = new Uint8Array(height * first.length * 3);
  let at = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < first.length; x++) {
      const row = weights[x]!;
      let from = 3 * (y * width + first[x]!);
      let [r, g, b] = [HALF, HALF, HALF];
      for (let k = 0; k < row.length; k++, from += 3) {
        const weight = row[k]!;
        r += weight * rows[from]!;
        g += weight * rows[from + 1]!;
        b += weight * rows[from + 2]!;
      }
      out[at++] = byte(r);
      out[at++] = byte(g);
      out[at++] = byte(b);
    }
  return out;
}

/** Resample rows of `bytes` bytes to one row for each tap. */
function vertical(rows: Uint8Array, bytes: number, { first, weights }: Taps): Uint8Array {
  const out = new Uint8Array(first.length * bytes);
  const sums = new Int32Array(bytes);
  for (let y = 0; y < first.length; y++) {
    sums.fill(HALF);
    weights[y]!.forEach((weight, k) => {
      const from = (first[y]! + k) * bytes;
      for (let i = 0; i < bytes; i++) sums[i]! += weight * rows[from + i]!;
    });
    for (let i = 0; i < bytes; i++) out[y * bytes + i] = byte(sums[i]!);
  }
  return out;
}

function byte(sum: number): number {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Return the taps of output pixels from..from + count, for an axis of `size` pixels resized to `newSize`. */
function taps(size: number, newSize: number, from: number, count: number, filter: Filter): Taps {
  const scale = size / newSize;
  const stretch = filter.plain ? 1 : Math.max(1, scale); // antialiasing: when the image shrinks, the filter covers all source pixels
  const support = filter.support * stretch;
  const first = new Int32Array(count);
  const weights: Int32Array[] = [];
  for (let i = 0; i < count; i++) {
    const centre = (from + i + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(size, Math.trunc(centre + support + 0.5));
    const values = Array.from({ length: end - begin }, (_, k) => filter.at((begin + k - centre + 0.5) / stretch));
    const sum = values.reduce((a, b) => a + b, 0);
    first[i] = begin;
    weights.push(Int32Array.from(values, (value) => fixed(value / sum)));
  }
  return { first, weights };
}

/** Convert a weight to fixed point, rounding halves away from zero. */
function fixed(value: number): number {
  return Math.trunc(value * 2 ** PRECISION_BITS + (value < 0 ? -0.5 : 0.5));
}

/** A resampling filter. `at(x)`: weight at distance x, which is 0 beyond `support`. plain: without antialiasing. */
interface Filter {
  readonly support: number;
  readonly plain?: boolean;
  at(x: number): number;
}

const triangle = (x: number): number => Math.max(0, 1 - Math.abs(x));

const FILTERS: Record<Interpolation, Filter> = {
  bilinear: { support: 1, at: triangle },
  "bilinear-opencv": { support: 1, at: triangle, plain: true },
  /** Keys' cubic convolution, a = -0.5. */
  bicubic: {
    support: 2,
    at(x) {
      const d = Math.abs(x);
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
    },
  },
};
