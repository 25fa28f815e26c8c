/** Decoding of image files and camera frames to upright 8-bit RGB, without changing the values in the file. */

import { ImageError, ToolchainError, reason } from "./errors";
import type { RgbImage } from "./preprocess";

/** Largest number of pixels, as in Pillow; a larger image may be a decompression bomb. */
const MAX_PIXELS = 178_956_970;
const AS_STORED: ImageBitmapOptions = { premultiplyAlpha: "none", colorSpaceConversion: "none" };

/**
 * Decode an image as Python does: apply the EXIF rotation, drop alpha without multiplying it in, scale 16 bits to 8, and
 * convert no colours. `name` names the image in errors. Throws ImageError if the browser cannot decode the image, or the
 * image is too large.
 */
export async function decode(blob: Blob, name = blob instanceof File ? blob.name : "image"): Promise<RgbImage> {
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(blob, AS_STORED);
  } catch (error) {
    throw new ImageError(`image ${name} is not an image that this browser can read`, "", { cause: error });
  }
  try {
    if (bitmap.width * bitmap.height > MAX_PIXELS)
      throw new ImageError(`image ${name} is too large: ${bitmap.width}x${bitmap.height}`);
    return { ...(await pixelsOf(bitmap)), name };
  } finally {
    bitmap.close();
  }
}

/**
 * Return the pixels of a bitmap that was made without premultiplied alpha. A canvas would premultiply alpha; a VideoFrame
 * returns the pixels unchanged, with the rotation that is still to be applied. Throws ToolchainError if the browser has no
 * WebCodecs.
 */
export async function pixelsOf(bitmap: ImageBitmap): Promise<RgbImage> {
  if (typeof VideoFrame === "undefined")
    throw new ToolchainError("this browser has no WebCodecs, which are needed to read pixels", "use a browser of 2024 or newer");
  const frame = new VideoFrame(bitmap, { timestamp: 0 });
  try {
    const bytes = new Uint8Array(frame.allocationSize());
    const [plane] = await frame.copyTo(bytes);
    const { width, height } = frame.visibleRect ?? { width: frame.codedWidth, height: frame.codedHeight };
    const red = frame.format?.startsWith("RGB") ? 0 : frame.format?.startsWith("BGR") ? 2 : undefined;
    if (red === undefined || !plane) throw new Error(`unsupported pixel format ${frame.format}`);
    return upright(bytes.subarray(plane.offset), { width, height, stride: plane.stride, red }, frame as VideoFrame & Turn);
  } catch (error) {
    throw new ToolchainError(`this browser cannot read the pixels of an image: ${reason(error)}`, "", { cause: error });
  } finally {
    frame.close();
  }
}

/** Layout of 4-byte pixels. stride: bytes from row to row. red: index of red in a pixel, 0 for RGBA, 2 for BGRA. */
interface Layout {
  readonly width: number;
  readonly height: number;
  readonly stride: number;
  readonly red: 0 | 2;
}

/** Orientation of a frame: rotate it clockwise by `rotation` degrees, then mirror it left to right if `flip` is true. */
interface Turn {
  readonly rotation?: number;
  readonly flip?: boolean;
}

/** Convert stored 4-byte pixels to upright RGB: read the pixels with the steps of the rotation. */
function upright(bytes: Uint8Array, { width, height, stride, red }: Layout, { rotation = 0, flip = false }: Turn): RgbImage {
  const last = { column: 4 * (width - 1), row: stride * (height - 1) };
  const walks: Record<number, [start: number, right: number, down: number]> = {
    0: [0, 4, stride],
    90: [last.row, -stride, 4],
    180: [last.row + last.column, -4, -stride],
    270: [last.column, stride, -4],
  };
  let [start, right, down] = walks[rotation]!;
  const [w, h] = rotation % 180 ? [height, width] : [width, height];
  if (flip) [start, right] = [start + right * (w - 1), -right];
  const rgb = new Uint8Array(3 * w * h);
  let at = 0;
  for (let y = 0; y < h; y++)
    for (let x = 0, from = start + y * down; x < w; x++, from += right) {
      rgb[at++] = bytes[from + red]!;
      rgb[at++] = bytes[from + 1]!;
      rgb[at++] = bytes[from + 2 - red]!;
    }
  return { rgb, width: w, height: h };
}
