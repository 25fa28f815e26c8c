/** Drawing of detections and label maps over the image or the camera. */

import type { Detection, LabelMap } from "../evm";
import { at } from "./dom";

/** The colours of evm_deploy/tasks/drawing.py. */
const PALETTE = [
  ...["#e6194b", "#3cb44b", "#ffe119", "#0082c8", "#f58230", "#911eb4", "#46f0f0", "#f032e6", "#d2f53c", "#fabebe"],
  ...["#008080", "#dcbeff", "#aa6e28", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd7b4", "#000080", "#808080"],
] as const;
const [LINE_SHARE, TEXT_SHARE] = [0.003, 0.022]; // of the mean side of the image
const [LEAST_LINE, LEAST_TEXT] = [1.5, 12]; // pixels of the screen
const MAX_SIDE = 2048;

const canvas = at<HTMLCanvasElement>("overlay");

/** Remove what is drawn. */
export function clearOverlay(): void {
  canvas.hidden = true;
}

/** Draw the box, name and score of each detection of an image of this size; the best is on top. */
export function drawDetections(found: readonly Detection[], width: number, height: number): void {
  const { context, scale } = started(width, height);
  const unit = canvas.width / Math.max(1, canvas.clientWidth || canvas.width); // canvas pixels for one of the screen
  const mean = (canvas.width + canvas.height) / 2;
  context.lineWidth = Math.max(LEAST_LINE * unit, LINE_SHARE * mean);
  const letters = Math.max(LEAST_TEXT * unit, TEXT_SHARE * mean);
  context.font = `600 ${letters}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { label, index, score, box } of [...found].reverse()) {
    const [x1, y1, x2, y2] = box.map((side) => side * scale) as [number, number, number, number];
    const colour = colourOf(index);
    context.strokeStyle = context.fillStyle = colour;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const text = `${label} ${score.toFixed(2)}`;
    const [wide, high] = [context.measureText(text).width + 0.5 * letters, 1.4 * letters];
    const [x, y] = [Math.max(0, Math.min(x1, canvas.width - wide)), y1 >= high ? y1 - high : y1];
    context.fillRect(x, y, wide, high);
    context.fillStyle = isLight(colour) ? "#000" : "#fff";
    context.fillText(text, x + 0.25 * letters, y + 0.2 * letters);
  }
}

/** Colours of the classes of a segmenter; empty for the fixed ones. */
type Palette = readonly (readonly [number, number, number])[];

/** Draw a label map, half transparent. */
export function drawLabelMap({ map, width, height }: LabelMap, palette: Palette): void {
  const { context } = started(width, height);
  const pixels = new ImageData(width, height);
  const colours = palette.length ? palette : PALETTE.map((colour) => rgbOf(colour));
  for (let i = 0; i < map.length; i++) pixels.data.set([...colours[map[i]! % colours.length]!, 128], 4 * i);
  const whole = new OffscreenCanvas(width, height);
  whole.getContext("2d")!.putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(whole, 0, 0, canvas.width, canvas.height);
}

/** Return the colour of a class, from the palette of the bundle if it has one. */
export function colourOf(index: number, palette: Palette = []): string {
  return palette.length ? `rgb(${palette[index % palette.length]!.join(" ")})` : PALETTE[index % PALETTE.length]!;
}

/** Show an empty overlay for an image of this size. scale: pixels of the overlay for one of the image. */
function started(width: number, height: number): { context: CanvasRenderingContext2D; scale: number } {
  canvas.hidden = false;
  const shown = Math.max(canvas.clientWidth, canvas.clientHeight) * devicePixelRatio || Math.max(width, height);
  const scale = Math.min(MAX_SIDE, shown) / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  return { context: canvas.getContext("2d")!, scale };
}

function rgbOf(colour: string): [number, number, number] {
  return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)) as [number, number, number];
}

function isLight(colour: string): boolean {
  const [red, green, blue] = rgbOf(colour);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140;
}
