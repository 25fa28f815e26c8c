/** Display of the image or the camera, with a frame around the part that the model reads. */

import { Preprocessing, type PreprocessingFacts } from "../evm";
import { at } from "./dom";

/** Longest side, in pixels, of images that are shown with visible square pixels. */
const SMALL = 64;
const MAX_CANVAS = 1024;

const frame = at("frame");
const canvas = at<HTMLCanvasElement>("canvas");
const video = at<HTMLVideoElement>("video");

/** Show an image. A file that the browser cannot decode is not shown; the worker reports the error. */
export async function showImage(file: Blob, facts: PreprocessingFacts): Promise<void> {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return;
  const { width, height } = bitmap;
  const scale = Math.min(1, MAX_CANVAS / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d")!.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.classList.toggle("small", Math.max(width, height) <= SMALL);
  bitmap.close();
  show(canvas, width, height, facts);
}

/** Show the camera. */
export function showVideo(facts: PreprocessingFacts): void {
  show(video, video.videoWidth, video.videoHeight, facts);
}

/** Show the prompt in place of an image. */
export function showNothing(): void {
  frame.hidden = true;
  at("prompt").hidden = false;
}

function show(element: HTMLElement, width: number, height: number, facts: PreprocessingFacts): void {
  [canvas.hidden, video.hidden] = [element !== canvas, element !== video];
  frame.hidden = false;
  at("prompt").hidden = true;
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style.width = `min(100%, calc(var(--height) * ${width / height}))`;
  const seen = new Preprocessing(facts).seen(width, height);
  const { style } = at("seen");
  style.left = `${(100 * seen.x) / width}%`;
  style.top = `${(100 * seen.y) / height}%`;
  style.width = `${(100 * seen.width) / width}%`;
  style.height = `${(100 * seen.height) / height}%`;
}
