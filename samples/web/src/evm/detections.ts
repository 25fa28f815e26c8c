/** Decoding of the outputs of a detector, with the same arithmetic as in Python: float32 in the selection. */

import type { Box, Geometry } from "./geometry";
import type { Tensor, Tensors } from "./tensor";

/** One detected object of an image. score: probability, 0..1. box: in pixels of the image. */
export interface Detection {
  readonly label: string;
  readonly index: number;
  readonly score: number;
  readonly box: Box;
}

/**
 * Settings of the selection, for a detector without non-maximum suppression (NMS): of two boxes of a class that overlap by
 * more than `iou`, the one with the lower score is dropped. most: most detections of an image.
 */
export interface Selection {
  readonly iou: number;
  readonly most: number;
}

/** A row of a detector's outputs. at: number of the row in the batch. box: in pixels of the network's input. */
interface Row {
  readonly at: number;
  readonly box: Box;
  readonly score: number;
  readonly label: number;
}

/** Intersection over union from which two boxes of a class are the same detection. */
const SAME = 0.5;
const f = Math.fround;
type Round = (x: number) => number;

/** Return the detections of image `i` of a batch, by falling score. Without labels, a class is named `class 7`. */
export function detectionsOf(outputs: Tensors, i: number, selection: Selection, place: Geometry, labels: readonly string[]): Detection[] {
  const rows = clipped(rowsOf(outputs, i, true), place);
  const found = outputs["count"] ? rows : suppressed(rows, selection);
  return found.map(({ box, score, label }) => ({
    label: labels[label] ?? `class ${label}`,
    index: label,
    score,
    box: place.toImage(box),
  }));
}

/** Return the rows of image `i` that hold a detection, or a candidate if there is no count. scored: those with a positive score. */
function rowsOf(outputs: Tensors, i: number, scored: boolean): Row[] {
  const { boxes, scores, labels, count } = outputs as Record<"boxes" | "scores" | "labels", Tensor> & { count?: Tensor };
  const all = boxes.shape[1]!;
  const found: Row[] = [];
  for (let row = 0; row < Math.min(all, count ? count.data[i]! : all); row++) {
    const at = i * all + row;
    const [score, label] = [scores.data[at]!, labels.data[at]!];
    const box = [0, 1, 2, 3].map((side) => boxes.data[4 * at + side]!) as unknown as Box;
    if (label >= 0 && (score > 0 || !scored)) found.push({ at, box, score, label });
  }
  return found;
}

/** Clip boxes to the part of the input that shows the image, and leave out those that become empty. */
function clipped(rows: readonly Row[], place: Geometry): Row[] {
  const { top, left, bottom, right } = place.content;
  const within = (x: number, low: number, high: number): number => Math.min(Math.max(x, low), high);
  return rows
    .map((row) => {
      const [x1, y1, x2, y2] = row.box;
      const box: Box = [within(x1, left, right), within(y1, top, bottom), within(x2, left, right), within(y2, top, bottom)];
      return { ...row, box };
    })
    .filter(({ box: [x1, y1, x2, y2] }) => x2 > x1 && y2 > y1);
}

/** Greedy non-maximum suppression of each class: boxes of different classes are shifted apart. */
function suppressed(rows: readonly Row[], { iou, most }: Selection): Row[] {
  const largest = rows.reduce((max, { box }) => Math.max(max, ...box), 0);
  const [step, limit] = [f(largest + 1), f(iou)];
  const apart = rows.map(({ box, label }) => box.map((side) => f(side + f(label * step))) as unknown as Box);
  const order = rows.map((_, index) => index).sort((a, b) => rows[b]!.score - rows[a]!.score || a - b);
  const kept: number[] = [];
  for (const index of order) {
    if (kept.length === most) break;
    if (!kept.some((other) => overlap(apart[other]!, apart[index]!, f) > limit)) kept.push(index);
  }
  return kept.map((index) => rows[index]!);
}

/** Return the intersection over union of two boxes, 0 for empty boxes. round: of every result, Math.fround for float32. */
function overlap(a: Box, b: Box, round: Round): number {
  const area = ([x1, y1, x2, y2]: Box): number => round(round(x2 - x1) * round(y2 - y1));
  const width = Math.max(round(Math.min(a[2], b[2]) - Math.max(a[0], b[0])), 0);
  const height = Math.max(round(Math.min(a[3], b[3]) - Math.max(a[1], b[1])), 0);
  const inter = round(width * height);
  const all = round(round(area(a) + area(b)) - inter);
  return round(inter / (all > 0 ? all : 1));
}

/** Two runs of a detector on the same images: `share`, 0..1, of the rows are in a pair; `pairs` has the rows' numbers. */
export interface Aligned {
  readonly share: number;
  readonly pairs: readonly (readonly [expected: number, actual: number])[];
}

/**
 * Pair the rows of two runs that are the same detection: the same label, an overlap of at least SAME, and scores and corners
 * that agree within the tolerance, that of corners relative to the largest. The nearest pairs come first. Rows whose score
 * is within the tolerance of nothing do not count.
 */
export function align(expected: Tensors, actual: Tensors, tolerance: number): Aligned {
  const pairs: [number, number][] = [];
  let [paired, count] = [0, 0];
  const counts = (row: Row): number => Number(!(row.score <= tolerance)); // NaN counts
  for (let i = 0; i < expected["boxes"]!.shape[0]!; i++) {
    const [ours, theirs] = [rowsOf(expected, i, false), rowsOf(actual, i, false)];
    for (const row of [...ours, ...theirs]) count += counts(row);
    const taken = new Set<Row>();
    for (const [a, b] of nearest(ours, theirs, tolerance)) {
      if (taken.has(a) || taken.has(b)) continue;
      taken.add(a).add(b);
      paired += counts(a) + counts(b);
      pairs.push([a.at, b.at]);
    }
  }
  return { share: count ? paired / count : 1, pairs };
}

/** Return every two rows that may be the same detection, the nearest first. */
function nearest(ours: readonly Row[], theirs: readonly Row[], tolerance: number): [Row, Row][] {
  const largest = ours.reduce((most, { box }) => Math.max(most, ...box.map(Math.abs)), 1);
  const found: { a: Row; b: Row; far: number }[] = [];
  for (const a of ours)
    for (const b of theirs) {
      const [apart, share] = [Math.abs(a.score - b.score), overlap(a.box, b.box, (x) => x)];
      const near = a.box.every((side, i) => Math.abs(side - b.box[i]!) <= tolerance * largest);
      if (a.label === b.label && share >= SAME && apart <= tolerance && near) found.push({ a, b, far: apart - share });
    }
  return found.sort((one, other) => one.far - other.far).map(({ a, b }) => [a, b]);
}
