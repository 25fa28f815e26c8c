/** From an image file or a camera's frame to upright 8-bit RGB, with the bytes that are in the file. */

import { ImageError, ToolchainError, reason } from "./errors";
import type { RgbImage } from "./preprocess";

/** Pillow's: of an image, over which it may be a bomb. */
const MAX_PIXELS = 178_956_970;
const AS_STORED: ImageBitmapOptions = { premultiplyAlpha: "none", colorSpaceConversion: "none" };

/**
 * Decode an image as Python does: EXIF rotation applied, alpha dropped without having touched the colours, no colour
 * conversion, 16 bits scaled. `name` is for messages. Throws ImageError.
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
 * The pixels of a bitmap that was made without premultiplied alpha. A canvas would premultiply them; a VideoFrame hands
 * them out as they are, and says how they are still to be turned.
 */
export async function pixelsOf(bitmap: ImageBitmap): Promise<RgbImage> {
  if (typeof VideoFrame === "undefined")
    throw new ToolchainError("this browser has no WebCodecs, which pixels are read with", "use one of 2024 or newer");
  const frame = new VideoFrame(bitmap, { timestamp: 0 });
  try {
    const bytes = new Uint8Array(frame.allocationSize());
    const [plane] = await frame.copyTo(bytes);
    const { width, height } = frame.visibleRect ?? { width: frame.codedWidth, height: frame.codedHeight };
    const red = frame.format?.startsWith("RGB") ? 0 : frame.format?.startsWith("BGR") ? 2 : undefined;
    if (red === undefined || !plane) throw new Error(`pixels come as ${frame.format}`);
    return upright(bytes.subarray(plane.offset), { width, height, stride: plane.stride, red }, frame as VideoFrame & Turn);
  } catch (error) {
    throw new ToolchainError(`this browser does not hand out an image's pixels: ${reason(error)}`, "", { cause: error });
  } finally {
    frame.close();
  }
}

/** Of 4-byte pixels. stride: bytes from row to row. red: 0 for RGBA, 2 for BGRA. */
interface Layout {
  readonly width: number;
  readonly height: number;
  readonly stride: number;
  readonly red: 0 | 2;
}

/** How a frame is to be shown: turned clockwise by `rotation` degrees, then mirrored left to right. */
interface Turn {
  readonly rotation?: number;
  readonly flip?: boolean;
}

/** 4-byte pixels as they are stored -> RGB as they are to be seen: the image is walked with other steps. */
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
