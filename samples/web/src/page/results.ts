/** Display of results: bars, tables, facts about the bundle, and errors. */

import { EvmError, type Check, type Detection, type LabelMap, type Latency, type Prediction, type PreprocessingFacts } from "../evm";
import { at, make } from "./dom";
import { clearOverlay, colourOf, drawDetections, drawLabelMap } from "./overlay";
import type { Opened, Predicted } from "./worker";

const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" } as const;

/** Smallest score of the detections that are shown. */
const MIN_SCORE = 0.3;
/** Most rows below the headline. */
const MOST_ROWS = 20;

/** Show the answer for an image, draw detections and label maps over it, and show the times. */
export function showAnswer({ answer, width, height, milliseconds }: Predicted, { labels, palette }: Opened): void {
  clearOverlay();
  if ("top" in answer) showTop(answer.top);
  else if ("detections" in answer) showDetections(answer.detections.filter(({ score }) => score >= MIN_SCORE), width, height);
  else showLabelMap(answer.labelMap, labels, palette);
  at("inference").textContent = ms(milliseconds.inference);
  at("preprocessing").textContent = ms(milliseconds.preprocessing);
  at("timing").hidden = false;
}

function showTop(top: readonly Prediction[]): void {
  headline(top[0]!.label, percent(top[0]!.score));
  at("bars").replaceChildren(...top.map(({ label, score }) => bar(label, score)));
}

function showDetections(found: readonly Detection[], width: number, height: number): void {
  const counts = new Map<string, number>();
  for (const { label } of found) counts.set(label, (counts.get(label) ?? 0) + 1);
  const named = [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) => `${n} ${label}`);
  headline(named.join(", "), found.length ? "" : "no detections");
  at("bars").replaceChildren(...found.slice(0, MOST_ROWS).map(({ label, index, score }) => bar(label, score, colourOf(index))));
  drawDetections(found, width, height);
}

function showLabelMap(found: LabelMap, labels: readonly string[], palette: Opened["palette"]): void {
  const counts = new Map<number, number>();
  for (const index of found.map) counts.set(index, (counts.get(index) ?? 0) + 1);
  const shares = [...counts].sort((a, b) => b[1] - a[1]).map(([index, n]) => [index, n / found.map.length] as const);
  const name = (index: number): string => labels[index] ?? `class ${index}`;
  headline(name(shares[0]![0]), percent(shares[0]![1]));
  at("bars").replaceChildren(...shares.slice(0, MOST_ROWS).map(([index, share]) => bar(name(index), share, colourOf(index, palette))));
  drawLabelMap(found, palette);
}

/** Make a row of a label and a share, 0..1. colour: of the class in the image. */
function bar(label: string, share: number, colour?: string): HTMLLIElement {
  const track = make("i", {});
  track.style.width = `${100 * share}%`;
  const name = make("span", { class: "label", title: label }, label);
  if (colour) {
    const swatch = make("i", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = colour;
    name.prepend(swatch);
  }
  return make("li", {}, name, make("span", { class: "score" }, percent(share)), make("span", { class: "track", "aria-hidden": "true" }, track));
}

/** Show a text in place of the classes. */
export function showNoTop(text: string): void {
  headline("", text);
  clearOverlay();
  at("bars").replaceChildren();
  at("timing").hidden = true;
}

/** Describe the resize: `crop 0.875`, `stretch` or `pad`. */
function resizeText({ resize = "crop", crop_pct = 1 }: PreprocessingFacts): string {
  return resize === "crop" ? `crop ${crop_pct}` : resize;
}

/** Show facts about the opened bundle. */
export function showBundle(opened: Opened): void {
  const { name, precision, input, gives, bytes, preprocessing, provider, scan, threads, loadMs } = opened;
  const where = NAMES[provider.value] + (provider.value === "wasm" ? `, ${count(threads, "thread")}` : "");
  at("conditions").textContent = `${where}: ${provider.reason}`;
  const rows: [string, string][] = [
    ["Name", name],
    ["Model", `${precision}, ${(bytes / 1e6).toFixed(1)} MB, ${gives}`],
    ["Reads", `${preprocessing.size.join("x")}, ${input}, ${preprocessing.interpolation}, ${resizeText(preprocessing)}`],
    ["Scans", scan.value === "portable" ? `portable: ${scan.reason}` : scan.reason],
    ["Loaded in", ms(loadMs)],
  ];
  at("facts").replaceChildren(...rows.map(([term, fact]) => make("div", {}, make("dt", {}, term), make("dd", {}, fact))));
  at("checks").replaceChildren();
  at("latency").replaceChildren();
}

/** Show the checks of the self-test. */
export function showChecks(checks: readonly Check[]): void {
  const passed = checks.every((check) => check.ok);
  const rows = checks.map(({ name, error, limit, ok }) => [ok ? "" : "bad", name, exponent(error), exponent(limit)] as const);
  at("checks").replaceChildren(table(passed ? "PASSED" : "FAILED", passed ? "good" : "bad", ["", "error", "limit"], rows));
}

/** Show the result of the benchmark. */
export function showLatency({ runs, p50, p90, p99, min }: Latency): void {
  const rows = [["p50", p50], ["p90", p90], ["p99", p99], ["fastest", min]] as const;
  const cells = rows.map(([name, value]) => ["", name, ms(value)] as const);
  at("latency").replaceChildren(table(`${ms(p50)}, the median of ${runs}`, "", ["", "latency"], cells));
}

/** Show an error and its hint. If `useWasm` is given, show the button that calls it. */
export function showProblem(error: unknown, useWasm?: () => void): void {
  if (!(error instanceof EvmError)) console.error(error);
  at("message").textContent = error instanceof Error ? error.message : String(error);
  at("hint").textContent = error instanceof EvmError ? error.hint : "";
  const button = at<HTMLButtonElement>("use-wasm");
  button.hidden = !useWasm;
  button.onclick = useWasm ?? null;
  at("problem").hidden = false;
}

/** Hide the error. */
export function showNoProblem(): void {
  at("problem").hidden = true;
}

function headline(text: string, soft: string): void {
  at("headline").replaceChildren(text, " ", make("small", {}, soft));
}

function table(
  caption: string,
  kind: string,
  head: readonly string[],
  rows: readonly (readonly [kind: string, name: string, ...cells: string[]])[],
): HTMLTableElement {
  const columns = head.map((text) => make("th", { scope: "col" }, text));
  const body = rows.map(([kind, name, ...cells]) =>
    make("tr", { class: kind }, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))),
  );
  return make(
    "table", {},
    make("caption", { class: kind }, caption), make("thead", {}, make("tr", {}, ...columns)), make("tbody", {}, ...body),
  );
}

function percent(score: number): string {
  return `${(100 * score).toFixed(1)} %`;
}

function ms(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

function exponent(value: number): string {
  return Number.isFinite(value) ? value.toExponential(1) : "not finite";
}

function count(n: number, one: string): string {
  return `${n} ${one}${n === 1 ? "" : "s"}`;
}
